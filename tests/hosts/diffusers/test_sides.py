"""A side of several LoRAs in a real pipeline: the picture of the one file that holds their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import klora
from klora import cli
from tests.hosts.diffusers.test_pipeline import assert_close, assert_differs, attention_shapes
from tests.support.lora_files import write_lora
from tests.support.models import module_shapes
from tests.support.pipelines import SMALLER, run

Made = tuple[Any, dict[str, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A pipeline and four LoRAs, three of them with text-encoder parts; `sum` is dog + 0.5·coat as one file."""
    folder = tmp_path_factory.mktemp("sides")
    pipe = SMALLER["sd"](folder / "tokenizer")
    unet = dict(list(attention_shapes(pipe).items())[::4])
    text = {f"text_encoder.{name}": shape for name, shape in module_shapes(pipe.text_encoder).items()}
    files = {
        name: write_lora(folder / f"{name}.safetensors", shapes, spelling=spelling, rank=rank, seed=rank, strength=0.3)
        for name, shapes, spelling, rank in (
            ("dog", {**unet, **text}, "kohya", 4),
            ("coat", {**unet, **text}, "peft", 3),
            ("ink", {**unet, **text}, "kohya", 6),
            ("grain", unet, "peft", 2),
        )
    }
    files["sum"] = folder / "sum.safetensors"
    # In the order of their names, by which a side sums them: LEGO's clusters begin with the units in their order.
    words = ["merge", str(files["coat"]), str(files["dog"]), "--policy", "direct", "--subject-strength", "0.5"]
    assert cli.main([*words, "--dtype", "float32", "-o", str(files["sum"])]) == 0
    return pipe, files


def picture(pipe: Any, subject: Any, style: Any, **settings: Any) -> torch.Tensor:
    with klora.fuse(pipe, subject, style, **settings):
        return run(pipe, num_inference_steps=2)


@pytest.mark.parametrize(
    "policy", ["k-lora", "est", "dynamic", "direct", "cm-lora", "np-lora", "lego", "ties", "dare", "knots"]
)
def test_a_side_of_two_is_the_file_of_their_sum(made: Made, policy: str) -> None:
    pipe, files = made
    settings: dict[str, Any] = {"policy": policy, "subject_strength": 0.8, "style_blocks": "mid: 0.5"}
    sides = [files["dog"], (files["coat"], 0.5)], [files["ink"]]
    found = picture(pipe, *sides, **settings)
    assert_close(found, picture(pipe, files["sum"], files["ink"], **settings))
    if policy == "direct":
        assert_differs(found, picture(pipe, files["dog"], files["ink"], **settings))


def test_as_the_style_too(made: Made) -> None:
    pipe, files = made
    style = [(files["coat"], 0.5), files["dog"]]
    found = picture(pipe, [files["ink"], files["grain"]], style)
    assert_close(found, picture(pipe, [files["grain"], files["ink"]], files["sum"]))
    alone = picture(pipe, files["ink"], files["sum"], text_encoder="style")
    assert_differs(found, alone)


def test_the_text_encoder_s_parts_are_summed_too(made: Made) -> None:
    pipe, files = made
    closed = {"subject_to": 0.0, "style_blocks": "down 0: 0, mid: 0, up 1: 0"}
    found = picture(pipe, [files["dog"], (files["coat"], 0.5)], files["grain"], **closed)
    assert_close(found, picture(pipe, files["sum"], files["grain"], **closed))
    assert_differs(found, picture(pipe, files["dog"], files["grain"], **closed))
    assert_differs(found, run(pipe, num_inference_steps=2))


def test_a_side_of_one_is_bit_for_bit_the_file(made: Made) -> None:
    pipe, files = made
    one = picture(pipe, files["dog"], files["ink"])
    assert torch.equal(picture(pipe, [files["dog"]], [(files["ink"], 1.0)]), one)
    told = {"subject_from": 0.0, "subject_to": 1.0, "style_to": 1.0, "subject_blocks": "mid: 1, base: 1"}
    assert torch.equal(picture(pipe, files["dog"], files["ink"], **told), one)


def test_the_order_of_a_side_changes_no_bit(made: Made) -> None:
    pipe, files = made
    one = picture(pipe, [files["dog"], (files["coat"], 0.5), files["grain"]], files["ink"])
    assert torch.equal(picture(pipe, [files["grain"], files["dog"], (files["coat"], 0.5)], files["ink"]), one)


@pytest.mark.parametrize("policy", ["k-lora", "dynamic", "composite", "ties"])
def test_a_side_that_never_acts_leaves_the_other_alone(made: Made, policy: str) -> None:
    pipe, files = made
    alone = picture(pipe, files["sum"], files["grain"], policy="direct", style_strength=0)
    never = picture(pipe, files["sum"], files["grain"], policy=policy, style_to=0)
    assert_close(never, alone)
