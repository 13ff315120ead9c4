"""Whole files: every spelling gives the same modules, alpha is honoured, files and models are compared."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from klora.errors import LoraFileError, LoraValueError, MismatchError, UnsupportedFormatError
from klora.lora.checks import check_model, check_partner
from klora.lora.coverage import coverage
from klora.lora.file import LoraFile
from klora.lora.names import sort_key
from tests.lora.hostile import refused
from tests.support.lora_files import FLUX_SPELLINGS, UNET_SPELLINGS, fused_prefix, lora_tensors, write_lora
from tests.support.models import real_shapes

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET = {
    f"{BLOCK}.attn1.to_q": (16, 16),
    f"{BLOCK}.attn1.to_out.0": (16, 16),
    f"{BLOCK}.attn2.to_k": (16, 24),
    f"{BLOCK}.ff.net.0.proj": (32, 16),
    "down_blocks.1.attentions.0.proj_in": (16, 16),
    "mid_block.resnets.0.conv1": (16, 16, 3, 3),
    "up_blocks.0.upsamplers.0.conv": (16, 16, 3, 3),
}
TEXT = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (16, 16),
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc1": (32, 16),
}
FLUX = {f"transformer_blocks.0.attn.to_{part}": (12, 12) for part in ("q", "k", "v", "out.0", "add_out")}
FLUX |= {f"transformer_blocks.0.attn.add_{part}_proj": (12, 12) for part in "qkv"}
FLUX |= {f"single_transformer_blocks.1.attn.to_{part}": (12, 12) for part in "qkv"}
FLUX_ALL = {**FLUX, "single_transformer_blocks.1.proj_mlp": (48, 12), "transformer_blocks.0.ff.net.0.proj": (48, 12)}


@pytest.mark.parametrize("spelling", UNET_SPELLINGS)
def test_every_spelling_gives_the_same_unet_modules(tmp_path: Path, spelling: str) -> None:
    shapes = {**UNET, **TEXT}
    file = LoraFile.open(write_lora(tmp_path / "x.safetensors", shapes, spelling, alpha=3.0))
    kohya = LoraFile.open(write_lora(tmp_path / "y.safetensors", shapes, "kohya", alpha=3.0))
    assert list(file.modules) == sorted(UNET, key=sort_key)
    assert set(file.text_encoder) == set(TEXT)
    assert file.unmatched == []
    for name, delta in (*file.modules.items(), *file.text_encoder.items()):
        assert delta.shape == shapes[name] if len(delta.shape) == 4 else shapes[name][:2]
        assert delta.key == fused_prefix(name, spelling)
        assert (delta.rank, delta.alpha, delta.scale) == (4, 3.0, 0.75)
        other = kohya.modules.get(name) or kohya.text_encoder[name]
        torch.testing.assert_close(delta.matrix(), other.matrix())


@pytest.mark.parametrize("spelling", FLUX_SPELLINGS)
def test_every_spelling_gives_the_same_flux_slices(tmp_path: Path, spelling: str) -> None:
    shapes = FLUX if spelling == "xlabs" else FLUX_ALL
    file = LoraFile.open(write_lora(tmp_path / "x.safetensors", shapes, spelling))
    assert list(file.modules) == sorted(shapes, key=sort_key)
    assert file.architecture == "FLUX"
    for name, delta in file.modules.items():
        assert delta.shape == shapes[name]
    split = LoraFile.open(write_lora(tmp_path / "y.safetensors", shapes, "peft"))
    check_partner(file, split)
    assert len(coverage(file, split).contested) == len(shapes)


def test_a_real_size_sdxl_file_opens_quickly_and_completely(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in real_shapes("sdxl").items() if ".attentions." in name}
    path = write_lora(tmp_path / "x.safetensors", shapes, rank=1, dtype=torch.float16, alpha=1.0, seed=5)
    times = []
    for _ in range(5):
        start = time.process_time()
        file = LoraFile.open(path)
        times.append(time.process_time() - start)
    assert len(file.modules) == 722
    assert {name: delta.shape for name, delta in file.modules.items()} == shapes
    assert file.architecture == "SDXL"
    assert min(times) < 0.5, times


def test_a_convolution_of_one_pixel_is_told_from_a_linear_layer_though_both_have_one_shape(tmp_path: Path) -> None:
    point = "down_blocks.1.attentions.0.proj_in"
    shapes = {f"{BLOCK}.attn1.to_q": (16, 16), point: (16, 16, 1, 1)}
    file = LoraFile.open(write_lora(tmp_path / "x.safetensors", shapes))
    assert {delta.shape for delta in file.modules.values()} == {(16, 16)}
    assert file.kernels == {file.modules[point].key}


def test_name_path_metadata_and_digest(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "my cat.safetensors", UNET, metadata={"ss_tag": "{}"})
    file = LoraFile.open(str(path))
    assert (file.name, file.path, file.metadata) == ("my cat", path, {"ss_tag": "{}"})
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert repr(file) == f"LoraFile({str(path)!r}, {len(UNET)} modules, None)"


def test_what_is_not_understood_is_reported_not_dropped(tmp_path: Path) -> None:
    prefix = "lora_unet_mid_block_resnets_0_conv1"
    extra = {
        "lora_unet_joint_blocks_0_x.lora_down.weight": torch.zeros(4, 8),
        "lora_unet_joint_blocks_0_x.alpha": torch.tensor(1.0),
        "bundle_emb.word.string_to_param": torch.zeros(2, 8, dtype=torch.int64),
        f"{prefix}.set_weight": torch.zeros(16, 16, 3, 3),
        f"{prefix}.diff": torch.zeros(16, 16, 3, 3),
        "lora_unet_mid_block_resnets_1_conv2.alpha": torch.tensor(4.0),
        f"{prefix}.lokr_w1": torch.zeros(2, 2),
        "lora_te_text_model_encoder_layers_0_other.lora_down.weight": torch.zeros(2, 8),
        "lora_te_text_model_encoder_layers_0_other.lora_up.weight": torch.zeros(8, 2),
    }
    path = tmp_path / "x.safetensors"
    save_file({**lora_tensors(UNET), **extra}, path)
    file = LoraFile.open(path)
    assert sorted(file.unmatched) == sorted(extra)
    assert len(file.modules) == len(UNET)


def test_two_prefixes_for_one_module_are_an_error_that_names_both(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for first, second in (("kohya", "peft"), ("ldm", "kohya"), ("peft", "peft-adapter")):
        save_file({**lora_tensors(UNET, first), **lora_tensors(UNET, second)}, path)
        error = refused(path)
        named = {fused_prefix(name, spelling) for name in UNET for spelling in (first, second)}
        assert any(str(error.key).startswith(prefix) for prefix in named)
        assert any(fused_prefix(name, first) in str(error) for name in UNET)
        assert any(fused_prefix(name, second) in str(error) for name in UNET)


# --- alpha -----------------------------------------------------------------------------------------------------------

Q, K = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k"


def scales(tmp_path: Path, config: object, alpha: float | None = None, text: str | None = None) -> dict[str, float]:
    metadata = {"lora_adapter_metadata": text if text is not None else json.dumps(config)}
    path = write_lora(tmp_path / "x.safetensors", {**UNET, **TEXT}, "peft", rank=4, alpha=alpha, metadata=metadata)
    file = LoraFile.open(path)
    return {name: delta.scale for name, delta in (*file.modules.items(), *file.text_encoder.items())}


def test_alpha_comes_from_peft_metadata(tmp_path: Path) -> None:
    found = scales(tmp_path, {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.lora_alpha": 2})
    assert found[Q] == 2.0
    assert found["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"] == 0.5
    assert found["text_encoder_2.text_model.encoder.layers.1.mlp.fc1"] == 1.0


def test_alpha_without_a_component_is_that_of_all(tmp_path: Path) -> None:
    assert set(scales(tmp_path, {"r": 4, "lora_alpha": 8}).values()) == {2.0}


def test_the_alpha_of_a_transformer_is_that_of_the_diffusion_model(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    file = LoraFile.open(write_lora(tmp_path / "x.safetensors", FLUX, "peft", rank=4, metadata=metadata))
    assert {delta.scale for delta in file.modules.values()} == {2.0}


def test_alpha_patterns_match_the_end_of_a_name_and_the_first_wins(tmp_path: Path) -> None:
    patterns = {"attn1.to_q": 2, r"^mid_block\..*conv1": 12, "to_q": 100, "o_k": 100}
    found = scales(tmp_path, {"unet.lora_alpha": 4, "unet.alpha_pattern": patterns})
    assert (found[Q], found[K], found["mid_block.resnets.0.conv1"]) == (0.5, 1.0, 3.0)


def test_a_pattern_that_begins_with_the_whole_path_is_that_module_alone(tmp_path: Path) -> None:
    # As diffusers writes them, hundreds of them.
    patterns = {"^" + Q.replace(".attn1", ".attn9"): 100, "^" + Q.split(".", 1)[1]: 100, "^" + Q: 2}
    patterns |= {f"^{name}": 6 for name in (K, *(f"nowhere.{i}" for i in range(300)))}
    patterns["mid_block\\.resnets"] = 100
    patterns["resnets\\.0\\.conv1"] = 12
    found = scales(tmp_path, {"unet.lora_alpha": 4, "unet.alpha_pattern": patterns})
    assert (found[Q], found[K], found["mid_block.resnets.0.conv1"]) == (0.5, 1.5, 3.0)


def test_what_no_pattern_matches_has_its_rank_where_there_is_no_other_alpha(tmp_path: Path) -> None:
    found = scales(tmp_path, {"unet.alpha_pattern": {"attn1.to_q": 2}})
    assert (found[Q], found[K]) == (0.5, 1.0)


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    assert scales(tmp_path, {"unet.lora_alpha": 8, "unet.use_rslora": True})[Q] == 4.0


def test_an_alpha_key_wins_over_the_metadata(tmp_path: Path) -> None:
    assert scales(tmp_path, {"unet.lora_alpha": 8, "unet.use_rslora": True}, alpha=2.0)[Q] == 0.5


@pytest.mark.parametrize(
    "patterns",
    [
        # 2 · 64² + 28 · 64 + 16 ways to try them: 10,000.
        [".*.*x", ".*.*y", *(f".*{i}" for i in range(28)), *(f"[a]{i}" for i in range(16))],
        [".*.*(x|y)"],
        [f"[a]{i}" for i in range(64)],
    ],
)
def test_patterns_that_are_quick_to_match_are_taken(tmp_path: Path, patterns: list[str]) -> None:
    assert scales(tmp_path, {"unet.lora_alpha": 8, "unet.alpha_pattern": dict.fromkeys(patterns, 1)})[Q] == 2.0


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"unet.lora_alpha": "8"},
        {"unet.lora_alpha": True},
        {"unet.lora_alpha": float("nan")},
        {"unet.alpha_pattern": [1]},
        {"unet.alpha_pattern": {"(a+)+b": 1}},
        {"unet.alpha_pattern": {".*.*.*x": 1}},
        {"unet.alpha_pattern": {"[": 1}},
        {"unet.alpha_pattern": {f"[a]x{i}": 1 for i in range(65)}},
        {"unet.alpha_pattern": {"(.|.)" * 38 + "X": 1}},
        {"unet.alpha_pattern": {".*.*x": 1, ".*.*y": 1, ".*.*z": 1}},
        {"unet.lora_alpha": 10**400},
        {"unet.alpha_pattern": {"to_q": "2"}},
    ],
)
def test_peft_metadata_that_makes_no_sense_is_a_typed_error(tmp_path: Path, config: object) -> None:
    with pytest.raises(LoraFileError, match=r"x.safetensors: lora_adapter_metadata: .*; save the file again") as error:
        scales(tmp_path, config)
    assert error.value.reason


def test_a_number_may_be_the_largest_there_is(tmp_path: Path) -> None:
    assert scales(tmp_path, {"unet.alpha_pattern": {"nowhere": sys.float_info.max}})[Q] == 1.0


def test_peft_metadata_that_is_not_json_is_a_typed_error(tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000, "[" + "1," * 600_000 + "1]"):
        with pytest.raises(LoraFileError, match="lora_adapter_metadata"):
            scales(tmp_path, None, text=text)


def test_peft_metadata_may_be_as_long_as_the_limit_and_no_longer(tmp_path: Path) -> None:
    text = json.dumps({"unet.lora_alpha": 8})
    assert scales(tmp_path, None, text=text.ljust(2**20))[Q] == 2.0
    with pytest.raises(LoraFileError, match="lora_adapter_metadata"):
        scales(tmp_path, None, text=text.ljust(2**20 + 1))


def test_a_file_saved_by_diffusers_loads_with_its_alpha(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "conv1"],
        init_lora_weights=False,
        rank_pattern={name: 2},
        alpha_pattern={name: 5},
    )
    unet.add_adapter(config)
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config.to_dict()
    )
    file = LoraFile.open(tmp_path / "pytorch_lora_weights.safetensors")
    assert file.unmatched == []
    targets = {key.split(".lora_A")[0] for key, _ in unet.named_parameters() if ".lora_A" in key}
    assert set(file.modules) == targets
    assert (file.modules[name].rank, file.modules[name].scale) == (2, 2.5)
    base = {key: unet.get_submodule(key).get_base_layer().weight.clone() for key in targets}
    unet.fuse_lora()
    for key, delta in file.modules.items():
        merged = unet.get_submodule(key).get_base_layer().weight.detach()
        torch.testing.assert_close(
            delta.matrix(), (merged - base[key]).detach().view(delta.shape), rtol=1e-4, atol=1e-5
        )


# --- architecture and partners ---------------------------------------------------------------------------------------


def attention(model: str, part: str = "") -> dict[str, tuple[int, ...]]:
    names = [name for name in real_shapes(model) if part in name and ("attn" in name or model == "flux")]
    return {name: real_shapes(model)[name] for name in names[:30]}


@pytest.mark.parametrize(
    ("model", "part", "architecture"),
    [
        ("sd15", "attn2", "SD1"),
        ("sd21", "attn2", "SD2"),
        ("sdxl", "attn2", "SDXL"),
        ("sdxl", "attn1", "SDXL"),
        ("sd15", "attn1", None),
        ("flux", "", "FLUX"),
    ],
)
def test_the_architecture_is_read_from_widths_and_names(
    tmp_path: Path, model: str, part: str, architecture: str | None
) -> None:
    spelling = "peft" if model == "flux" else "kohya"
    file = LoraFile.open(write_lora(tmp_path / "x.safetensors", attention(model, part), spelling, rank=1))
    assert file.architecture == architecture


@pytest.mark.parametrize(
    ("leaf", "shape", "architecture"),
    [
        ("0.attn2.to_k", (320, 768), "SD1"),
        ("0.attn2.to_v", (320, 768), "SD1"),
        ("0.attn2.to_v", (320, 700), None),
        ("1.ff.net.2", (640, 2560), "SDXL"),
        ("1.attn1.to_q", (640, 640), "SDXL"),
        ("1.attn1.to_q", (1280, 1280), "SDXL"),
        ("1.attn1.to_q", (320, 320), None),
        ("0.attn1.to_q", (640, 640), None),
    ],
)
def test_one_module_may_tell_the_architecture(
    tmp_path: Path, leaf: str, shape: tuple[int, int], architecture: str | None
) -> None:
    name = f"mid_block.attentions.0.transformer_blocks.{leaf}"
    assert LoraFile.open(write_lora(tmp_path / "x.safetensors", {name: shape}, rank=1)).architecture == architecture


def test_a_tiny_models_file_has_no_known_architecture(tmp_path: Path) -> None:
    assert LoraFile.open(write_lora(tmp_path / "x.safetensors", UNET)).architecture is None


@pytest.mark.parametrize(("one", "two"), [("sd15", "sdxl"), ("sd15", "sd21"), ("sdxl", "flux")])
def test_partners_for_different_models_are_refused_saying_which_is_which(tmp_path: Path, one: str, two: str) -> None:
    labels = {"sd15": "SD1", "sd21": "SD2", "sdxl": "SDXL", "flux": "FLUX"}
    files = [LoraFile.open(write_lora(tmp_path / f"{m}.safetensors", attention(m), "peft", rank=1)) for m in (one, two)]
    with pytest.raises(
        MismatchError, match=rf"{one}.safetensors is for {labels[one]} and .*{two}.* is for {labels[two]}"
    ):
        check_partner(*files)


def test_text_encoders_of_partners_are_compared_too(tmp_path: Path) -> None:
    name = next(iter(TEXT))
    one = LoraFile.open(write_lora(tmp_path / "one.safetensors", {**UNET, **TEXT}))
    two = LoraFile.open(write_lora(tmp_path / "two.safetensors", {**UNET, **TEXT, name: (16, 20)}))
    with pytest.raises(MismatchError, match=rf"has {name} as 16×16, .* as 16×20; choose two"):
        check_partner(one, two)
    check_partner(one, LoraFile.open(write_lora(tmp_path / "three.safetensors", {**UNET, **TEXT}, "peft")))


def test_partners_of_unknown_architecture_are_compared_by_shape(tmp_path: Path) -> None:
    one = LoraFile.open(write_lora(tmp_path / "one.safetensors", UNET))
    two = LoraFile.open(write_lora(tmp_path / "two.safetensors", {**UNET, K: (16, 20)}))
    with pytest.raises(MismatchError, match=r"one.safetensors .* 16×24, .*two.safetensors .* 16×20;"):
        check_partner(one, two)
    flux = LoraFile.open(write_lora(tmp_path / "flux.safetensors", FLUX, "xlabs"))
    with pytest.raises(MismatchError, match=r"is for an unknown UNet and .*flux.safetensors is for FLUX"):
        check_partner(one, flux)
    check_partner(one, LoraFile.open(write_lora(tmp_path / "three.safetensors", UNET, "ldm", family="loha", rank=2)))


def test_a_file_of_a_text_encoder_alone_goes_with_any_partner_and_model(tmp_path: Path) -> None:
    text = LoraFile.open(write_lora(tmp_path / "text.safetensors", TEXT))
    flux = LoraFile.open(write_lora(tmp_path / "flux.safetensors", FLUX, "peft"))
    check_partner(text, flux)
    check_partner(flux, text)
    check_model(text, real_shapes("flux"), "FLUX.1")


def test_text_encoders_are_covered_in_the_order_of_their_layers(tmp_path: Path) -> None:
    names = [f"text_encoder.text_model.encoder.layers.{layer}.mlp.fc1" for layer in (2, 10)]
    one = LoraFile.open(write_lora(tmp_path / "one.safetensors", {**UNET, names[1]: (16, 16)}))
    two = LoraFile.open(write_lora(tmp_path / "two.safetensors", {**UNET, names[0]: (16, 16)}))
    assert coverage(one, two).text_encoder == names


@pytest.mark.parametrize("name", [Q, next(iter(TEXT))])
def test_a_whole_file_is_looked_at_for_nan(tmp_path: Path, name: str) -> None:
    tensors = lora_tensors({**UNET, **TEXT})
    key = next(key for key in tensors if key.startswith(fused_prefix(name, "kohya")) and "lora_up" in key)
    tensors[key][0] = torch.nan
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(LoraValueError) as error:
        LoraFile.open(tmp_path / "x.safetensors").check_finite()
    assert error.value.key == key


def test_coverage_sorts_modules_into_contested_and_single(tmp_path: Path) -> None:
    names = list(UNET)
    one = LoraFile.open(write_lora(tmp_path / "one.safetensors", {n: UNET[n] for n in names[:5]} | TEXT))
    two = LoraFile.open(write_lora(tmp_path / "two.safetensors", {n: UNET[n] for n in names[3:]}, "peft"))
    report = coverage(one, two)
    assert (set(report.subject_only), set(report.contested), set(report.style_only)) == (
        set(names[:3]),
        set(names[3:5]),
        set(names[5:]),
    )
    assert report.text_encoder == list(TEXT)
    assert report.unmatched == []


def test_a_file_is_checked_against_a_model(tmp_path: Path) -> None:
    file = LoraFile.open(write_lora(tmp_path / "cat.safetensors", attention("sd15"), rank=1))
    check_model(file, real_shapes("sd15"), "SD 1.5")
    with pytest.raises(MismatchError, match=r"cat.safetensors is for SD1: .* 640×768, in SDXL base it is 640×2048;"):
        check_model(file, real_shapes("sdxl"), "SDXL base")
    words = r"cat.safetensors is for SD1: zero modules matched in FLUX.1, which has no down_blocks"
    with pytest.raises(MismatchError, match=words):
        check_model(file, real_shapes("flux"), "FLUX.1")
    point = LoraFile.open(write_lora(tmp_path / "p.safetensors", {"down_blocks.1.attentions.0.proj_in": (640, 640)}))
    check_model(point, {"down_blocks.1.attentions.0.proj_in": (640, 640, 1, 1)}, "SD 1.5")


@pytest.mark.parametrize(
    ("leaf", "rows"),
    [("double_blocks_0_img_attn_qkv", 30), ("double_blocks_0_img_attn_qkv", 40), ("single_blocks_0_linear1", 36)],
)
def test_a_fused_weight_of_the_wrong_height_is_refused(tmp_path: Path, leaf: str, rows: int) -> None:
    path = tmp_path / "x.safetensors"
    factors = {"lora_down.weight": torch.zeros(2, 12), "lora_up.weight": torch.zeros(rows, 2)}
    save_file({f"lora_unet_{leaf}.{key}": tensor for key, tensor in factors.items()}, path)
    assert f"lora_unet_{leaf}: is {rows}×12, which cannot be split" in str(refused(path))


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        ({"oft_blocks": (2, 4, 4)}, "OFT"),
        ({"oft_diag": (2, 4, 4)}, "OFT"),
        ({"oft_R.weight": (2, 4)}, "OFT"),
        ({"oft_blocks": (2, 2, 4, 4)}, "BOFT"),
        ({"boft_R": (2, 4, 4), "boft_s": (4, 1)}, "BOFT"),
        ({"a1.weight": (4, 16), "a2.weight": (16, 4), "b1.weight": (4, 16), "b2.weight": (16, 4)}, "GLoRA"),
        ({"weight": (16,), "on_input": ()}, "IA3"),
        ({"ia3_l": (1, 16)}, "IA3"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path: Path, keys: dict[str, tuple[int, ...]], family: str) -> None:
    tensors = {f"lora_unet_mid_block_attentions_0_proj_in.{key}": torch.zeros(shape) for key, shape in keys.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedFormatError, match=rf"x.safetensors: lora_unet_mid.*: is of the {family} family;"):
        LoraFile.open(tmp_path / "x.safetensors")
