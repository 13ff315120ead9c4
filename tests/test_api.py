"""What `import klora` offers, and what its functions say of themselves."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import klora
from klora.keywords import SettingsKeywords
from klora.settings import Settings
from tests.support.pairs import write_pair


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


def test_every_name_that_klora_offers_is_there() -> None:
    assert all(getattr(klora, name) for name in klora.__all__)
    assert set(klora.__all__) <= set(dir(klora))
    with pytest.raises(AttributeError, match="no attribute 'fuze'"):
        klora.fuze  # noqa: B018


def test_importing_klora_or_its_errors_loads_no_torch() -> None:
    code = "import sys, klora; klora.KloraError, klora.Settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_keywords_are_the_settings() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(Settings)}
    keywords = {name: kind.__forward_arg__ for name, kind in SettingsKeywords.__annotations__.items()}
    assert keywords == fields
    assert SettingsKeywords.__required_keys__ == frozenset()


@pytest.mark.parametrize("function", [klora.plan, klora.fuse])
def test_help_shows_that_the_settings_are_keywords(function: object) -> None:
    assert "**settings: 'Unpack[SettingsKeywords]'" in str(inspect.signature(function))
    assert "klora.Settings" in (inspect.getdoc(function) or "")


class OnDisk(os.PathLike):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("given", [str, Path, OnDisk, load_file], ids=["text", "Path", "PathLike", "state dict"])
def test_a_lora_is_a_path_of_any_kind_or_a_state_dict(files: tuple[Path, Path], given: object, tmp_path: Path) -> None:
    cache = klora.ScoreCache(tmp_path)
    expected = klora.plan(*files, cache=cache)
    found = klora.plan(*map(given, files), cache=cache)
    assert found == expected
    assert isinstance(found, klora.FusionPlan)


def test_a_changed_state_dict_is_another_lora(files: tuple[Path, Path], tmp_path: Path) -> None:
    cache, tensors = klora.ScoreCache(tmp_path), load_file(files[0])
    before = klora.plan(tensors, files[1], cache=cache)
    name = next(name for name in tensors if "lora_unet" in name and "lora_up" in name)
    tensors[name].mul_(torch.tensor(5.0))
    assert klora.plan(tensors, files[1], cache=cache) != before
