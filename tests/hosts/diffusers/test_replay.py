"""A denoiser's call made again with other latents, in every kind of pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from klora.errors import KloraError
from klora.hosts.diffusers import DiffusersHost
from klora.hosts.diffusers.replay import Times, call_again, first_call, mixture
from tests.support.pipelines import PIPELINES, TOKENS, scheduler

STEPS = 4
CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": STEPS, "height": 32, "width": 32}


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return PIPELINES[request.param](tmp_path_factory.mktemp(request.param))


def arguments(pipe: Any, **more: Any) -> dict[str, Any]:
    length = {"max_sequence_length": TOKENS} if "Flux" in type(pipe).__name__ else {}
    generator = torch.Generator().manual_seed(0)
    return {**CALL, **length, "generator": generator, "output_type": "latent", **more}


def sampled(pipe: Any, **more: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the denoiser is shown and predicts for the prompt at each of its calls."""
    host, calls = DiffusersHost(pipe), []

    def keep(_denoiser: Any, args: Any, kwargs: Any, output: Any) -> None:
        rows = host.conditional_rows(args, kwargs)
        shown, predicted = host.argument(host.inputs[0], args, kwargs), output[0]
        calls.append(tuple(x[rows.start : rows.stop] if rows else x for x in (shown, predicted)))

    hook = host.diffusion_model.register_forward_hook(keep, with_kwargs=True)
    pipe(**arguments(pipe, **more))
    hook.remove()
    return calls


def test_a_call_made_again_predicts_what_the_pipeline_was_told_at_every_step(pipe: Any) -> None:
    host = DiffusersHost(pipe)
    with Times(host) as times:
        calls = sampled(pipe)
    call = first_call(host, arguments(pipe))
    assert len(times) == len(calls) == STEPS
    for step, (shown, predicted) in enumerate(calls):
        torch.testing.assert_close(call_again(host, call, shown, times[step]), predicted, atol=1e-5, rtol=1e-4)


def test_noise_grows_weaker_from_step_to_step(pipe: Any) -> None:
    pipe.scheduler.set_timesteps(STEPS, **({"mu": 1.0} if "Flux" in type(pipe).__name__ else {}))
    levels = [mixture(pipe.scheduler, step).level for step in range(1, STEPS)]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] > 0


def test_the_first_call_ends_the_pipeline_there_and_leaves_no_hook(pipe: Any) -> None:
    host = DiffusersHost(pipe)
    with Times(host) as times:
        first_call(host, arguments(pipe))
    # Whatever else listens need not hear of a call that is not made.
    assert len(times) == 0
    assert not host.diffusion_model._forward_pre_hooks
    assert not host.diffusion_model._forward_hooks


def test_what_fails_before_the_first_call_is_told_and_leaves_no_hook(pipe: Any) -> None:
    host = DiffusersHost(pipe)
    with pytest.raises(ValueError, match="prompt"):
        first_call(host, arguments(pipe, prompt=None))
    assert not host.diffusion_model._forward_pre_hooks


def test_latents_of_another_form_are_an_error_that_names_the_pipeline(pipe: Any) -> None:
    host = DiffusersHost(pipe)
    call = first_call(host, arguments(pipe))
    with pytest.raises(KloraError, match=type(pipe).__name__):
        call_again(host, call, torch.zeros(1, 3, 5), torch.zeros(1))


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_schedulers_agree_on_what_a_denoiser_is_shown_at_one_time(name: str, kind: str) -> None:
    one, reference = scheduler(name, prediction_type=kind), scheduler("DDIMScheduler", prediction_type=kind)
    for each in (one, reference):
        each.set_timesteps(10)
    alphas = reference.alphas_cumprod
    for step, timestep in enumerate(dict.fromkeys(one.timesteps.tolist())):
        mixed = mixture(one, step)
        assert mixed.kind == kind
        assert mixed.signal**2 == pytest.approx(float(alphas[round(timestep)]), rel=0.02)


def test_an_unknown_kind_of_prediction_is_an_error() -> None:
    odd = scheduler("DDIMScheduler")
    odd.register_to_config(prediction_type="odd")
    odd.set_timesteps(4)
    with pytest.raises(KloraError, match="odd"):
        mixture(odd, 0)
