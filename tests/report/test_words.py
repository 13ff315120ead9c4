"""A plan and its modules in everyday words."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.report.picture import describe_share
from klora.report.words import PLACE_WORDS, WHEN, _thirds, _when, module_in_words, share_in_words
from klora.text import count_of
from tests.support.models import real_shapes
from tests.support.pairs import ATTENTION, plan_of


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.3.attn1.to_q",
            ["down block 1", "attention 0", "layer 3", "self-attention", "query"],
        ),
        (
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
            ["middle block", "attention 0", "layer 0", "cross-attention", "output"],
        ),
        (
            "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj",
            ["up block 0", "attention 2", "layer 0", "feed-forward", "in"],
        ),
        ("transformer_blocks.7.attn.add_k_proj", ["double-stream block 7", "attention", "key of the text"]),
        ("single_transformer_blocks.37.proj_mlp", ["single-stream block 37", "feed-forward"]),
        ("conv_in", ["first convolution"]),
        ("something.new.3", ["something", "new 3"]),
    ],
)
def test_a_module_is_told_in_words_from_the_block_inwards(name: str, words: list[str]) -> None:
    assert module_in_words(name) == words


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_the_attention_of_real_models_is_told_in_known_words_alone(model: str) -> None:
    attention = [name for name in real_shapes(model) if "attn" in name]
    told = {re.sub(r" \d+$", "", word) for name in attention for word in module_in_words(name)}
    assert told <= {*PLACE_WORDS}


def test_the_share_is_told_with_the_time_when_the_subject_acts() -> None:
    plan = plan_of(ATTENTION, spread=0.1, steps=30)
    share, when = share_in_words(plan)
    assert share == f"{100 * (plan.share or 0):.0f} %"
    assert when == "mostly in the first third"
    assert describe_share(plan) == f"subject {share}, mostly in the first third · 30 steps"


@pytest.mark.parametrize(
    ("shares", "when"),
    [
        ([1, 0, 0], WHEN[0]),
        ([0, 0, 1, 1, 0, 0], WHEN[1]),
        ([0, 0, 1], WHEN[2]),
        ([0.5] * 7, WHEN[3]),
        ([0.9, 0.7, 0.5], WHEN[4]),
        ([0.5, 0.7, 0.9], WHEN[5]),
        ([0.5, 0.9, 0.6], WHEN[6]),
        ([0.9, 0.4, 0.8], WHEN[7]),
        ([0, 0, 0], ""),
    ],
)
def test_when_the_subject_acts_is_told_by_thirds(shares: list[float], when: str) -> None:
    assert _when(_thirds(shares)) == when


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_the_thirds_hold_all_of_it_whatever_the_number_of_steps(shares: list[float]) -> None:
    assert sum(_thirds(shares)) == pytest.approx(sum(shares))


def test_a_plan_without_a_share_has_none_in_words_and_says_why() -> None:
    plan = plan_of([])
    with pytest.raises(ValueError, match="no share"):
        share_in_words(plan)
    assert describe_share(plan) == "nothing is contested · 30 steps"


@pytest.mark.parametrize(
    ("number", "told"),
    [(0, "0 keys"), (1, "1 key"), (2160, "2160 keys"), (1.0, "1 key"), (5 / 3, "1.67 keys")],
)
def test_what_is_counted_is_told_with_all_its_digits(number: float, told: str) -> None:
    assert count_of(number, "key") == told
