"""Pictures on disk: their numbers, and what is written into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from klora.errors import KloraError
from klora.generation.picture_file import next_number, parameters, write_picture

FACTS: dict[str, Any] = {
    "prompt": "a dog",
    "negative_prompt": "",
    "seed": 3,
    "steps": 2,
    "size": [32, 48],
    "guidance_scale": 7.5,
    "model": "my, model",
    "scheduler": "DDIMScheduler",
    "subject": {"file": "dog.safetensors"},
    "style": {"file": "ink.safetensors"},
    "settings": {"text_encoder": "both", "share": None, "style_refs": "", "alpha": 0.0},
}


def test_numbers_go_on_after_the_highest_whatever_else_lies_there(tmp_path: Path) -> None:
    assert next_number(tmp_path) == 0
    for name in ("00007-1.png", "00003-9.png", "00009-1.txt", "123-1.png", "contact-sheet.png"):
        (tmp_path / name).touch()
    assert next_number(tmp_path) == 8


def test_the_line_of_facts_quotes_what_would_break_it_and_leaves_out_what_is_not_set() -> None:
    prompt, line = parameters(FACTS).splitlines()
    assert prompt == "a dog"
    assert line == (
        "Steps: 2, Sampler: DDIMScheduler, CFG scale: 7.5, Seed: 3, Size: 32x48, "
        'Model: "my, model", K-LoRA subject: dog, K-LoRA style: ink, K-LoRA text encoder: both, K-LoRA alpha: 0.0'
    )
    several = {"loras": [{"file": "dog.safetensors", "weight": 0.8}, {"file": "coat.safetensors", "weight": 1.0}]}
    assert "K-LoRA subject: dog*0.8 + coat," in parameters({**FACTS, "subject": several})
    assert parameters({**FACTS, "negative_prompt": "bad"}).splitlines()[1] == "Negative prompt: bad"


def test_a_picture_carries_its_facts_for_people_and_for_programs(tmp_path: Path) -> None:
    path = write_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png", FACTS)
    with Image.open(path) as image:
        assert json.loads(image.text["klora"]) == FACTS
        assert image.text["parameters"] == parameters(FACTS)


def test_a_picture_of_a_file_whose_name_is_no_text_carries_its_facts(tmp_path: Path) -> None:
    facts = {**FACTS, "subject": {"file": "dog\udcff.safetensors"}}
    with Image.open(write_picture(Image.new("RGB", (4, 4)), tmp_path / "a.png", facts)) as image:
        assert json.loads(image.text["klora"]) == facts
        assert r"K-LoRA subject: dog\udcff, K-LoRA style: ink" in image.text["parameters"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KloraError, match="nowhere"):
        write_picture(Image.new("RGB", (4, 4)), tmp_path / "nowhere" / "a.png", FACTS)
