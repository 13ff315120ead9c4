from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from klora.settings import Settings
from klora.webui.args import ARG_ORDER, FusionRequest, read_values
from klora.webui.infotext import PASTERS, from_infotext, hashes_of, rename_by_hash, to_infotext
from tests.webui.test_args import requests

# How both hosts write and read the last line of an image's text.
_PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"^(\d+)x(\d+)$")


def through_a_host(prompt: str, entries: dict[str, Any]) -> dict[str, Any]:
    line = ", ".join(key if key == value else f"{key}: {quoted(value)}" for key, value in entries.items())
    params: dict[str, Any] = {}
    for key, value in _PARAM.findall(line):
        text = json.loads(value) if value[:1] == '"' and value[-1:] == '"' else value
        size = _SIZE.match(text)
        if size:
            params[f"{key}-1"], params[f"{key}-2"] = size.groups()
        else:
            params[key] = text
    return {**params, "Prompt": prompt}


def quoted(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if any(sign in str(value) for sign in ",\n:") else value


@given(requests(), st.sampled_from(["SD1", "SDXL", "FLUX", None]))
def test_what_was_set_is_restored_and_what_was_auto_stays_auto(
    request_: FusionRequest, architecture: str | None
) -> None:
    given_ = request_.settings
    # The modulus of s*, which is chosen on FLUX.
    assume(given_.alpha != 0)
    resolved = given_.resolve(architecture)
    params = through_a_host(f"a dog {request_.tag}", to_infotext(resolved, given_))
    pasted = from_infotext(params)
    again = read_values(pasted)
    assert (again.subject, again.style) == (request_.subject, request_.style)
    assert again.settings == given_


def test_scale_alpha_beta_scope_and_variant_are_always_written() -> None:
    entries = to_infotext(Settings().resolve("SD1"), Settings())
    assert entries == {
        "K-LoRA variant": "paper",
        "K-LoRA scale": "s",
        "K-LoRA alpha": "1.5",
        "K-LoRA beta": "0.5",
        "K-LoRA scope": "all",
    }


def test_other_settings_are_written_where_they_are_not_the_default() -> None:
    given_ = Settings(policy="random", text_encoder="style", seed=3)
    entries = to_infotext(given_.resolve("SD1"), given_)
    assert entries["K-LoRA policy"] == "random"
    assert entries["K-LoRA text encoder"] == "style"
    assert entries["K-LoRA seed"] == 3
    assert not any("steps" in key for key in entries)


def test_a_pasted_tag_unticks_the_accordion_and_no_tag_leaves_it() -> None:
    assert PASTERS["enabled"]({"Prompt": "a <klora:dog:ink>"}) is False
    assert PASTERS["enabled"]({"Prompt": "a <klora:bad"}) is False
    assert PASTERS["enabled"]({"Prompt": "a dog"}) is None
    assert PASTERS["enabled"]({}) is None


def test_each_control_is_set_from_the_tag() -> None:
    params = {"Prompt": "a <klora:dog:ink:0.9:k=64:beta=0.6>", "K-LoRA alpha": "1.5", "K-LoRA scale": "s"}
    pasted = {name: paste(params) for name, paste in PASTERS.items()}
    assert set(pasted) == {*ARG_ORDER} - {"show_map"}
    assert pasted["subject"] == "dog"
    assert pasted["subject_strength"] == 0.9
    assert pasted["k"] == 64
    assert pasted["beta"] == 0.6
    assert (pasted["scale"], pasted["alpha"], pasted["gamma"]) == ("auto",) * 3


@given(st.text(), st.dictionaries(st.sampled_from([f"K-LoRA {n}" for n in ("beta", "scale", "policy")]), st.text()))
def test_hostile_text_breaks_nothing(prompt: str, entries: dict[str, str]) -> None:
    params = {"Prompt": f"{prompt} <klora:dog:ink>", **entries}
    for paste in PASTERS.values():
        paste(params)
    for value in from_infotext(params).values():
        assert isinstance(value, (str, int, float, type(None)))
    rename_by_hash({**params, "Lora hashes": prompt}, lambda name, _: name)


def test_a_renamed_file_is_found_by_its_hash_in_every_tag() -> None:
    here = {"d8d8": "puppy", "da05": "ink"}
    params = {
        "Prompt": "<klora:dog:ink:0.5> <lora:dog:1> <klora:dog:other>",
        "Hires prompt": "<klora:ink:dog>",
        "Lora hashes": "dog: d8d8, ink: da05",
    }
    rename_by_hash(params, lambda _name, value: here.get(value))
    assert params["Prompt"] == "<klora:puppy:ink:0.5> <lora:dog:1> <klora:puppy:other>"
    assert params["Hires prompt"] == "<klora:ink:puppy>"


def test_names_stay_where_no_hash_is_known() -> None:
    params = {"Prompt": "<klora:dog:ink>", "Lora hashes": "dog: 1234"}
    rename_by_hash(params, lambda _name, _value: None)
    assert params["Prompt"] == "<klora:dog:ink>"


def test_each_control_gets_its_own_value_and_nothing_without_a_tag() -> None:
    params = {"Prompt": "a dog <klora:dog:ink:0.5:share=0.25:text_encoder=style>", "K-LoRA scale": "s"}
    found = {name: PASTERS[name](params) for name in ("subject", "style", "subject_strength", "share", "text_encoder")}
    assert found == {"subject": "dog", "style": "ink", "subject_strength": 0.5, "share": 0.25, "text_encoder": "style"}
    assert PASTERS["gamma"](params) == "auto"
    assert PASTERS["subject"]({"Prompt": "a dog"}) is None


def test_whole_numbers_are_written_without_a_point() -> None:
    given_ = Settings(balance=1.0, subject_strength=0.5, gamma=2.0)
    entries = to_infotext(given_.resolve("SD1"), given_)
    assert (entries["K-LoRA balance"], entries["K-LoRA subject strength"], entries["K-LoRA gamma"]) == ("1", "0.5", "2")


def test_hashes_are_found_for_names_that_the_host_writes_without_their_signs() -> None:
    assert hashes_of({"Lora hashes": "dog: 0a1, in: k: ff"}) == {"dog": "0a1", "in: k": "ff"}
    assert hashes_of({}) == {}
    params = {"Prompt": "a <klora:big, dog:ink:0.5> here", "Lora hashes": "big dog: 0a1, ink: ff"}
    asked: list[tuple[str, str]] = []

    def name_for(name: str, value: str) -> str | None:
        asked.append((name, value))
        return {"0a1": "hound"}.get(value)

    rename_by_hash(params, name_for)
    assert asked == [("big, dog", "0a1"), ("ink", "ff")]
    assert params["Prompt"] == "a <klora:hound:ink:0.5> here"


def test_a_name_without_a_hash_is_not_looked_for() -> None:
    params = {"Prompt": "<klora:dog:ink>", "Lora hashes": "dog: 0a1"}
    asked: list[str] = []
    rename_by_hash(params, lambda name, value: asked.append(name))
    assert asked == ["dog"]
    assert params["Prompt"] == "<klora:dog:ink>"
