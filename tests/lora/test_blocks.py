"""Multipliers by block: the names that a module's block goes by, and LoRA Block Weight's vectors."""

from __future__ import annotations

import pytest

from klora.lora.blocks import VECTORS, BlockWeights, names_of
from klora.lora.names import block_label, block_of
from tests.support.models import real_shapes

MODELS = {"SD1": "sd15", "SDXL": "sdxl", "FLUX": "flux"}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            ("down.1", "down.blocks.1.attentions.0", "in04"),
        ),
        ("down_blocks.0.downsamplers.0.conv", ("down.0", "in03")),
        ("mid_block.attentions.0.proj_in", ("mid", "m00")),
        ("up_blocks.0.resnets.1.conv1", ("up.0", "out01")),
        ("transformer_blocks.5.attn.to_q", ("double-stream.blocks", "transformer.blocks.5", "d05")),
        ("single_transformer_blocks.37.proj_out", ("single-stream.blocks", "s37")),
        ("layers.3.attention.qkv", ("layers", "layers.3")),
        ("lora_thing_3_x", ("lora.thing", "lora.thing.3")),
    ],
)
def test_a_module_goes_by_the_names_of_its_block(module: str, names: tuple[str, ...]) -> None:
    assert set(names) <= names_of(module)


def test_the_last_name_that_fits_counts_in_any_spelling() -> None:
    weights = BlockWeights.parse("up 1: 0.5, up_blocks.1.attentions.0 = 2, Mid: 0", "subject_blocks")
    assert weights.of("up_blocks.1.resnets.0.conv1") == 0.5
    assert weights.of("up_blocks.1.attentions.0.proj_in") == 2
    assert weights.of("mid_block.attentions.0.proj_in") == 0
    assert weights.of("down_blocks.0.resnets.0.conv1") == 1


def test_every_block_of_a_map_can_be_named() -> None:
    for model in MODELS.values():
        for label in {block_label(block_of(module)) for module in real_shapes(model)}:
            weights = BlockWeights.parse(f"{label}: 3", "style_blocks")
            named = [module for module in real_shapes(model) if block_label(block_of(module)) == label]
            assert {weights.of(module) for module in named} == {3}


@pytest.mark.parametrize("count", VECTORS)
def test_vectors_have_as_many_names_as_values_and_reach_the_blocks_of_their_model(count: int) -> None:
    architecture, names = VECTORS[count]
    assert len(names) == count == len(set(names))
    weights = BlockWeights.parse(",".join(str(i) for i in range(count) if i <= 10) + ",1" * max(0, count - 11), "x")
    assert weights.vector_for == architecture
    weights.check([], architecture, "x")
    ours = {name for module in real_shapes(MODELS[architecture]) for name in names_of(module)}
    assert set(names) - ours <= {"base", "t5"}


def test_a_vector_is_read_in_its_order() -> None:
    vector = ["0.1", "4", "5", "7", "8", "0.5", "0", "1", "2", "3", "4", "5"]
    weights = BlockWeights.parse(",".join(vector), "subject_blocks")
    assert weights.text_encoder == 0.1
    assert weights.of("down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q") == 5
    assert weights.of("down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q") == 7
    assert weights.of("mid_block.attentions.0.proj_in") == 0.5
    assert weights.of("up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q") == 5
    assert weights.of("down_blocks.0.resnets.0.conv1") == 1
