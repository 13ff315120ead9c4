from __future__ import annotations

import os
from pathlib import Path

import pytest

from klora.cache import ScoreCache
from klora.errors import LoraFileError
from klora.pair import Pairs
from tests.support.lora_files import write_lora
from tests.support.pairs import ATTENTION, shapes, write_pair


def test_a_known_pair_is_opened_anew_once_a_file_is_another_even_of_the_same_size_and_date(tmp_path: Path) -> None:
    subject, style = write_pair(tmp_path)
    pairs, cache = Pairs(), ScoreCache(tmp_path / "cache")
    first = pairs.open(subject, style, cache)
    assert pairs.open(subject, style, cache) is first
    times, size = style.stat(), style.stat().st_size
    other = write_lora(tmp_path / "other.safetensors", shapes(ATTENTION), "peft", rank=8, seed=3)
    assert other.stat().st_size == size
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, style)
    second = pairs.open(subject, style, cache)
    assert second is not first
    assert pairs.open(subject, style, cache) is second


def test_a_known_pair_whose_file_is_gone_is_an_error(tmp_path: Path) -> None:
    subject, style = write_pair(tmp_path)
    pairs, cache = Pairs(), ScoreCache(tmp_path / "cache")
    pairs.open(subject, style, cache)
    style.unlink()
    with pytest.raises(LoraFileError, match=r"ink\.safetensors: does not exist"):
        pairs.open(subject, style, cache)
