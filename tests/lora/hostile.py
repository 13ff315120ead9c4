"""What the tests of broken files are made of: a good file of one module, and changes to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from klora.errors import KloraError, LoraFileError
from klora.lora import disk
from klora.lora.file import LoraFile
from klora.text import printable

NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PREFIX = "lora_unet_" + NAME.replace(".", "_")
DOWN, UP = f"{PREFIX}.lora_down.weight", f"{PREFIX}.lora_up.weight"
SHAPES = {NAME: (8, 8), "mid_block.resnets.0.conv1": (8, 4, 3, 3)}


def header(down: dict[str, Any] | None = None, up: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The header of a good file of one module, rank 2, with changes."""
    entries = {
        DOWN: {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64], **(down or {})},
        UP: {"dtype": "F32", "shape": [8, 2], "data_offsets": [64, 128], **(up or {})},
    }
    return {**entries, **more}


def raw(path: Path, table: object, data: bytes = bytes(128), size: int | None = None) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


def refused(path: Path | str, kind: type[LoraFileError] = LoraFileError) -> LoraFileError:
    """The error of opening a file, checked to be of exactly one kind and one line that names the file."""
    with pytest.raises(LoraFileError) as caught:
        LoraFile.open(path)
    error = caught.value
    assert type(error) is kind
    assert len(str(error).splitlines()) == 1
    assert str(error).isprintable()
    assert len(str(error)) < 1500
    assert error.__cause__ is None
    assert error.file == printable(str(path))
    assert str(error).startswith(error.file)
    assert error.reason
    assert error.cure in str(error)
    return error


def error_of(path: Path) -> KloraError | None:
    """The error of opening a file, if there is one; anything but a KloraError fails the test."""
    try:
        LoraFile.open(path)
    except KloraError as error:
        return error
    return None


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files do not change while they are open, so that none is too young to be read."""
    monkeypatch.setattr(disk, "CLOCK_TICK_NS", 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bad.safetensors"
