"""Fusing on other models than SD and FLUX: names, progress and pictures of real diffusers classes, small and random."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import klora
from klora.engine.dynamic import BatchRows
from klora.errors import KloraError
from klora.hosts.diffusers.pipeline import TEXT_ENCODERS, DiffusersHost
from klora.lora.file import LoraFile
from tests.support.other_pipelines import OTHERS, make, make_latents
from tests.support.pipelines import clip_text_model, t5

SUBJECT_ONLY = {"scale": "s", "alpha": 0, "beta": 0}
STYLE_ONLY = {"scale": "s", "alpha": 0, "beta": 1e9}
RANK = 4
# A file's own key prefix and the endings of its tensors, as trainers write them.
SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "flat": (lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down", "lora_up"),
    "transformer": (lambda name: f"transformer.{name}", "lora_A", "lora_B"),
    "generic": (lambda name: f"diffusion_model.{name}", "lora_A", "lora_B"),
    "wrapper": (lambda name: f"base_model.model.{name}", "lora_A", "lora_B"),
    "lycoris": (lambda name: f"lycoris_{name.replace('.', '_')}", "lora_down", "lora_up"),
}


@pytest.fixture(params=list(OTHERS))
def made(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    return make(request.param)


def linears(pipe: Any) -> dict[str, nn.Linear]:
    return {name: module for name, module in pipe.transformer.named_modules() if isinstance(module, nn.Linear)}


def write_every_linear(path: Path, pipe: Any, spelling: str, seed: int) -> Path:
    """A LoRA on every linear layer, the same for one seed in every spelling."""
    prefix, down, up = SPELLINGS[spelling]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in linears(pipe).items():
        tensors[f"{prefix(name)}.{down}.weight"] = torch.randn(RANK, layer.in_features, generator=generator)
        tensors[f"{prefix(name)}.{up}.weight"] = 0.02 * torch.randn(layer.out_features, RANK, generator=generator)
    save_file(tensors, path)
    return path


def pair_of(pipe: Any, folder: Path, spellings: tuple[str, str] = ("flat", "transformer")) -> tuple[Path, Path]:
    subject = write_every_linear(folder / f"dog-{spellings[0]}.safetensors", pipe, spellings[0], seed=1)
    return subject, write_every_linear(folder / f"ink-{spellings[1]}.safetensors", pipe, spellings[1], seed=2)


def merged_by_hand(pipe: Any, options: dict[str, Any], path: Path, spelling: str) -> torch.Tensor:
    """The picture with W + up·down in the place of every W."""
    prefix, down, up = SPELLINGS[spelling]
    tensors, before = load_file(path), weights(pipe)
    with torch.no_grad():
        for name, layer in linears(pipe).items():
            layer.weight += tensors[f"{prefix(name)}.{up}.weight"] @ tensors[f"{prefix(name)}.{down}.weight"]
    picture = make_latents(pipe, options)
    pipe.transformer.load_state_dict(before)
    return picture


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def hooks(pipe: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules())


def assert_close(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() <= 1e-4 * two.abs().max()


def assert_differs(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() > 1e-3 * two.abs().max()


def test_a_forced_side_gives_the_picture_of_that_lora_merged_by_hand(made: Any, tmp_path: Path) -> None:
    pipe, options = made
    files = pair_of(pipe, tmp_path)
    plain = make_latents(pipe, options)
    for settings, path, spelling in zip((SUBJECT_ONLY, STYLE_ONLY), files, ("flat", "transformer"), strict=True):
        with klora.fuse(pipe, *files, **settings) as session:
            fused = make_latents(pipe, options)
        assert session.missing == ()
        assert {module.name for module in session.plan.contested} == linears(pipe).keys()
        assert_close(fused, merged_by_hand(pipe, options, path, spelling))
        assert_differs(fused, plain)


def test_the_place_in_sampling_is_that_of_the_scheduler_and_nothing_is_left(made: Any, tmp_path: Path) -> None:
    pipe, options = made
    files = pair_of(pipe, tmp_path)
    plain, before, seen = make_latents(pipe, options), weights(pipe), []
    with klora.fuse(pipe, *files) as session:
        handle = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(session.tau))
        first = make_latents(pipe, options, num_inference_steps=5)
        handle.remove()
        again = make_latents(pipe, options, num_inference_steps=5)
    assert list(dict.fromkeys(seen)) == pytest.approx([i / 5 for i in range(5)])
    assert sorted(seen) == seen
    assert torch.equal(first, again)
    assert hooks(pipe) == 0
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    assert torch.equal(make_latents(pipe, options), plain)


def test_every_spelling_of_the_names_gives_the_same_picture(made: Any, tmp_path: Path) -> None:
    pipe, options = made
    pictures, shares = [], []
    for spellings in (("flat", "transformer"), ("transformer", "generic"), ("wrapper", "lycoris")):
        with klora.fuse(pipe, *pair_of(pipe, tmp_path, spellings)) as session:
            pictures.append(make_latents(pipe, options))
            shares.append(session.plan.share)
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    assert len(set(shares)) == 1
    assert 0 < shares[0] < 1


def test_a_file_of_another_model_is_not_taken_for_flux(made: Any, tmp_path: Path) -> None:
    pipe, _ = made
    for spelling in SPELLINGS:
        file = LoraFile.open(write_every_linear(tmp_path / f"{spelling}.safetensors", pipe, spelling, seed=1))
        assert file.architecture is None
        assert file.unmatched == []
        assert len(file.modules) == len(linears(pipe))


ORIGINAL = {
    "wan": {
        "lora_unet_blocks_0_self_attn_q": ("blocks.0.attn1.to_q",),
        "lora_unet_blocks_0_cross_attn_o": ("blocks.0.attn2.to_out.0",),
        "lora_unet_blocks_1_ffn_2": ("blocks.1.ffn.net.2",),
    },
    "z_image": {
        "diffusion_model.layers.0.attention.to_q": ("layers.0.attention.to_q",),
        "diffusion_model.layers.0.attention.out": ("layers.0.attention.to_out.0",),
    },
    "flux2": {
        "diffusion_model.double_blocks.0.img_attn.qkv": tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"),
        "diffusion_model.double_blocks.1.txt_mlp.2": ("transformer_blocks.1.ff_context.linear_out",),
        "diffusion_model.single_blocks.1.linear1": ("single_transformer_blocks.1.attn.to_qkv_mlp_proj",),
    },
    "chroma": {
        "lora_unet_double_blocks_0_img_attn_qkv": tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"),
        "lora_unet_single_blocks_1_linear2": ("single_transformer_blocks.1.proj_out",),
    },
}


@pytest.mark.parametrize("name", list(ORIGINAL))
def test_names_of_the_original_code_are_those_that_the_pipelines_own_loader_makes_of_them(
    name: str, tmp_path: Path
) -> None:
    pipe, options = make(name)
    modules, tensors = linears(pipe), {}
    expected = {name: layer.weight.clone() for name, layer in modules.items()}
    for prefix, parts in ORIGINAL[name].items():
        down, up = ("lora_down", "lora_up") if prefix.startswith("lora_unet") else ("lora_A", "lora_B")
        height = sum(modules[part].out_features for part in parts)
        tensors[f"{prefix}.{down}.weight"] = torch.randn(RANK, modules[parts[0]].in_features)
        tensors[f"{prefix}.{up}.weight"] = 0.05 * torch.randn(height, RANK)
        delta = tensors[f"{prefix}.{up}.weight"] @ tensors[f"{prefix}.{down}.weight"]
        for part, rows in zip(parts, delta.chunk(len(parts)), strict=True):
            expected[part] += rows
    save_file(tensors, tmp_path / "dog.safetensors")
    style = write_every_linear(tmp_path / "ink.safetensors", pipe, "transformer", seed=2)
    with klora.fuse(pipe, tmp_path / "dog.safetensors", style, unpaired="drop", **SUBJECT_ONLY) as session:
        assert session.missing == ()
        assert {module.name for module in session.plan.contested} == {
            part for parts in ORIGINAL[name].values() for part in parts
        }
        fused = make_latents(pipe, options)
    pipe.transformer.load_state_dict({f"{name}.weight": weight for name, weight in expected.items()}, strict=False)
    assert_close(fused, make_latents(pipe, options))


@pytest.mark.parametrize(("name", "place"), [("chroma", "text_encoder"), ("sd3", "text_encoder_3")])
@pytest.mark.parametrize("prefix", ["lora_te3_", "text_encoder_3.", "text_encoders.t5xxl.transformer."])
def test_a_lora_of_the_t5_acts_in_the_t5_whichever_encoder_it_is(
    name: str, place: str, prefix: str, tmp_path: Path
) -> None:
    pipe, _ = make(name)
    encoders = {part: t5() if part == place else clip_text_model() for part in TEXT_ENCODERS if hasattr(pipe, part)}
    pipe.register_modules(**encoders)
    layers = {path: layer for path, layer in encoders[place].named_modules() if isinstance(layer, nn.Linear)}
    tensors, expected = {}, copy.deepcopy(encoders[place])
    for path, layer in layers.items():
        flat = path.replace(".", "_") if prefix.endswith("_") else path
        up, down = torch.randn(layer.out_features, RANK), torch.randn(RANK, layer.in_features)
        tensors |= {f"{prefix}{flat}.lora_up.weight": up, f"{prefix}{flat}.lora_down.weight": down}
        expected.get_submodule(path).weight.data += up @ down
    save_file(tensors, tmp_path / "dog.safetensors")
    style = write_every_linear(tmp_path / "ink.safetensors", pipe, "transformer", seed=2)
    words = torch.arange(6)[None]
    plain = encoders[place](words)[0]
    with klora.fuse(pipe, tmp_path / "dog.safetensors", style) as session, torch.no_grad():
        assert_close(encoders[place](words)[0], expected(words)[0])
        assert session.pair.coverage.text_encoder[0].startswith(f"{place}.encoder.block.0")
    assert torch.equal(encoders[place](words)[0], plain)


@pytest.mark.parametrize(
    ("name", "shape"), [("qwen_image", (1, 64, 16)), ("wan", (1, 4, 1, 4, 4)), ("flux2", (1, 64, 16))]
)
def test_latents_that_reference_guidance_cannot_decode_are_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    pipe, _ = make(name)
    with pytest.raises(KloraError, match=rf"{type(pipe).__name__}: its latents .* reference guidance cannot decode"):
        DiffusersHost(pipe).decode_latents(torch.zeros(shape), (8, 8))


@pytest.mark.parametrize("name", ["sd3", "lumina2", "sana"])
def test_latents_of_images_decode_for_reference_guidance(name: str) -> None:
    pipe, _ = make(name)
    assert DiffusersHost(pipe).decode_latents(torch.zeros(1, 4, 4, 4)).shape[:2] == (1, 3)


@pytest.mark.parametrize("policy", ["composite", "cm-lora", "dynamic"])
@pytest.mark.parametrize("name", ["z_image", "chroma", "sana"])
def test_policies_that_look_at_calls_take_lists_two_calls_and_one_batch(name: str, policy: str, tmp_path: Path) -> None:
    pipe, options = make(name)
    files = pair_of(pipe, tmp_path)
    with klora.fuse(pipe, *files, policy=policy):
        first, again = make_latents(pipe, options), make_latents(pipe, options)
    assert torch.equal(first, again)
    assert torch.isfinite(first).all()
    assert_differs(first, make_latents(pipe, options))
    assert hooks(pipe) == 0


@pytest.mark.parametrize(
    ("name", "rows"), [("z_image", BatchRows(0, 1, 2)), ("sana", BatchRows(1, 2, 2)), ("chroma", None), ("flux2", None)]
)
def test_the_rows_that_follow_the_prompt_are_found(name: str, rows: BatchRows | None) -> None:
    pipe, options = make(name)
    host, seen = DiffusersHost(pipe), []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(host.conditional_rows(args, kwargs)), with_kwargs=True
    )
    make_latents(pipe, options, num_inference_steps=1)
    handle.remove()
    assert seen[0] == rows


def test_a_pipeline_whose_time_is_not_its_schedulers_is_refused_by_name(tmp_path: Path) -> None:
    pipe, _ = make("aura_flow")
    files = pair_of(pipe, tmp_path)
    pipe.scheduler.set_timesteps(4)
    with klora.fuse(pipe, *files), pytest.raises(KloraError, match=r"AuraFlowPipeline .* timestep 0\.3141"):
        pipe.transformer(torch.zeros(1), torch.zeros(1), torch.tensor([0.3141]))
    assert hooks(pipe) == 0


def test_a_pipeline_with_two_transformers_is_refused() -> None:
    pipe, _ = make("wan")
    pipe.register_modules(transformer_2=pipe.transformer)
    with pytest.raises(KloraError, match="WanPipeline denoises with two transformers"):
        DiffusersHost(pipe)
