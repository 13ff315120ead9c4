"""Reference guidance on real pipelines, with tiny random CLIP and ViT models of the real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import klora
from klora.errors import SettingsError
from klora.hosts.diffusers import DiffusersHost
from klora.hosts.diffusers.guidance import x0_coefficients
from klora.hosts.guidance import encode_square, make_guidance, read_images
from klora.settings import Settings
from klora.vision import load_clip
from tests.hosts.diffusers.test_pipeline import SPELLINGS, hooks, pair_of_files
from tests.support.pipelines import SMALLER, run, scheduler

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    clip = CLIPVisionConfig(**VISION, image_size=32, patch_size=8, projection_dim=12)
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    ViTModel(ViTConfig(**VISION, image_size=32, patch_size=8)).save_pretrained(folder / "dino")
    return {"clip_model": str(folder / "clip"), "dino_model": str(folder / "dino")}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("references")
    (folder / "style").mkdir()
    Image.new("RGB", (40, 56), "red").save(folder / "style" / "a.png")
    Image.linear_gradient("L").convert("RGB").save(folder / "style" / "b.jpg")
    Image.new("RGB", (32, 32), "blue").save(folder / "dog.png")
    return {"style_refs": str(folder / "style"), "subject_refs": str(folder / "dog.png")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Path]]:
    found = {}
    for kind in ("sd", "flux"):
        folder = tmp_path_factory.mktemp(kind)
        pipe = SMALLER[kind](folder / "tokenizer")
        found[kind] = (pipe, *pair_of_files(pipe, folder, SPELLINGS[kind]))
    return found


def fused(pipe: Any, subject: Path, style: Path, **settings: Any) -> torch.Tensor:
    with klora.fuse(pipe, subject, style, policy="dynamic", **settings):
        return run(pipe)


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_references_change_the_picture_and_nothing_is_left(
    made: dict, kind: str, models: dict[str, str], references: dict[str, str]
) -> None:
    pipe, subject, style = made[kind]
    plain, without = run(pipe), fused(pipe, subject, style, **models)
    with_refs = fused(pipe, subject, style, **models, **references)
    assert torch.isfinite(with_refs).all()
    assert not torch.equal(with_refs, without)
    assert torch.equal(fused(pipe, subject, style, **models, **references), with_refs)
    assert "step" not in vars(pipe.scheduler)
    assert hooks(pipe) == 0
    assert torch.equal(run(pipe), plain)
    assert all(parameter.grad is None for parameter in pipe.vae.parameters())


def test_each_kind_of_reference_counts(made: dict, models: dict[str, str], references: dict[str, str]) -> None:
    pipe, subject, style = made["sd"]
    found = [
        fused(pipe, subject, style, **models, **{name: references[name]}) for name in ("style_refs", "subject_refs")
    ]
    assert not torch.equal(*found)
    without = fused(pipe, subject, style)
    assert torch.equal(fused(pipe, subject, style, **models, **references, refine_step=0), without)
    assert torch.equal(fused(pipe, subject, style, **models, **references, style_pull=0, subject_pull=0), without)
    # Four steps, at 0, 0.25, 0.5 and 0.75: none of them in the window.
    outside = fused(pipe, subject, style, **models, **references, refine_from=0.3, refine_to=0.4)
    assert torch.equal(outside, without)


def test_pictures_come_nearer_to_their_references(
    made: dict, models: dict[str, str], references: dict[str, str]
) -> None:
    pipe, subject, style = made["sd"]
    host = DiffusersHost(pipe)
    settings = Settings(policy="dynamic", **models, **references)
    goals = make_guidance(settings, "cpu").goals

    def loss(latents: torch.Tensor) -> float:
        with torch.no_grad():
            return float(sum(goal.loss(host.decode_latents(latents)).sum() for goal in goals))

    without = fused(pipe, subject, style)
    guided = fused(pipe, subject, style, **models, **references, refine_from=0, refine_to=1, refine_step=2)
    assert loss(guided) < loss(without)


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DDPMScheduler",
        "EulerAncestralDiscreteScheduler",
    ],
)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_x0_is_what_the_scheduler_itself_predicts(name: str, kind: str) -> None:
    made = scheduler(name, prediction_type=kind)
    made.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    timestep = made.timesteps[3]
    alpha = made.alphas_cumprod[int(timestep)]
    if name.startswith(("Euler", "Heun")):
        sigma = made.sigmas[3]
        x, alpha = x0 + sigma * noise, 1 / (sigma**2 + 1)
    elif hasattr(made, "sigmas"):
        alpha = 1 / (made.sigmas[3] ** 2 + 1)
        x = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
    else:
        x = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
    output = noise if kind == "epsilon" else alpha**0.5 * noise - (1 - alpha) ** 0.5 * x0
    a, b = x0_coefficients(made, timestep)
    assert torch.allclose(a * x + b * output, x0, atol=2e-3)


def test_x0_of_a_flow() -> None:
    import diffusers

    made = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    made.set_timesteps(10)
    x0, noise, sigma = torch.randn(1, 4), torch.randn(1, 4), made.sigmas[4]
    a, b = x0_coefficients(made, made.timesteps[4])
    assert torch.allclose(a * ((1 - sigma) * x0 + sigma * noise) + b * (noise - x0), x0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_other_schedulers_work(made: dict, models: dict[str, str], references: dict[str, str], name: str) -> None:
    pipe, subject, style = made["sd"]
    before = pipe.scheduler
    pipe.scheduler = scheduler(name)
    try:
        assert torch.isfinite(fused(pipe, subject, style, **models, **references)).all()
        assert "step" not in vars(pipe.scheduler)
    finally:
        pipe.scheduler = before


def test_an_interrupt_leaves_nothing(made: dict, models: dict[str, str], references: dict[str, str]) -> None:
    pipe, subject, style = made["sd"]

    def interrupt(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        klora.fuse(pipe, subject, style, policy="dynamic", **models, **references),
    ):
        run(pipe, callback_on_step_end=interrupt)
    assert "step" not in vars(pipe.scheduler)
    assert hooks(pipe) == 0


def test_without_references_no_model_is_asked_for(made: dict) -> None:
    assert make_guidance(Settings(policy="dynamic", clip_model="/nowhere"), "cpu") is None
    assert make_guidance(Settings(policy="k-lora", style_refs="/nowhere"), "cpu") is None


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"clip_model": "/no/such/folder"}, "clip_model"),
        ({"dino_model": "no such/model"}, "dino_model"),
        ({"style_refs": "/no/such/picture.png"}, "style_refs"),
        ({"subject_refs": "{empty}"}, "subject_refs"),
        ({"subject_refs": "{text}"}, "subject_refs"),
        ({"refine_from": 0.9, "refine_to": 0.8}, "refine_from"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_touched(
    made: dict, models: dict[str, str], references: dict[str, str], tmp_path: Path, settings: dict, field: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.png").write_text("no picture")
    given = {
        name: value.format(empty=tmp_path / "empty", text=tmp_path / "note.png") if isinstance(value, str) else value
        for name, value in settings.items()
    }
    pipe, subject, style = made["sd"]
    with (
        pytest.raises(SettingsError) as caught,
        klora.fuse(pipe, subject, style, policy="dynamic", **{**models, **references, **given}),
    ):
        pass
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    assert hooks(pipe) == 0


def test_several_references_may_be_given(references: dict[str, str]) -> None:
    assert len(read_images("style_refs", references["style_refs"])) == 2
    assert len(read_images("style_refs", ";".join(references.values()))) == 3
    with pytest.raises(SettingsError, match=r"^style_refs: ~nobody-here/a.png cannot be read as a picture"):
        read_images("style_refs", "~nobody-here/a.png")


def test_an_encoder_takes_any_size(models: dict[str, str]) -> None:
    model = load_clip(models["clip_model"], "cpu")
    for size in ((24, 40), (64, 64), (90, 33)):
        assert encode_square(model, torch.rand(2, 3, *size)).shape == (2, 12)
