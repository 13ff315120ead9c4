"""Every policy on real pipelines: what it must equal, what it notes, and that nothing of it is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import klora
from klora.engine.dynamic import BatchRows
from klora.engine.ensemble import weighted_mean
from klora.errors import SettingsError
from klora.fusion.policies import POLICIES
from klora.hosts.diffusers import DiffusersHost
from klora.hosts.webui.a1111 import A1111Host
from klora.hosts.webui.forge import ForgeHost
from tests.hosts.diffusers.test_pipeline import SPELLINGS, denoiser, hooks, pair_of_files, same_weights, weights
from tests.support.pipelines import SMALLER, run, scheduler

SD_POLICIES = [policy for policy in POLICIES if policy != "b-lora"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path, Path]]:
    found = {}
    for kind in SMALLER:
        folder = tmp_path_factory.mktemp(kind)
        pipe = SMALLER[kind](folder / "tokenizer")
        found[kind] = (pipe, *pair_of_files(pipe, folder, SPELLINGS[kind]))
    return found


def fused(pipe: Any, subject: Path, style: Path, steps: int = 4, **settings: Any) -> torch.Tensor:
    with klora.fuse(pipe, subject, style, **settings):
        return run(pipe, num_inference_steps=steps)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("policy", SD_POLICIES)
def test_every_policy_changes_the_picture_twice_alike_and_leaves_nothing(made: dict, policy: str) -> None:
    pipe, subject, style = made["sd"]
    plain, before = run(pipe), weights(pipe)
    first = fused(pipe, subject, style, policy=policy)
    assert not torch.equal(first, plain)
    assert torch.equal(fused(pipe, subject, style, policy=policy), first)
    assert hooks(pipe) == 0
    assert not denoiser(pipe)._forward_hooks
    assert same_weights(before, pipe)
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("kind", ["sd", "flux"])
@pytest.mark.parametrize("policy", ["composite", "cm-lora", "lego", "switch", "dynamic"])
def test_a_lora_with_itself_is_that_lora_alone(made: dict, kind: str, policy: str) -> None:
    pipe, subject, _ = made[kind]
    alone = fused(pipe, subject, subject, policy="direct", style_strength=0, text_encoder="none")
    # A prediction that is used again is not that of the step.
    settings = {"policy": policy, "text_encoder": "none", "refresh": 1}
    assert close(fused(pipe, subject, subject, **settings), alone)


def test_cm_lora_uses_predictions_again_and_saves_forwards(made: dict) -> None:
    pipe, subject, style = made["sd"]
    calls: list[int] = []
    model = denoiser(pipe)
    handle = model.conv_in.register_forward_hook(lambda *_: calls.append(1))
    try:
        counts = {}
        for name, settings in {
            "plain": {"policy": "k-lora"},
            "composite": {"policy": "composite"},
            "cm 1": {"policy": "cm-lora", "refresh": 1},
            "cm 3": {"policy": "cm-lora", "refresh": 3, "period": 6},
        }.items():
            calls.clear()
            fused(pipe, subject, style, steps=6, **settings)
            counts[name] = len(calls)
    finally:
        handle.remove()
    assert counts == {"plain": 6, "composite": 12, "cm 1": 12, "cm 3": 8}


def test_composite_is_the_mean_of_what_each_lora_alone_predicts(made: dict) -> None:
    pipe, subject, style = made["sd"]
    alone = []
    for side in ({"style_strength": 0}, {"subject_strength": 0}):
        alone.append(_first_prediction(pipe, subject, style, policy="direct", text_encoder="none", **side))
    both = _first_prediction(pipe, subject, style, policy="composite", text_encoder="none")
    assert close(both, (alone[0] + alone[1]) / 2)


def _first_prediction(pipe: Any, subject: Path, style: Path, **settings: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with klora.fuse(pipe, subject, style, **settings):
        handle = denoiser(pipe).register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
        try:
            run(pipe)
        finally:
            handle.remove()
    return seen[0]


@pytest.mark.parametrize("policy", ["composite", "cm-lora"])
def test_an_error_inside_a_second_forward_leaves_nothing(made: dict, policy: str) -> None:
    pipe, subject, style = made["sd"]
    plain = run(pipe)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = denoiser(pipe).conv_in.register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            fused(pipe, subject, style, policy=policy)
    finally:
        handle.remove()
    assert hooks(pipe) == 0
    assert torch.equal(run(pipe), plain)


def test_switch_with_a_long_period_is_the_subject_alone(made: dict) -> None:
    pipe, subject, style = made["sd"]
    alone = fused(pipe, subject, style, policy="direct", style_strength=0, text_encoder="none")
    assert torch.equal(fused(pipe, subject, style, policy="switch", period=99, text_encoder="none"), alone)


def test_dynamic_notes_what_it_decided(made: dict) -> None:
    pipe, subject, style = made["sd"]
    with klora.fuse(pipe, subject, style, policy="dynamic") as session:
        assert set("".join(session.plan.selections.values())) == {"b"}
        assert session.observed is session.plan
        run(pipe, num_inference_steps=5)
        observed, decisions = session.observed, session.decisions
    contested = {module.name for module in observed.contested}
    assert decisions.keys() == contested
    assert all([tau for tau, _ in found] == [0, 0.2, 0.4, 0.6, 0.8] for found in decisions.values())
    for name in contested:
        assert observed.selection(name) == "".join(letter for _, letter in decisions[name])
    assert 0 < observed.share < 1


def test_dynamic_decides_on_the_prompt_and_not_on_what_is_to_be_avoided(made: dict) -> None:
    pipe, subject, style = made["sd"]
    found = []
    for negative in ("a dog", "zebra zebra"):
        with klora.fuse(pipe, subject, style, policy="dynamic", text_encoder="none") as session:
            run(pipe, num_inference_steps=2, negative_prompt=negative)
            found.append({name: letters[0] for name, letters in session.decisions.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("policy", ["dynamic", "cm-lora"])
def test_other_schedulers_work(made: dict, policy: str, name: str) -> None:
    pipe, subject, style = made["sd"]
    before = pipe.scheduler
    pipe.scheduler = scheduler(name)
    try:
        assert torch.isfinite(fused(pipe, subject, style, policy=policy)).all()
    finally:
        pipe.scheduler = before


def test_b_lora_runs_on_sdxl_and_says_so_elsewhere(made: dict) -> None:
    pipe, subject, style = made["sdxl"]
    plain = run(pipe)
    with klora.fuse(pipe, subject, style, policy="b-lora") as session:
        assert not torch.equal(run(pipe), plain)
        acting = {
            name.split(".transformer")[0] for name, letters in session.plan.selections.items() if "-" not in letters
        }
    assert {name.removesuffix(".proj_in").removesuffix(".proj_out") for name in acting} == {
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    }
    pipe, subject, style = made["sd"]
    with pytest.raises(SettingsError, match="SDXL"), klora.fuse(pipe, subject, style, policy="b-lora"):
        pass
    assert hooks(pipe) == 0


def test_lego_takes_strengths_once(made: dict) -> None:
    pipe, subject, style = made["sd"]
    alone = fused(pipe, subject, style, policy="direct", subject_strength=0.5, style_strength=0, text_encoder="none")
    lego = fused(pipe, subject, style, policy="lego", subject_strength=0.5, style_strength=0, text_encoder="none")
    assert close(lego, alone)


def test_diffusers_batches_the_conditional_rows_last(made: dict) -> None:
    pipe = made["sd"][0]
    host = DiffusersHost(pipe)
    seen = []
    handle = denoiser(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(host.conditional_rows(args, kwargs)), with_kwargs=True
    )
    try:
        run(pipe, num_inference_steps=1)
        run(pipe, num_inference_steps=1, guidance_scale=1.0)
        run(pipe, num_inference_steps=1, num_images_per_prompt=3)
    finally:
        handle.remove()
    assert seen == [BatchRows(1, 2, 2), None, BatchRows(3, 6, 6)]


class Evaluation:
    def __init__(self, x: int, uncond: Any) -> None:
        self.x, self.text_uncond = torch.zeros(x, 4, 2, 2), uncond


@pytest.mark.parametrize(
    ("whole", "uncond", "batch", "expected"),
    [
        (2, torch.zeros(1, 77, 8), 2, BatchRows(0, 1, 2)),
        (4, {"crossattn": torch.zeros(1, 77, 8), "vector": torch.zeros(1, 8)}, 4, BatchRows(0, 3, 4)),
        (4, torch.zeros(2, 77, 8), 2, None),
        (2, torch.zeros(2, 77, 8), 2, None),
    ],
)
def test_a1111_batches_the_conditional_rows_first(
    whole: int, uncond: Any, batch: int, expected: BatchRows | None
) -> None:
    host = A1111Host(None)
    host.evaluation = Evaluation(whole, uncond)
    assert host.conditional_rows((torch.zeros(batch, 4, 2, 2),), {}) == expected


@pytest.mark.parametrize(
    ("parts", "batch", "expected"),
    [
        ([1, 0], 2, BatchRows(1, 2, 2)),
        ([0, 1], 4, BatchRows(0, 2, 4)),
        ([1, 0, 0], 3, BatchRows(1, 3, 3)),
        ([1], 2, BatchRows(0, 0, 2)),
        ([0], 2, BatchRows(0, 2, 2)),
        ([], 2, None),
    ],
)
def test_forge_says_which_rows_are_conditional(parts: list[int], batch: int, expected: BatchRows | None) -> None:
    host = ForgeHost(None)
    kwargs = {"transformer_options": {"cond_or_uncond": parts}}
    assert host.conditional_rows((torch.zeros(batch, 4, 2, 2),), kwargs) == expected


def test_a_mean_has_the_form_of_what_it_is_made_of(made: dict) -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    a, b = torch.full((2,), 1.0), torch.full((2,), 3.0)
    assert torch.equal(weighted_mean([a, b], [0.5, 0.5]), torch.full((2,), 2.0))
    mean = weighted_mean([(a, "rest"), (b, "other")], [0.25, 0.75])
    assert torch.equal(mean[0], torch.full((2,), 2.5))
    assert mean[1] == "rest"
    output = weighted_mean([UNet2DConditionOutput(sample=a), UNet2DConditionOutput(sample=b)], [0.5, 0.5])
    assert isinstance(output, UNet2DConditionOutput)
    assert torch.equal(output.sample, torch.full((2,), 2.0))
    assert torch.equal(a, torch.full((2,), 1.0))
