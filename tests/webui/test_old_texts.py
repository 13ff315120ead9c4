"""Tags, arguments and pictures' texts of the time when a side was one LoRA, with what they meant then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from klora.errors import KloraError
from klora.webui.args import ARG_ORDER, read_args
from klora.webui.infotext import from_infotext, rename_by_hash
from klora.webui.prompt_tag import find_tag
from klora.webui.sides import find_side

Changed = dict[str, Any]

TAGS: list[tuple[str, str, str, Changed]] = [
    ("<klora:dog:ink>", "dog", "ink", {}),
    (
        "<klora:dog:ink:0.9:1.1:scale=s*:beta=0.6>",
        "dog",
        "ink",
        {"subject_strength": 0.9, "style_strength": 1.1, "scale": "s*", "beta": 0.6},
    ),
    (
        "<klora:my dog + coat v1.2:ink*2 (final), 50%:balance=-0.5:k=64:gamma=0.7>",
        "my dog + coat v1.2",
        "ink*2 (final), 50%",
        {"balance": -0.5, "k": 64, "gamma": 0.7},
    ),
    (
        "<klora:dog:ink:-0.5:policy=random:seed=7:scope=attention:unpaired=drop>",
        "dog",
        "ink",
        {"subject_strength": -0.5, "policy": "random", "scope": "attention", "unpaired": "drop", "seed": 7},
    ),
    (
        "<klora:dog:ink:policy=dynamic:style_refs=C%3A/refs/ink.png;more:distance=l2:refine-from=0.2>",
        "dog",
        "ink",
        {"policy": "dynamic", "distance": "l2", "style_refs": "C:/refs/ink.png;more", "refine_from": 0.2},
    ),
    (
        "<klora:dog:ink:variant=official:progress=relative:passes=hires:other_layers=none>",
        "dog",
        "ink",
        {"variant": "official", "other_layers": "none", "progress": "relative", "passes": "hires"},
    ),
    ("<klora:dog:ink:policy=direct:preset=1/3,2/3>", "dog", "ink", {"policy": "direct", "preset": "1/3,2/3"}),
    (
        "<klora:dog:ink:alpha=auto:share=auto:policy=ties:density=0.3:merge_rank=0>",
        "dog",
        "ink",
        {"policy": "ties", "density": 0.3, "merge_rank": 0},
    ),
]

ARGUMENTS: list[tuple[list[Any], str, str, Changed]] = [
    (
        [True, "dog", "ink", 0.8, 1.1, 0, "auto", "k-lora", "paper", "s*", "auto", 0.6],
        "dog",
        "ink",
        {"subject_strength": 0.8, "style_strength": 1.1, "scale": "s*", "beta": 0.6},
    ),
    (
        [True, "dog + coat", "ink", 1, 1, 0.3, "auto", "direct"],
        "dog + coat",
        "ink",
        {"balance": 0.3, "policy": "direct"},
    ),
    ([{"subject": "dog", "style": "ink", "balance": 0.3}], "dog", "ink", {"balance": 0.3}),
    (
        [{"enabled": True, "subject": "50%*2", "style": "ink", "share": "0.4", "text-encoder": "none"}],
        "50%*2",
        "ink",
        {"share": 0.4, "text_encoder": "none"},
    ),
    (
        [
            *(True, "dog", "ink", 1, 1, 0.0, 0.6, "k-lora", "official", "auto", "auto", "auto", 128, "auto"),
            *("attention", "none", "both", "drop", "relative", "first", "auto", 3, True),
        ],
        "dog",
        "ink",
        {
            "share": 0.6,
            "variant": "official",
            "k": 128,
            "scope": "attention",
            "other_layers": "none",
            "text_encoder": "both",
            "unpaired": "drop",
            "progress": "relative",
            "passes": "first",
            "seed": 3,
        },
    ),
]

ORDER = (
    "enabled subject style subject_strength style_strength balance share policy variant scale alpha beta k gamma scope"
    " other_layers text_encoder unpaired progress passes engine seed show_map preset period gamma_power mu distance"
    " tokens reuse refresh style_refs subject_refs style_pull subject_pull refine_step refine_from refine_to"
    " discrepancy clusters density dare_merge merge_rank"
)


class Library:
    """Knows two names."""

    def __init__(self, *known: str) -> None:
        self.knows = known.__contains__

    def find(self, name: str) -> Any:
        if not self.knows(name):
            raise KloraError(f"there is no LoRA named {name!r}")
        return SimpleNamespace(name=name)


def one_lora(text: str, *known: str) -> str:
    """The name of the one LoRA, with the weight 1, that a side is."""
    [found] = find_side(text, "subject", Library(*known))  # type: ignore[arg-type]
    assert found.weight == 1
    return str(found.lora.name)


@pytest.mark.parametrize(("text", "subject", "style", "changed"), TAGS)
def test_a_tag_means_what_it_meant(text: str, subject: str, style: str, changed: Changed) -> None:
    tag = find_tag(f"a dog {text} in the snow")
    assert tag is not None
    assert one_lora(tag.subject, subject, style) == subject
    assert one_lora(tag.style, subject, style) == style
    assert tag.settings.changed() == changed


@pytest.mark.parametrize(("args", "subject", "style", "changed"), ARGUMENTS)
def test_arguments_mean_what_they_meant(args: list[Any], subject: str, style: str, changed: Changed) -> None:
    request = read_args(args)
    assert request is not None
    # By way of the tag, as whatever comes over the API.
    tag = find_tag(str(request.tag))
    assert tag is not None
    assert one_lora(tag.subject, subject, style) == subject
    assert one_lora(tag.style, subject, style) == style
    assert tag.settings.changed() == changed
    assert request.show_map is (len(args) > 22)


def test_the_order_of_arguments_begins_as_it_was() -> None:
    assert " ".join(ARG_ORDER).startswith(ORDER)


@pytest.mark.parametrize(("text", "subject", "style", "changed"), TAGS)
def test_a_picture_s_text_fills_in_what_it_filled_in(text: str, subject: str, style: str, changed: Changed) -> None:
    params = {"Prompt": f"a dog {text}", "Lora hashes": f"{subject}: 0123456789ab, {style}: ba9876543210"}
    rename_by_hash(params, lambda *_: None)
    assert params["Prompt"] == f"a dog {text}"
    filled = from_infotext({**params, "K-LoRA scale": "s", "K-LoRA alpha": "1.5", "K-LoRA subject share": "45.1%"})
    assert (filled["subject"], filled["style"]) == (subject, style)
    assert {name: filled[name] for name in changed} == changed


def test_a_file_that_has_another_name_here_is_found_by_its_hash() -> None:
    params = {
        "Prompt": "a dog <klora:my dog + coat:ink*2:0.8>",
        "Lora hashes": "my dog + coat: 0123456789ab, ink*2: ba9876543210",
    }
    here = {"0123456789ab": "hound", "ba9876543210": "ink (2)"}
    rename_by_hash(params, lambda _name, value: here[value])
    assert params["Prompt"] == "a dog <klora:hound:ink (2):0.8>"
