from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random

import pytest

from klora.lora.file import LoraFile
from tests.fuzz import files
from tests.fuzz.drafts import good
from tests.fuzz.files import LIMIT_MB, Case, FuzzError, fuzz, measured, run_case
from tests.fuzz.mutations import MUTATIONS


def test_no_mutated_file_does_worse_than_to_be_refused() -> None:
    report = fuzz(0, iter(range(250)), until=lambda: False)
    assert not report.failures, "\n".join(report.lines())
    outcomes = {outcome for row in report.rows.values() for outcome in row}
    assert {"refused", "applied"} <= outcomes
    assert set(report.rows) == {mutation.__name__ for mutation in MUTATIONS}


def test_a_case_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        run_case(3, 14, tmp_path)
        contents.append([path.read_bytes() for path in sorted(tmp_path.glob("*.safetensors"))])
        run_case(3, 15, tmp_path)
    assert contents[0] == contents[1]


def test_the_files_are_good_before_they_are_mutated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for number in range(20):
        path.write_bytes(good(Random(number)).content())
        assert LoraFile.open(path).modules


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is looked up in /proc")
def test_what_takes_too_much_memory_is_a_failure() -> None:
    # Four times the limit: what earlier tests leave behind may be freed meanwhile, and takes some of it off.
    with pytest.raises(FuzzError, match="hold took"), measured(Case([]), "hold"):
        held = b"x" * (4 * LIMIT_MB * 2**20)
    del held


def test_what_takes_too_long_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    monkeypatch.setattr(files, "LIMIT_S", 0.01)
    with pytest.raises(FuzzError, match="spin took"), measured(Case([]), "spin"):
        spin(0.05)
