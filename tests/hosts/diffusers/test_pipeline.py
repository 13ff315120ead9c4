"""Fusing on real diffusers pipelines, small and random, with the real module names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import klora
from klora.errors import KloraError, LeftOutWarning, MismatchError, SettingsError
from klora.lora.file import LoraFile
from klora.lora.names import kind_of
from tests.support.lora_files import write_lora
from tests.support.models import module_shapes
from tests.support.pipelines import PIPELINES, run, scheduler

SUBJECT_ONLY = {"scale": "s", "alpha": 0, "beta": 0}
STYLE_ONLY = {"scale": "s", "alpha": 0, "beta": 1e9}
SPELLINGS = {"sd": ("kohya", "peft"), "sdxl": ("ldm", "diffusers"), "flux": ("flux-kohya", "peft")}


@pytest.fixture(params=list(PIPELINES))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(kind: str, tmp_path: Path) -> Any:
    return PIPELINES[kind](tmp_path / "tokenizer")


@pytest.fixture
def sd(tmp_path: Path) -> Any:
    return PIPELINES["sd"](tmp_path / "tokenizer")


def denoiser(pipe: Any) -> nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def attention_shapes(pipe: Any) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in module_shapes(denoiser(pipe)).items() if kind_of(name) == "attention"}


def block_shapes(pipe: Any) -> dict[str, tuple[int, ...]]:
    """What a kohya file of the pipeline's architecture holds: for FLUX all of a fused weight's slices."""
    shapes = module_shapes(denoiser(pipe))
    if "Flux" not in type(pipe).__name__:
        return attention_shapes(pipe)
    return {name: shape for name, shape in shapes.items() if "transformer_blocks" in name and "norm" not in name}


@pytest.fixture
def files(kind: str, pipe: Any, tmp_path: Path) -> tuple[Path, Path]:
    return pair_of_files(pipe, tmp_path, SPELLINGS[kind])


def pair_of_files(pipe: Any, folder: Path, spellings: tuple[str, str] = ("kohya", "peft")) -> tuple[Path, Path]:
    shapes = block_shapes(pipe)
    subject = write_lora(folder / "dog.safetensors", shapes, spelling=spellings[0], rank=4, seed=1, strength=0.3)
    style = write_lora(folder / "ink.safetensors", shapes, spelling=spellings[1], rank=8, seed=2, strength=0.3)
    return subject, style


def hooks(pipe: Any) -> int:
    """The number of hooks on all Linear and Conv modules and on the denoiser."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    modules = [m for part in parts for m in part.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in [*modules, denoiser(pipe)])


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in denoiser(pipe).state_dict().items()}


def same_weights(before: dict[str, torch.Tensor], pipe: Any) -> bool:
    after = denoiser(pipe).state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def merged(pipe: Any, *paths: Path) -> torch.Tensor:
    """The picture with files merged statically into the weights, which are restored."""
    model = denoiser(pipe)
    before = weights(pipe)
    with torch.no_grad():
        for path in paths:
            for name, delta in LoraFile.open(path).modules.items():
                weight = model.get_submodule(name).weight
                weight += delta.matrix().reshape(weight.shape)
    picture = run(pipe)
    model.load_state_dict(before)
    return picture


def assert_close(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() <= 1e-4 * two.abs().max()


def assert_differs(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() > 1e-3 * two.abs().max()


def test_a_forced_side_gives_the_picture_of_that_lora_merged(pipe: Any, files: tuple[Path, Path]) -> None:
    for settings, path in zip((SUBJECT_ONLY, STYLE_ONLY), files, strict=True):
        expected = merged(pipe, path)
        with klora.fuse(pipe, *files, **settings):
            fused = run(pipe)
        assert_close(fused, expected)
        assert_differs(fused, run(pipe))


def test_a_fusion_differs_from_both_sides_repeats_exactly_and_leaves_nothing(
    pipe: Any, files: tuple[Path, Path]
) -> None:
    plain, before = run(pipe), weights(pipe)
    with klora.fuse(pipe, *files) as session:
        first, second = run(pipe), run(pipe)
    assert torch.equal(first, second)
    assert 0 < session.plan.share < 1
    for other in (plain, merged(pipe, files[0]), merged(pipe, files[1]), merged(pipe, *files)):
        assert_differs(first, other)
    assert hooks(pipe) == 0
    assert same_weights(before, pipe)
    assert torch.equal(run(pipe), plain)


def test_the_scale_follows_the_architecture_of_the_model(kind: str, pipe: Any, files: tuple[Path, Path]) -> None:
    with klora.fuse(pipe, *files) as session:
        assert session.plan.settings.scale == ("s*" if kind == "flux" else "s")


def test_every_module_of_the_files_is_found_in_the_model(pipe: Any, files: tuple[Path, Path]) -> None:
    with klora.fuse(pipe, *files) as session:
        assert session.missing == ()
        assert len(session.plan.contested) == len(block_shapes(pipe))


def test_what_of_a_file_does_nothing_is_warned_of(sd: Any, tmp_path: Path) -> None:
    subject, style = pair_of_files(sd, tmp_path)
    tensors = load_file(subject) | {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(0, 16)}
    tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = torch.zeros(16, 0)
    with pytest.warns(LeftOutWarning) as caught, klora.fuse(sd, tensors, style):
        pass
    (told,) = (str(one.message) for one in caught)
    assert told.startswith("klora: subject (in memory) changes nothing in its modules of rank 0 (1), such as lora_unet")


def test_strength_multiplies_what_is_applied_and_not_what_is_selected(sd: Any, tmp_path: Path) -> None:
    files = pair_of_files(sd, tmp_path)
    with klora.fuse(sd, *files, subject_strength=0.5, **SUBJECT_ONLY):
        half = run(sd)
    shapes = block_shapes(sd)
    weaker = write_lora(tmp_path / "half.safetensors", shapes, spelling="kohya", rank=4, seed=1, strength=0.15)
    assert_close(half, merged(sd, weaker))
    assert klora.plan(*files, subject_strength=0.5).selections == klora.plan(*files).selections


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_whatever_ends_the_sampling_nothing_is_left(sd: Any, tmp_path: Path, ending: type[BaseException]) -> None:
    files, before, plain = pair_of_files(sd, tmp_path), weights(sd), run(sd)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if step == 1:
            raise ending("enough")
        return tensors

    with pytest.raises(ending), klora.fuse(sd, *files):
        run(sd, callback_on_step_end=stop)
    assert hooks(sd) == 0
    assert same_weights(before, sd)
    assert torch.equal(run(sd), plain)


def test_an_interrupted_run_leaves_the_next_one_as_it_was(sd: Any, tmp_path: Path) -> None:
    files = pair_of_files(sd, tmp_path)

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        pipe._interrupt = step >= 1
        return tensors

    with klora.fuse(sd, *files):
        whole = run(sd)
        run(sd, callback_on_step_end=interrupt)
        assert torch.equal(run(sd), whole)


def positions(pipe: Any, files: tuple[Path, Path], **options: Any) -> list[float]:
    """The τ of every call of the denoiser."""
    seen: list[float] = []
    with klora.fuse(pipe, *files, **options.pop("settings", {})) as session:
        # Registered after the session's own, so it sees what the session has set.
        handle = denoiser(pipe).register_forward_pre_hook(lambda *_: seen.append(session.tau))
        run(pipe, **options)
        handle.remove()
    return seen


FIRST_ORDER = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "LCMScheduler",
)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order_schedulers_step_through_tau(sd: Any, tmp_path: Path, name: str) -> None:
    sd.scheduler = scheduler(name)
    seen = positions(sd, pair_of_files(sd, tmp_path), num_inference_steps=6)
    assert seen == pytest.approx([i / 6 for i in range(6)])


def test_heun_calls_twice_at_the_next_noise_level(sd: Any, tmp_path: Path) -> None:
    sd.scheduler = scheduler("HeunDiscreteScheduler")
    seen = positions(sd, pair_of_files(sd, tmp_path), num_inference_steps=4)
    assert seen == pytest.approx([0, 1 / 4, 1 / 4, 2 / 4, 2 / 4, 3 / 4, 3 / 4])


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_midpoint_calls_lie_between_the_steps(sd: Any, tmp_path: Path, name: str) -> None:
    sd.scheduler = scheduler(name)
    seen = positions(sd, pair_of_files(sd, tmp_path), num_inference_steps=4)
    assert len(seen) == 7
    assert seen[::2] == pytest.approx([0, 1 / 4, 2 / 4, 3 / 4])
    assert all(i / 4 <= between <= (i + 1) / 4 for i, between in enumerate(seen[1::2]))


def test_the_plms_warm_up_repeats_a_level(sd: Any, tmp_path: Path) -> None:
    sd.scheduler = scheduler("PNDMScheduler", skip_prk_steps=True)
    seen = positions(sd, pair_of_files(sd, tmp_path), num_inference_steps=5)
    assert seen == pytest.approx([0, 1 / 5, 1 / 5, 2 / 5, 3 / 5, 4 / 5])


def test_flux_steps_through_tau_in_half_precision_too(tmp_path: Path) -> None:
    pipe = PIPELINES["flux"](tmp_path / "tokenizer")
    files = pair_of_files(pipe, tmp_path, SPELLINGS["flux"])
    assert positions(pipe, files, num_inference_steps=5) == pytest.approx([i / 5 for i in range(5)])
    pipe.to(torch.bfloat16)
    assert positions(pipe, files, num_inference_steps=20) == pytest.approx([i / 20 for i in range(20)])


@pytest.mark.parametrize(
    ("progress", "expected"), [("absolute", [0.6, 0.7, 0.8, 0.9]), ("relative", [0, 0.25, 0.5, 0.75])]
)
def test_image_to_image_starts_where_its_noise_lies(tmp_path: Path, progress: str, expected: list[float]) -> None:
    pipe = PIPELINES["sd"](tmp_path / "tokenizer", kind="StableDiffusionImg2ImgPipeline")
    files = pair_of_files(pipe, tmp_path)
    options = {"image": torch.zeros(1, 3, 32, 32), "strength": 0.4, "num_inference_steps": 10}
    assert positions(pipe, files, settings={"progress": progress}, **options) == pytest.approx(expected)


def test_image_to_image_works_on_sdxl_and_flux(tmp_path: Path) -> None:
    for kind, name in (("sdxl", "StableDiffusionXLImg2ImgPipeline"), ("flux", "FluxImg2ImgPipeline")):
        pipe = PIPELINES[kind](tmp_path / "tokenizer", kind=name)
        files = pair_of_files(pipe, tmp_path, SPELLINGS[kind])
        options = {"image": torch.zeros(1, 3, 32, 32), "strength": 0.5, "num_inference_steps": 8}
        if kind == "flux":
            options |= {"height": 32, "width": 32}
        assert positions(pipe, files, **options) == pytest.approx([0.5, 0.625, 0.75, 0.875])


def test_a_second_run_starts_at_the_beginning_again(sd: Any, tmp_path: Path) -> None:
    files = pair_of_files(sd, tmp_path)
    with klora.fuse(sd, *files) as session:
        run(sd, num_inference_steps=5)
        assert session.plan.steps == 5
        run(sd, num_inference_steps=3)
        assert session.plan.steps == 3


def test_loras_that_the_user_loaded_stay_in_effect(sd: Any, tmp_path: Path) -> None:
    files = pair_of_files(sd, tmp_path)
    other = write_lora(
        tmp_path / "other.safetensors", attention_shapes(sd), spelling="diffusers", rank=4, seed=3, strength=0.3
    )
    expected = merged(sd, files[0], other)
    sd.load_lora_weights(str(other))
    with_other = run(sd)
    with klora.fuse(sd, *files, **SUBJECT_ONLY):
        fused = run(sd)
    assert_close(fused, expected)
    assert torch.equal(run(sd), with_other)
    sd.unload_lora_weights()
    # And a LoRA that comes and goes while the fusion is on.
    with klora.fuse(sd, *files, **SUBJECT_ONLY):
        alone = run(sd)
        sd.load_lora_weights(str(other))
        assert_close(run(sd), expected)
        sd.unload_lora_weights()
        assert torch.equal(run(sd), alone)


def test_fused_projections_are_addressed_by_slice(tmp_path: Path) -> None:
    for kind in ("sd", "flux"):
        pipe = PIPELINES[kind](tmp_path / "tokenizer")
        files = pair_of_files(pipe, tmp_path, SPELLINGS[kind])
        with klora.fuse(pipe, *files):
            expected = run(pipe)
        pipe.unet.fuse_qkv_projections() if kind == "sd" else pipe.transformer.fuse_qkv_projections()
        with klora.fuse(pipe, *files) as session:
            assert session.missing == ()
            assert_close(run(pipe), expected)


def test_weights_offloaded_by_accelerate_are_found(sd: Any, tmp_path: Path) -> None:
    from accelerate import cpu_offload

    shapes = attention_shapes(sd)
    files = (
        write_lora(tmp_path / "dora.safetensors", shapes, spelling="kohya", family="dora", rank=4, seed=1),
        write_lora(tmp_path / "ink.safetensors", shapes, spelling="peft", rank=8, seed=2),
    )
    with klora.fuse(sd, *files, engine="bypass"):
        expected = run(sd)
    cpu_offload(sd.unet, execution_device=torch.device("cpu"))
    plain = run(sd)
    with klora.fuse(sd, *files, engine="bypass"):
        assert_close(run(sd), expected)
    assert torch.equal(run(sd), plain)


def text_shapes(pipe: Any) -> dict[str, tuple[int, ...]]:
    return {
        f"{part}.text_model.encoder.layers.{layer}.self_attn.{leaf}": (32, 32)
        for part in ("text_encoder", "text_encoder_2")
        if getattr(pipe, part, None) is not None and "T5" not in type(getattr(pipe, part)).__name__
        for layer in range(2)
        for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")
    }


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_text_encoder_parts_act_as_set(pipe: Any, tmp_path: Path) -> None:
    shapes = {**attention_shapes(pipe), **text_shapes(pipe)}
    files = (
        write_lora(tmp_path / "dog.safetensors", shapes, spelling="kohya", rank=4, seed=1, strength=0.15),
        write_lora(tmp_path / "ink.safetensors", shapes, spelling="peft", rank=4, seed=2, strength=0.15),
    )
    embeddings = {}
    for choice in ("both", "subject", "style", "none"):
        with klora.fuse(pipe, *files, text_encoder=choice):
            embeddings[choice] = pipe.encode_prompt(
                "a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )[0]
    plain = pipe.encode_prompt("a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    assert torch.equal(embeddings["none"], plain)
    with torch.no_grad():
        for path in files:
            for name, delta in LoraFile.open(path).text_encoder.items():
                part, _, module = name.partition(".")
                encoder = getattr(pipe, part)
                names = dict(encoder.named_modules())
                (names.get(module) or names[module.removeprefix("text_model.")]).weight += delta.matrix()
    both = pipe.encode_prompt("a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    assert torch.allclose(embeddings["both"], both, atol=1e-5)
    assert not torch.allclose(embeddings["subject"], embeddings["style"], atol=1e-3)
    assert hooks(pipe) == 0


def test_a_file_for_another_model_is_refused_before_anything_is_touched(sd: Any, tmp_path: Path) -> None:
    sdxl = PIPELINES["sdxl"](tmp_path / "tokenizer")
    files = pair_of_files(sdxl, tmp_path)
    with pytest.raises(MismatchError), klora.fuse(sd, *files):
        pass
    assert hooks(sd) == 0


def test_a_pipeline_without_denoiser_is_refused() -> None:
    with pytest.raises(KloraError, match="no UNet"), klora.fuse(object(), "a", "b"):
        pass


def test_a_bad_setting_is_refused(sd: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="balance"), klora.fuse(sd, *pair_of_files(sd, tmp_path), balance=9):
        pass


def test_a_fusion_may_be_entered_again_inside_itself(sd: Any, tmp_path: Path) -> None:
    files = pair_of_files(sd, tmp_path)
    with klora.fuse(sd, *files) as session:
        once = run(sd)
        with session:
            assert torch.equal(run(sd), once)
        assert torch.equal(run(sd), once)
        session.attach()
        assert torch.equal(run(sd), once)
    assert hooks(sd) == 0
    session.detach()
