"""Files of other models than SD and FLUX: named by themselves, by a model at hand, and never taken for FLUX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from klora.cache import ScoreCache
from klora.errors import LoraFileError, MismatchError
from klora.lora.file import LoraFile
from klora.lora.likeness import alike
from klora.lora.model_index import ModelIndex, Place, finest_slices, slice_name
from klora.lora.names import block_of, kind_of, sort_key
from klora.lora.side import Side
from klora.pair import Pair
from klora.report.overlap import overlap_of
from klora.report.summary import notices, summarise
from klora.settings import Settings
from tests.support.lora_files import FAMILIES, write_lora

WIDTH = 12


def write(path: Path, prefixes: dict[str, tuple[int, int]], kohya: bool = True, seed: int = 0, **metadata: str) -> Path:
    """A LoRA of rank 2 under these very prefixes, by (out, in)."""
    down, up = (".lora_down", ".lora_up") if kohya else (".lora_A", ".lora_B")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for prefix, (out, width) in prefixes.items():
        tensors[f"{prefix}{down}.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{prefix}{up}.weight"] = torch.randn(out, 2, generator=generator)
    save_file(tensors, path, metadata)
    return path


def square(*names: str) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(names, (WIDTH, WIDTH))


def test_one_name_that_flux_has_too_makes_no_flux_file(tmp_path: Path) -> None:
    names = square("transformer.proj_out", "transformer.blocks.0.attn1.to_q")
    file = LoraFile.open(write(tmp_path / "wan.safetensors", names, kohya=False))
    assert (file.architecture, file.table) == (None, None)
    assert set(file.modules) == {"blocks_0_attn1_to_q", "proj_out"}
    assert file.unmatched == []


@pytest.mark.parametrize(
    "names",
    [
        square("transformer.single_transformer_blocks.38.attn.to_q"),
        square("transformer.transformer_blocks.19.attn.to_q", "transformer.single_transformer_blocks.0.attn.to_q"),
        {"lora_unet_single_blocks_0_linear1": (9 * WIDTH, WIDTH)},
        {"lora_unet_double_blocks_0_img_mlp_0": (6 * WIDTH, WIDTH)},
        square("transformer.transformer_blocks.0.attn.to_q"),
    ],
    ids=["too many single blocks", "too many double blocks", "FLUX.2's linear1", "FLUX.2's MLP", "SD3's attention"],
)
def test_names_of_flux_in_sizes_that_it_has_not_are_of_another_model(tmp_path: Path, names: dict) -> None:
    assert LoraFile.open(write(tmp_path / "x.safetensors", names)).architecture is None


def test_a_file_that_says_it_is_of_another_model_is_not_flux(tmp_path: Path) -> None:
    names = square("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_single_blocks_0_modulation_lin")
    says = {"modelspec.architecture": "chroma/lora"}
    assert LoraFile.open(write(tmp_path / "flux.safetensors", names)).architecture == "FLUX"
    assert LoraFile.open(write(tmp_path / "chroma.safetensors", names, **says)).architecture is None
    says = {"modelspec.architecture": "FLUX-1-dev/lora"}
    assert LoraFile.open(write(tmp_path / "dev.safetensors", names, **says)).architecture == "FLUX"


@pytest.mark.parametrize(
    ("prefix", "shape"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q", (WIDTH, WIDTH)),
        ("double_blocks.0.img_attn.proj", (WIDTH, WIDTH)),
        ("transformer.transformer_blocks.0.attn.to_q", (3072, 3072)),
    ],
)
def test_single_blocks_original_names_or_the_width_alone_tell_flux(
    tmp_path: Path, prefix: str, shape: tuple[int, int]
) -> None:
    file = LoraFile.open(write(tmp_path / "x.safetensors", {prefix: shape}, kohya=False))
    assert (file.table, file.architecture) == ("flux", "FLUX")


def test_the_one_weight_of_flux_that_is_left_out_does_not_make_another_model(tmp_path: Path) -> None:
    names = square("lora_unet_single_blocks_0_linear2", "lora_unet_final_layer_adaLN_modulation_1")
    file = LoraFile.open(write(tmp_path / "x.safetensors", names))
    assert (list(file.modules), file.architecture) == (["single_transformer_blocks.0.proj_out"], "FLUX")
    assert {key.split(".")[0] for key in file.unmatched} == {"lora_unet_final_layer_adaLN_modulation_1"}


def test_names_of_flux_and_of_a_unet_in_one_file_are_of_neither(tmp_path: Path) -> None:
    names = square("lora_unet_single_blocks_0_linear2", "lora_unet_mid_block_attentions_0_proj_in")
    file = LoraFile.open(write(tmp_path / "x.safetensors", names))
    assert (file.table, file.architecture) == (None, None)


def test_two_spellings_of_an_unknown_model_meet_under_bare_names(tmp_path: Path) -> None:
    names = [f"layers.{i}.attention.{leaf}" for i in range(2) for leaf in ("to_q", "to_k")]
    names += ["layers.0.feed_forward.w1"]
    flat = write(tmp_path / "a.safetensors", square(*(f"lora_unet_{name.replace('.', '_')}" for name in names)))
    dotted = write(tmp_path / "b.safetensors", square(*(f"transformer.{name}" for name in names)), kohya=False, seed=1)
    pair = Pair.open(flat, dotted, ScoreCache(tmp_path / "cache"))
    plan = pair.plan(Settings(steps=4))
    assert {module.name for module in plan.contested} == {name.replace(".", "_") for name in names}
    assert "unknown architecture" in summarise(pair, plan, overlap_of(pair, plan))
    assert notices(pair, plan) == []
    assert len(pair.plan(Settings(steps=4, scope="attention")).contested) == 4


def test_one_stray_module_does_not_part_two_files_of_one_model(tmp_path: Path) -> None:
    names = ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in"]
    one = write(tmp_path / "a.safetensors", square(*(f"unet.{name}" for name in names), "unet.stray.0.to_q"))
    two = write(tmp_path / "b.safetensors", square(*(f"lora_unet_{name.replace('.', '_')}" for name in names)), seed=1)
    assert len(Pair.open(one, two, ScoreCache(tmp_path / "cache")).coverage.contested) == 2


def test_what_may_be_one_weight_in_two_spellings_is_pointed_out(tmp_path: Path) -> None:
    fused = {f"lora_unet_layers_{i}_attention_qkv": (3 * WIDTH, WIDTH) for i in range(2)}
    split = square(*(f"transformer.layers.{i}.attention.to_{part}" for i in range(2) for part in "qkv"))
    one = write(tmp_path / "a.safetensors", fused)
    two = write(tmp_path / "b.safetensors", split, kohya=False)
    pair = Pair.open(one, two, ScoreCache(tmp_path / "cache"))
    (_, notice) = notices(pair, pair.plan(Settings()))
    assert "layers_0_attention_qkv and layers_0_attention_to_k" in notice
    other = LoraFile.open(write(tmp_path / "c.safetensors", square("lora_unet_layers_0_feed_forward_w1")))
    assert alike(pair.subject.modules, other.modules) == []


HEIGHTS = {"one": 4, "fused": 12, "other": 5}


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        (("blocks_1_attn_qkv", "fused"), ("blocks_1_attn_to_k", "one"), True),
        (("blocks_1_attn_to_k", "one"), ("blocks_1_attn_qkv", "fused"), True),
        (("blocks_1_attn_q", "one"), ("blocks_1_attn_to_q", "one"), False),
        (("blocks_1_attn_q", "one"), ("layers_1_attn_q", "one"), True),
        (("blocks_1_attn_qkv", "fused"), ("layers_1_attn_to_q", "one"), True),
        (("blocks_1_attn_q", "one"), ("layers_1_attn_q", "other"), False),
        (("blocks_1_attn_q", "one"), ("blocks_2_attn_q", "one"), False),
        (("blocks_1_attn_qkv", "fused"), ("blocks_2_attn_to_q", "one"), False),
        (("blocks_1_attn_qkv", "fused"), ("blocks_1_mlp", "one"), False),
        (("embedder_in", "one"), ("embedder_out", "one"), True),
        (("embedder_in", "one"), ("embedder_out", "other"), False),
    ],
)
def test_alike_are_a_block_under_two_names_and_a_fused_weight_and_its_part(
    tmp_path: Path, ours: tuple[str, str], theirs: tuple[str, str], found: bool
) -> None:
    files = [
        LoraFile.open(write(tmp_path / f"{i}.safetensors", {f"lora_unet_{name}": (HEIGHTS[height], WIDTH)}))
        for i, (name, height) in enumerate((ours, theirs))
    ]
    assert alike(files[0].modules, files[1].modules) == ([(ours[0], theirs[0])] if found else [])


def test_what_both_files_name_alike_is_not_asked_about(tmp_path: Path) -> None:
    shared, fused = square("lora_unet_blocks_1_attn_q"), {"lora_unet_blocks_1_attn_qkv": (3 * WIDTH, WIDTH)}
    one = LoraFile.open(write(tmp_path / "a.safetensors", shared))
    two = LoraFile.open(write(tmp_path / "b.safetensors", {**shared, **fused}))
    assert alike(one.modules, two.modules) == alike(two.modules, one.modules) == []


def test_alike_is_of_one_width(tmp_path: Path) -> None:
    one = LoraFile.open(write(tmp_path / "a.safetensors", {"lora_unet_blocks_1_attn_q": (4, WIDTH)}))
    two = LoraFile.open(write(tmp_path / "b.safetensors", {"lora_unet_layers_1_attn_q": (4, WIDTH + 1)}))
    assert alike(one.modules, two.modules) == []


def test_alike_is_of_one_kind(tmp_path: Path) -> None:
    save_file(
        {
            "lora_unet_patch_in.lora_down.weight": torch.ones(2, 3, 2, 2),
            "lora_unet_patch_in.lora_up.weight": torch.ones(4, 2, 1, 1),
        },
        tmp_path / "a.safetensors",
    )
    one = LoraFile.open(tmp_path / "a.safetensors")
    two = LoraFile.open(write(tmp_path / "b.safetensors", {"lora_unet_stem_in": (4, 12)}))
    assert [delta.columns for file in (one, two) for delta in file.modules.values()] == [12, 12]
    assert alike(one.modules, two.modules) == []


def test_a_model_at_hand_names_the_modules_and_their_parts(tmp_path: Path) -> None:
    parts = [f"layers.0.attention.qkv[{i * WIDTH}:{(i + 1) * WIDTH}]" for i in range(3)]
    aliases = {"layers.0.attention.qkv": parts} | {
        f"transformer.layers.0.attention.to_{leaf}": [part] for leaf, part in zip("qkv", parts, strict=True)
    }
    model = ModelIndex(square(*parts, "layers.0.feed_forward.w1"), aliases)
    fused = {
        "lora_unet_layers_0_attention_qkv": (3 * WIDTH, WIDTH),
        "lora_unet_layers_0_feed_forward_w1": (WIDTH, WIDTH),
    }
    one = LoraFile.open(write(tmp_path / "a.safetensors", fused)).for_model(model)
    split = square(*(f"transformer.layers.0.attention.to_{part}" for part in "qkv"), "transformer.gone.0")
    two = LoraFile.open(write(tmp_path / "b.safetensors", split, kohya=False)).for_model(model)
    assert list(one.modules) == [*parts, "layers.0.feed_forward.w1"]
    assert set(two.modules) == {*parts, "gone_0"}
    whole = LoraFile.open(tmp_path / "a.safetensors").modules["layers_0_attention_qkv"].matrix()
    assert torch.equal(torch.cat([one.modules[part].matrix() for part in parts]), whole)
    assert one.for_model(model) is one
    too_high = {"lora_unet_layers_0_attention_qkv": (4 * WIDTH, WIDTH)}
    with pytest.raises(
        MismatchError,
        match="for an unknown architecture: its lora_unet_layers_0_attention_qkv is 48×12, in the model it has 36 rows",
    ):
        LoraFile.open(write(tmp_path / "c.safetensors", too_high)).for_model(model)


def test_the_parts_of_a_fused_weight_have_as_many_rows_as_the_model_says(tmp_path: Path) -> None:
    shapes = {"x.0.q": (8, WIDTH), "x.0.k": (4, WIDTH), "x.0.out": (5, WIDTH)}
    model = ModelIndex(shapes, {"x.0.qk": ["x.0.q", "x.0.k"]})
    prefixes = {"lora_unet_x_0_qk": (12, WIDTH), "lora_unet_x_0_out": (5, WIDTH)}
    file = LoraFile.open(write(tmp_path / "x.safetensors", prefixes))
    fused, out = file.modules["x_0_qk"].matrix(), file.modules["x_0_out"].matrix()
    found = file.for_model(model).modules
    assert found.keys() == {"x.0.q", "x.0.k", "x.0.out"}
    for name, rows in (("x.0.q", fused[:8]), ("x.0.k", fused[8:]), ("x.0.out", out)):
        assert torch.equal(found[name].matrix(), rows)


def test_what_a_model_calls_otherwise_is_found_by_both_names() -> None:
    for ours, theirs in (
        ("blocks.0.attn1.to_q", "blocks.0.self_attn.q"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("transformer_blocks.31.attn2.to_out.0", "blocks.31.cross_attn.output_proj"),
        ("patch_embed.proj", "x_embedder.proj.1"),
    ):
        for name, other in ((ours, theirs), (theirs, ours)):
            index = ModelIndex(square(name, "elsewhere"))
            for prefix in (f"diffusion_model.{other}", f"lora_unet_{other.replace('.', '_')}", name):
                assert index.find(prefix, (WIDTH, WIDTH)) == (Place(name),)
            assert index.find(f"{other}.more", (WIDTH, WIDTH)) is None


def test_a_rule_finds_what_the_model_has_and_only_all_parts_of_a_fused_weight() -> None:
    parts = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    fused, shape = "lora_unet_double_blocks_0_img_attn_qkv", (3 * WIDTH, WIDTH)
    places = tuple(Place(part, (i * WIDTH, (i + 1) * WIDTH)) for i, part in enumerate(parts))
    assert ModelIndex(square(*parts)).find(fused, shape) == places
    assert ModelIndex(square(*parts)).find(fused, (*shape, 3, 3)) == places
    assert ModelIndex(square(*parts[:2])).find(fused, shape) is None
    assert ModelIndex(square(*parts)).find("lora_unet_double_blocks_0_img_attn_proj", (WIDTH, WIDTH)) is None
    whole = "transformer_blocks.0.attn.to_out.0"
    assert ModelIndex(square(whole)).find("lora_unet_double_blocks_0_img_attn_proj", (WIDTH, WIDTH)) == (Place(whole),)
    with pytest.raises(ValueError, match="fused weight"):
        ModelIndex(square(*parts)).find(fused, (WIDTH, WIDTH))


def test_a_fused_weight_that_does_not_split_into_the_models_parts_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", square("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_other"))
    with pytest.raises(LoraFileError, match="does not fit the model") as error:
        LoraFile.open(path).for_model(ModelIndex(square(*(f"transformer_blocks.0.attn.to_{part}" for part in "qkv"))))
    assert (error.value.file, bool(error.value.cure)) == (str(path), True)


def test_only_what_a_model_does_not_name_is_translated() -> None:
    asked = []

    def translate(file: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Place, ...]]:
        asked.append(dict(file))
        return dict.fromkeys(file, (Place("b.0"),))

    index = ModelIndex(square("a.0", "b.0"), translate=translate)
    known, strange = square("lora_unet_a_0"), square("lora_unet_strange")
    assert index.locate(known) == {"lora_unet_a_0": (Place("a.0"),)}
    assert asked == []
    both = {**known, **strange}
    assert index.locate(both) == {"lora_unet_a_0": (Place("a.0"),), "lora_unet_strange": (Place("b.0"),)}
    assert asked == [both]
    assert ModelIndex(square("a.0")).locate(both) == {"lora_unet_a_0": (Place("a.0"),)}


def test_a_hosts_alias_may_tell_the_kind_of_one_weight_but_not_of_several() -> None:
    aliases = {"x.0.attn.to_q": ["x.0.linear1[0:4]"], "x.0.attn.fused": ["x.0.a", "x.0.b"], "x.0.ff": ["x.0.c"]}
    index = ModelIndex(square("x.0.linear1[0:4]", "x.0.a", "x.0.b", "x.0.c"), aliases, "FLUX")
    names = ("x.0.linear1[0:4]", "x.0.a", "x.0.c")
    assert [index.kind_of(name, (4, 4)) for name in names] == ["attention", "linear", "linear"]
    assert index.kind_of("x.0.c", (4, 4, 3, 3)) == "conv"
    assert index.architecture == "FLUX"


def test_a_t5_goes_by_the_models_own_count_of_its_text_encoders(tmp_path: Path) -> None:
    t5, clip = "encoder.block.0.layer.0.SelfAttention.q", "text_model.encoder.layers.0.mlp.fc1"
    names = square("lora_unet_x", f"lora_te3_{t5.replace('.', '_')}", f"lora_te1_{clip.replace('.', '_')}")
    file = LoraFile.open(write(tmp_path / "x.safetensors", names))
    assert list(file.text_encoder) == [f"text_encoder.{clip}", f"text_encoder_2.{t5}"]
    encoders = square(f"text_encoder.{clip}", f"text_encoder_2.{clip}", f"text_encoder_3.{t5}")
    bound = file.for_model(ModelIndex(square("x"), text_encoder=encoders))
    assert list(bound.text_encoder) == [f"text_encoder.{clip}", f"text_encoder_3.{t5}"]
    assert bound.modules.keys() == file.modules.keys()
    assert list(file.text_encoder) == [f"text_encoder.{clip}", f"text_encoder_2.{t5}"]


@pytest.mark.parametrize(
    ("prefix", "model"),
    [
        ("text_encoders.clip_g.transformer.", "text_encoder"),
        ("lora_te2_", "text_encoder"),
        ("lora_te_", "text_encoder_2"),
        ("text_encoders.clip_h.transformer.", "text_encoder_2"),
    ],
)
def test_the_only_clip_of_a_file_is_the_only_one_of_the_model(tmp_path: Path, prefix: str, model: str) -> None:
    clip = "text_model.encoder.layers.0.mlp.fc1"
    key = prefix + (clip.replace(".", "_") if prefix.endswith("_") else clip)
    file = LoraFile.open(write(tmp_path / "x.safetensors", square("lora_unet_x", key)))
    for encoders, found in (
        (square(f"{model}.{clip}"), [f"{model}.{clip}"]),
        ({f"{model}.{clip}": (9, 9)}, list(file.text_encoder)),
        (square(f"text_encoder.{clip}", f"text_encoder_2.{clip}"), list(file.text_encoder)),
    ):
        assert list(file.for_model(ModelIndex(square("x"), text_encoder=encoders)).text_encoder) == found


def test_of_two_clips_in_a_file_each_keeps_its_number(tmp_path: Path) -> None:
    clip = "text_model.encoder.layers.0.mlp.fc1"
    keys = (f"lora_te{number}_{clip.replace('.', '_')}" for number in (1, 2))
    file = LoraFile.open(write(tmp_path / "x.safetensors", square("lora_unet_x", *keys)))
    bound = file.for_model(ModelIndex(square("x"), text_encoder=square(f"text_encoder_2.{clip}")))
    assert list(bound.text_encoder) == [f"text_encoder.{clip}", f"text_encoder_2.{clip}"]


def test_a_module_of_the_diffusion_model_keeps_its_name_though_a_t5_has_one_of_that_path(tmp_path: Path) -> None:
    t5 = "encoder.block.0.layer.0.SelfAttention.q"
    file = LoraFile.open(write(tmp_path / "x.safetensors", square(f"lora_unet_x_{t5.replace('.', '_')}")))
    bound = file.for_model(ModelIndex(square(f"x.{t5}"), text_encoder=square(f"text_encoder_3.{t5}")))
    assert (list(bound.modules), list(bound.text_encoder)) == ([f"x.{t5}"], [])


def test_names_of_a_model_are_told_apart_from_those_of_the_file(tmp_path: Path) -> None:
    file = LoraFile.open(write(tmp_path / "x.safetensors", square("lora_unet_x_0")))
    assert file.naming == ""
    bound = file.for_model(ModelIndex(square("x.0")))
    assert bound.naming
    assert bound.naming != file.for_model(ModelIndex(square("x.0"), {"x_0": ["x.0"]})).bare().naming == ""
    assert file.naming == ""


def test_scores_under_the_names_of_a_model_do_not_disturb_those_of_the_file(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    file = LoraFile.open(write(tmp_path / "a.safetensors", {"lora_unet_x_0_qkv": (3 * WIDTH, WIDTH)}))
    parts = [f"x.0.qkv[{i * WIDTH}:{(i + 1) * WIDTH}]" for i in range(3)]
    bound = file.for_model(ModelIndex(square(*parts), {"x.0.qkv": parts}))
    cache = ScoreCache(tmp_path / "cache")
    first, cut = cache.scores(Side.alone(file)), cache.scores(Side.alone(bound))
    assert cache.scores(Side.alone(file)) == first != cut == cache.scores(Side.alone(bound))
    assert sum(score.l1 for score in cut.values()) == pytest.approx(first["x_0_qkv"].l1)
    assert len(recwarn) == 0


def test_slices_are_cut_as_finely_as_they_are_named_where_they_cover_the_weight() -> None:
    assert finest_slices(7, [(0, 1), (1, 2), (2, 3), (3, 7), (0, 3)]) == [(0, 1), (1, 2), (2, 3), (3, 7)]
    assert finest_slices(7, [(0, 3), (3, 6)]) == []
    assert finest_slices(6, [(0, 2), (4, 6)]) == []
    assert finest_slices(6, [(0, 3), (3, 6), (6, 9)]) == [(0, 3), (3, 6)]
    assert finest_slices(6, []) == []
    assert finest_slices(6, [(0, 3), (2, 2), (3, 6)]) == [(0, 3), (3, 6)]
    assert finest_slices(6, [(1, 3), (3, 6)]) == []


def test_rows_of_a_weight_have_a_name_of_their_own() -> None:
    assert slice_name("layers.0.attention.qkv", (64, 128)) == "layers.0.attention.qkv[64:128]"
    assert slice_name("layers.0.attention.out", None) == "layers.0.attention.out"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("layers.0.attention.qkv[0:64]", "attention"),
        ("layers_0_attention_to_q", "attention"),
        ("blocks.3.cross_attn.k_img", "attention"),
        ("double_blocks.0.img_attn.proj", "attention"),
        ("joint_transformer_blocks.0.attn.add_k_proj", "attention"),
        ("transformer_blocks.0.ff.conv_point", "conv"),
        ("layers.0.feed_forward.w1", "linear"),
        ("transformer_blocks.0.img_mlp.net.0.proj", "linear"),
        ("distilled_guidance_layer.in_proj", "linear"),
        ("down_blocks_1_attentions_0_proj_in", "linear"),
    ],
)
def test_the_kind_of_a_module_is_told_by_its_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_kernel_makes_a_convolution_whatever_its_name() -> None:
    assert kind_of("patch_embedding", (8, 4, 2, 2)) == "conv"
    assert kind_of("audio_embedding", (8, 4, 3)) == "conv"
    assert kind_of("patch_embedding", (8, 4)) == "linear"


def test_unknown_names_sort_by_stack_and_number_and_have_their_stack_for_a_block() -> None:
    names = ["layers_10_mlp", "layers_9_mlp", "context_refiner_0_mlp", "layers_9_attention_out"]
    assert sorted(names, key=sort_key) == [names[2], names[3], names[1], names[0]]
    assert [block_of(name) for name in names] == ["layers", "layers", "context_refiner", "layers"]


def test_an_underscore_before_lora_down_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    stem = "lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
    tensors = {}
    for leaf in ("to_k", "processor_to_q"):
        tensors[f"{stem}_{leaf}_lora_down.weight"] = torch.ones(2, WIDTH)
        tensors[f"{stem}_{leaf}_lora_up.weight"] = torch.ones(WIDTH, 2)
    tensors[f"{stem}_to_k.alpha"] = torch.tensor(1.0)
    tensors[f"{stem}_processor_to_q_lora_down.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    file = LoraFile.open(path)
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert {name: delta.scale for name, delta in file.modules.items()} == {f"{block}.to_q": 0.5, f"{block}.to_k": 0.5}
    assert (file.unmatched, file.table) == ([], "unet")


def test_layers_of_a_checkpoint_that_are_called_up_and_down_are_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    layers = {"blocks.0.mlp.up.weight": torch.ones(8, 4), "blocks.0.mlp.down.weight": torch.ones(4, 8)}
    save_file({**layers, "blocks.0.mlp.alpha": torch.tensor(1.0)}, path)
    with pytest.raises(LoraFileError, match="zero modules matched"):
        LoraFile.open(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_of_a_model_that_is_not_known(tmp_path: Path, family: str) -> None:
    file = LoraFile.open(write_lora(tmp_path / "x.safetensors", {"blocks.0.mlp": (8, 8)}, family=family))
    assert (list(file.modules), file.unmatched, file.table) == (["blocks_0_mlp"], [], None)


def test_a_file_of_a_text_encoder_alone_leaves_its_partner_its_names(tmp_path: Path) -> None:
    text = write(tmp_path / "a.safetensors", square("lora_te_text_model_encoder_layers_0_self_attn_q_proj"))
    unet = write(tmp_path / "b.safetensors", square("lora_unet_mid_block_attentions_0_proj_in"))
    pair = Pair.open(text, unet, ScoreCache(tmp_path / "cache"))
    assert list(pair.style.modules) == ["mid_block.attentions.0.proj_in"]
    assert pair.coverage.unmatched == []
