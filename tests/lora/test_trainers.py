"""docs/formats.md says of each trainer's files what K-LoRA makes of them."""

from __future__ import annotations

from tests.support.other_pipelines import OTHERS
from tests.support.pipelines import PIPELINES
from tests.support.trainers import TITLES, table, written


def test_the_table_of_trainers_and_models_is_what_comes_of_their_files() -> None:
    assert written() == table(), "write docs/formats.md anew with: python -m tests.support.trainers"


def test_every_model_has_a_row() -> None:
    assert TITLES.keys() == PIPELINES.keys() | OTHERS.keys()
