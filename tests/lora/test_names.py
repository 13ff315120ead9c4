"""Module names: every spelling of every module of the real models means that module, and no other."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.lora.names import (
    block_of,
    is_flux,
    kernel_of,
    kind_of,
    ldm_name,
    ldm_names,
    resolve,
    slice_of,
    slice_rows,
    sort_key,
    spellings,
)
from tests.support.lora_files import FLUX_SPELLINGS, UNET_SPELLINGS, fused_prefix
from tests.support.models import real_shapes

LAYER = "transformer_blocks.0"
CLIP = "text_model.encoder.layers"
T5 = "text_encoder_2.encoder.block"
UNETS = ("sd15", "sd21", "sdxl")
CASES = [(model, spelling) for model in UNETS for spelling in UNET_SPELLINGS]
CASES += [("flux", spelling) for spelling in FLUX_SPELLINGS]


def spelled(model: str, spelling: str) -> dict[str, str]:
    """Prefix of every module of a model that the spelling can name."""
    prefixes = {}
    for name in real_shapes(model):
        try:
            prefixes[name] = fused_prefix(name, spelling, 3 if model == "sdxl" else 4)
        except ValueError:
            assert spelling in ("flux-kohya", "generic", "xlabs")
    return prefixes


@pytest.mark.parametrize(("model", "spelling"), CASES)
def test_every_module_of_a_real_model_is_found_in_every_spelling(model: str, spelling: str) -> None:
    found: dict[str, set[str]] = {}
    for name, prefix in spelled(model, spelling).items():
        targets = resolve(prefix)
        assert targets, prefix
        found.setdefault(prefix, set()).update(target.name for target in targets)
        if not (spelling == "xlabs" and name.endswith("proj_mlp")):
            assert name in {target.name for target in targets}
    names = [name for group in found.values() for name in group]
    assert len(names) == len(set(names)), "two prefixes resolve to one module"
    assert set(names) <= set(real_shapes(model))


@pytest.mark.parametrize(
    ("model", "attention", "linear", "everything"),
    [("sd15", 128, 216, 282), ("sd21", 128, 216, 282), ("sdxl", 560, 743, 794), ("flux", 266, 504, 504)],
)
def test_the_real_models_have_the_known_numbers_of_modules(
    model: str, attention: int, linear: int, everything: int
) -> None:
    kinds = Counter(kind_of(name) for name in real_shapes(model))
    assert (kinds["attention"], kinds["attention"] + kinds["linear"], kinds.total()) == (attention, linear, everything)


def test_sdxl_has_722_linears_in_its_transformers_and_flux_494_in_its_blocks() -> None:
    assert sum(".attentions." in name for name in real_shapes("sdxl")) == 722
    assert sum("transformer_blocks." in name for name in real_shapes("flux")) == 494


@pytest.mark.parametrize("model", [*UNETS, "flux"])
def test_canonical_names_are_stable_and_round_trip_through_ldm(model: str) -> None:
    seen: dict[tuple[str, str | None], str] = {}
    for name, shape in real_shapes(model).items():
        (target,) = resolve(name) or ()
        assert (target.name, target.text_encoder, target.slice) == (name, False, slice_of(name))
        assert kernel_of(name) == (shape[2] if len(shape) == 4 else 1)
        assert is_flux(name) == (model == "flux")
        for path, part in ldm_names(name):
            back = {target.name: target.slice for target in resolve(path) or ()}
            assert back[name] == part
            assert seen.setdefault((path, part), name) == name
        if name != "norm_out.linear":
            assert ldm_names(name), name


@pytest.mark.parametrize(
    ("name", "ldm"),
    [
        (f"down_blocks.1.attentions.0.{LAYER}.attn1.to_q", f"input_blocks.4.1.{LAYER}.attn1.to_q"),
        (f"mid_block.attentions.0.{LAYER}.attn2.to_out.0", f"middle_block.1.{LAYER}.attn2.to_out.0"),
        ("up_blocks.1.attentions.2.proj_in", "output_blocks.5.1.proj_in"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("down_blocks.3.resnets.1.conv2", "input_blocks.11.0.out_layers.3"),
        ("up_blocks.3.resnets.0.conv_shortcut", "output_blocks.9.0.skip_connection"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
)
def test_the_block_arithmetic_gives_the_known_ldm_names(name: str, ldm: str) -> None:
    assert ldm_name(name) == (ldm, None)
    assert [target.name for target in resolve(ldm) or ()] == [name]
    assert [target.name for target in resolve("lora_unet_" + ldm.replace(".", "_")) or ()] == [name]


def test_the_first_upsampler_has_two_ldm_names_since_sd1_has_no_attention_before_it() -> None:
    paths = {path for path, _ in ldm_names("up_blocks.0.upsamplers.0.conv")}
    assert paths == {"output_blocks.2.1.conv", "output_blocks.2.2.conv"}


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.resnets.2.conv1",
        "down_blocks.0.attentions.2.proj_in",
        "mid_block.resnets.2.conv1",
        "mid_block.attentions.1.proj_in",
        "up_blocks.0.resnets.3.conv1",
        "up_blocks.0.attentions.3.proj_in",
        "mid_block.upsamplers.0.conv",
    ],
)
def test_what_no_unet_has_has_no_ldm_name(name: str) -> None:
    assert ldm_names(name) == ()


@pytest.mark.parametrize(
    "name", ["transformer_blocks.0.pos_proj", "single_transformer_blocks.0.ff.net.2", "norm_out.linear"]
)
def test_what_the_original_flux_has_not_has_no_ldm_name(name: str) -> None:
    assert is_flux(name)
    assert ldm_names(name) == ()
    assert slice_of(name) is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("transformer_blocks.0.attn.to_q", "q"),
        ("transformer_blocks.0.attn.add_v_proj", "v"),
        ("transformer_blocks.0.attn.to_out.0", None),
        ("transformer_blocks.0.ff.net.0.proj", None),
        ("single_transformer_blocks.0.attn.to_k", "k"),
        ("single_transformer_blocks.0.proj_mlp", "mlp"),
        ("single_transformer_blocks.0.proj_out", None),
        ("x_embedder", None),
        ("mid_block.attentions.0.proj_in", None),
    ],
)
def test_only_what_the_original_flux_stores_fused_is_a_slice(name: str, part: str | None) -> None:
    assert slice_of(name) == part


@pytest.mark.parametrize(
    ("part", "rows", "width", "found"),
    [("q", 3, 1, (0, 1)), ("v", 3, 1, (2, 3)), ("mlp", 4, 1, (3, 4)), ("v", 2, 1, None), ("mlp", 3, 1, None)],
)
def test_a_fused_weight_is_split_as_far_as_it_has_rows(
    part: str, rows: int, width: int, found: tuple[int, int] | None
) -> None:
    if found:
        assert slice_rows(part, rows, width) == found
        return
    with pytest.raises(ValueError, match=part):
        slice_rows(part, rows, width)


def test_fused_flux_weights_give_their_slices_in_the_order_of_their_rows() -> None:
    double = resolve("lora_unet_double_blocks_3_txt_attn_qkv") or ()
    assert [(t.name, t.slice, t.rows(36, 12)) for t in double] == [
        ("transformer_blocks.3.attn.add_q_proj", "q", (0, 12)),
        ("transformer_blocks.3.attn.add_k_proj", "k", (12, 24)),
        ("transformer_blocks.3.attn.add_v_proj", "v", (24, 36)),
    ]
    single = resolve("diffusion_model.single_blocks.37.linear1") or ()
    assert [(t.name.split("37.")[1], t.slice, t.rows(84, 12)) for t in single] == [
        ("attn.to_q", "q", (0, 12)),
        ("attn.to_k", "k", (12, 24)),
        ("attn.to_v", "v", (24, 36)),
        ("proj_mlp", "mlp", (36, 84)),
    ]
    with pytest.raises(ValueError, match="fused weight"):
        single[3].rows(36, 12)
    (split,) = resolve("transformer.single_transformer_blocks.37.attn.to_v") or ()
    assert (split.slice, split.rows(12, 12)) == ("v", (0, 12))


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", f"text_encoder.{CLIP}.0.self_attn.q_proj"),
        ("lora_te1_text_model_encoder_layers_11_mlp_fc1", f"text_encoder.{CLIP}.11.mlp.fc1"),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc2", f"text_encoder_2.{CLIP}.31.mlp.fc2"),
        ("lora_te2_text_projection", "text_encoder_2.text_projection"),
        (f"text_encoder.{CLIP}.3.self_attn.out_proj", f"text_encoder.{CLIP}.3.self_attn.out_proj"),
        ("text_encoder.encoder.layers.3.self_attn.out_proj", f"text_encoder.{CLIP}.3.self_attn.out_proj"),
        (f"text_encoder_2.{CLIP}.3.mlp.fc1", f"text_encoder_2.{CLIP}.3.mlp.fc1"),
        (f"text_encoder.{CLIP}.3.self_attn.to_q_lora", f"text_encoder.{CLIP}.3.self_attn.q_proj"),
        (f"text_encoder.{CLIP}.3.self_attn.to_out_lora", f"text_encoder.{CLIP}.3.self_attn.out_proj"),
        ("lora_te3_encoder_block_5_layer_0_SelfAttention_q", f"{T5}.5.layer.0.SelfAttention.q"),
        (f"{T5}.5.layer.1.DenseReluDense.wi_0", f"{T5}.5.layer.1.DenseReluDense.wi_0"),
        (f"text_encoders.clip_l.transformer.{CLIP}.3.mlp.fc1", f"text_encoder.{CLIP}.3.mlp.fc1"),
        (f"text_encoders.clip_g.transformer.{CLIP}.3.mlp.fc1", f"text_encoder_2.{CLIP}.3.mlp.fc1"),
        ("text_encoders.clip_g.transformer.text_projection", "text_encoder_2.text_projection"),
        ("text_encoders.t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.q", f"{T5}.5.layer.0.SelfAttention.q"),
        ("text_encoder_3.encoder.block.5.layer.0.SelfAttention.q", f"{T5}.5.layer.0.SelfAttention.q"),
    ],
)
def test_text_encoder_names(prefix: str, name: str) -> None:
    (target,) = resolve(prefix) or ()
    assert (target.name, target.text_encoder) == (name, True)
    assert [t.name for t in resolve(name) or ()] == [name]


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "unet",
        "lora_unet_",
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "diffusion_model.final_layer.adaLN_modulation.1",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q",
        "lora_unet_down_blocks_01_attentions_0_proj_in",
        "lora_unet_down_blocks_0_resnets_0_to_q",
        "lora_unet_down_blocks_0_downsamplers_0_transformer_blocks_0_conv",
        "input_blocks.3.0.in_layers.2",
        "blocks_0_img_mod_lin",
        "double_blocks.0.attn.to_q",
        "transformer_blocks.0.img_attn.qkv",
        "lora_te3_text_projection",
        f"lora_te3_{CLIP}.0.mlp.fc1",
        f"text_encoders.t5xxl.transformer.{CLIP}.0.mlp.fc1",
        f"text_encoder.{CLIP}.0.mlp.fc3",
        f"{T5}.5.layer.1.DenseReluDense.w",
        "lora_unet_down_blocks_0_resnets_0_transformer_blocks_0_conv1",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_proj_in",
        "input_blocks.0.1.proj_in",
        "input_blocks.0.0.op",
        "input_blocks.1.0.proj_in",
        "middle_block.1.conv1",
        "input_blocks.1.2.proj_in",
        "output_blocks.1.2.proj_in",
        "output_blocks.1.1.conv",
        "unet." * 5 + "conv_in",
        "unet." * 10**6,
        "transformer_blocks.0.attn.to_q\n",
        "down_blocks.٣.attentions.0.proj_in",
    ],
)
def test_other_names_are_not_matched(prefix: str) -> None:
    assert resolve(prefix) is None


@given(st.text(max_size=60))
def test_any_text_can_be_asked_for(text: str) -> None:
    for target in resolve(text) or ():
        assert resolve(target.name) is not None
    sort_key(text), kind_of(text), block_of(text), ldm_names(text), slice_of(text)


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("transformer.transformer_blocks.0.attn.to_out", "transformer_blocks.0.attn.to_out.0"),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out",
            f"mid_block.attentions.0.{LAYER}.attn2.to_out.0",
        ),
    ],
)
def test_the_output_of_attention_may_leave_its_number_out(prefix: str, name: str) -> None:
    assert [target.name for target in resolve(prefix) or ()] == [name]


def test_a_very_long_name_has_no_spelling() -> None:
    assert list(spellings("x" * 300)) == ["x" * 300]
    assert list(spellings("x" * 301)) == []


@pytest.mark.parametrize(
    ("model", "starts"),
    [
        ("sd15", ["time_embedding", "conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0"]),
        ("flux", ["time_text_embed", "transformer_blocks.2.", "transformer_blocks.10.", "single_transformer_blocks"]),
    ],
)
def test_names_sort_in_network_order(model: str, starts: list[str]) -> None:
    names = list(real_shapes(model))
    random.Random(0).shuffle(names)
    names.sort(key=sort_key)
    first = [next(i for i, name in enumerate(names) if name.startswith(start)) for start in starts]
    assert first == sorted(first)


def in_order(names: list[str]) -> bool:
    backwards = names[::-1]
    backwards.sort(key=sort_key)
    return backwards == names


def test_a_level_sorts_by_number_resnets_before_attention_samplers_last() -> None:
    resnet = ["conv1", "time_emb_proj", "conv2", "conv_shortcut"]
    block = [f"{at}.to_{leaf}" for at in ("attn1", "attn2") for leaf in ("q", "k", "v", "out.0")]
    block += ["ff.net.0.proj", "ff.net.2"]
    attention = ["proj_in", *(f"transformer_blocks.{i}.{leaf}" for i in (0, 1, 2, 10) for leaf in block), "proj_out"]
    names = [
        f"down_blocks.{level}.{what}.{number}.{leaf}"
        for level in (1, 2)
        for number in (0, 1)
        for what, leaves in (("resnets", resnet), ("attentions", attention))
        for leaf in leaves
    ]
    names.insert(len(names) // 2, "down_blocks.1.downsamplers.0.conv")
    assert in_order(names)


def test_text_encoders_sort_by_layer_and_part() -> None:
    assert in_order(
        [
            f"text_encoder.{CLIP}.2.mlp.fc1",
            f"text_encoder.{CLIP}.10.mlp.fc1",
            f"{T5}.2.layer.0.SelfAttention.q",
            f"{T5}.2.layer.1.DenseReluDense.wo",
            f"{T5}.10.layer.0.SelfAttention.q",
        ]
    )


def test_a_transformer_block_sorts_q_k_v_out_then_feed_forward() -> None:
    block = "mid_block.attentions.0.transformer_blocks.0"
    leaves = [n.removeprefix(f"{block}.") for n in sorted(real_shapes("sd15"), key=sort_key) if n.startswith(block)]
    qkv = ["to_q", "to_k", "to_v", "to_out.0"]
    assert leaves == [*(f"attn1.{x}" for x in qkv), *(f"attn2.{x}" for x in qkv), "ff.net.0.proj", "ff.net.2"]


def test_what_a_block_of_flux_has_not_sorts_before_what_it_has() -> None:
    # Models that share FLUX's blocks have more in them.
    leaves = ("pos_proj", "norm1.linear", "ff.net.2")
    names = [f"transformer_blocks.{block}.{leaf}" for block in (0, 1) for leaf in leaves]
    assert in_order(names)


def test_flux_kinds_follow_the_method() -> None:
    assert (
        kind_of("single_transformer_blocks.0.attn.to_v")
        == kind_of("transformer_blocks.0.attn.to_add_out")
        == "attention"
    )
    for name in ("single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_out", "x_embedder"):
        assert kind_of(name) == "linear"


def test_blocks_are_labelled_for_reports() -> None:
    labels = {block_of(name) for name in real_shapes("sdxl")}
    assert {"down_blocks.0", "mid_block", "up_blocks.2", "conv_in", "time_embedding"} <= labels
    assert {block_of(name) for name in real_shapes("flux")} > {"transformer_blocks", "single_transformer_blocks"}
