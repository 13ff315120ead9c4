"""Multipliers by block: the names that a module's block goes by, and LoRA Block Weight's vectors."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.errors import SettingsError
from klora.lora.blocks import PRESETS, VECTORS, BlockWeights, names_of
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


@given(st.lists(st.text(st.characters(exclude_characters=",:="), min_size=1).filter(str.strip)))
def test_blocks_at_1_change_no_module(names: list[str]) -> None:
    weights = BlockWeights.parse(", ".join(f"{name}: 1" for name in [*names, "up 1", "base"]), "subject_blocks")
    for module in ("up_blocks.1.resnets.0.conv1", "mid_block.attentions.0.proj_in", "text_encoder.text_projection"):
        assert weights.of(module) == 1


@pytest.mark.parametrize("count", VECTORS)
def test_vectors_have_as_many_names_as_values_and_reach_the_blocks_of_their_models(count: int) -> None:
    models, names = VECTORS[count]
    assert len(names) == count == len(set(names))
    weights = BlockWeights.parse(",".join(str(i) for i in range(count) if i <= 10) + ",1" * max(0, count - 11), "x")
    assert weights.models == models
    for model in models:
        weights.check([], model, "x")
    ours = {name for module in real_shapes(MODELS[models[0]]) for name in names_of(module)}
    assert set(names) - ours <= {"base", "t5"}


def test_a_vector_is_read_in_its_order_and_what_it_leaves_out_is_at_0() -> None:
    vector = ["0.1", "4", "5", "7", "8", "0.5", "0", "1", "2", "3", "4", "5"]
    weights = BlockWeights.parse(",".join(vector), "subject_blocks")
    assert weights.of("text_encoder_2.text_model.encoder.layers.0.mlp.fc1") == 0.1
    assert weights.of("down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q") == 5
    assert weights.of("down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q") == 7
    assert weights.of("mid_block.attentions.0.proj_in") == 0.5
    assert weights.of("up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q") == 5
    for module in ("conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv"):
        assert weights.of(module) == 0
    # Of no block there.
    assert weights.of("time_embedding.linear_1") == 1


def test_the_vector_of_flux_has_a_value_for_each_of_its_text_encoders() -> None:
    values = ["0.2", "0.3", "0.4", *["1"] * 57, "0.5"]
    weights = BlockWeights.parse(",".join(values), "subject_blocks")
    found = {
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": 0.2,
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": 0.3,
        "time_text_embed.guidance_embedder.linear_1": 0.4,
        "transformer_blocks.18.attn.to_q": 1,
        "proj_out": 0.5,
        "norm_out.linear": 0.5,
    }
    assert {module: weights.of(module) for module in found} == found


@pytest.mark.parametrize(("name", "values"), PRESETS.items())
def test_a_preset_is_the_vector_of_its_name(name: str, values: str | list[str]) -> None:
    vector = BlockWeights.parse(",".join(values), "subject_blocks")
    assert BlockWeights.parse(f" {name.lower()} ", "subject_blocks") == vector


@pytest.mark.parametrize(
    ("preset", "at_1"),
    [
        ("INS", "base in01 in02 in04"),
        ("MIDD", "base in05 in07 in08 m00 out03 out04 out05 out06"),
        ("OUTD", "base out03 out04 out05 out06"),
        ("OUTS", "base out07 out08 out09 out10 out11"),
    ],
)
def test_presets_act_in_the_blocks_that_their_names_say(preset: str, at_1: str) -> None:
    weights = dict(BlockWeights.parse(preset, "subject_blocks").weights)
    assert {name for name, weight in weights.items() if weight} == set(at_1.split())


@pytest.mark.parametrize("drawn", ["R", "U", "X", "X+0.5"])
def test_a_vector_with_numbers_that_are_not_in_it_is_refused_in_words(drawn: str) -> None:
    with pytest.raises(SettingsError, match=f"'{re.escape(drawn)}' stands for a number that is not in the vector"):
        BlockWeights.parse(",".join(["1"] * 16 + [drawn]), "subject_blocks")
