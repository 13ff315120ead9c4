"""Reference guidance in a diffusers pipeline: around the `step` of the scheduler's instance."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from klora.engine.guidance import ReferenceGuidance
from klora.engine.session import Session
from klora.engine.wrapping import Wrappers
from klora.hosts.diffusers.pipeline import DiffusersHost


def x0_coefficients(scheduler: Any, timestep: Tensor | float) -> tuple[float, float]:
    """(a, b) with x0 = a·x_t + b·model output, for a scheduler's parametrisation at one of its timesteps.

    Three conventions are told apart by what a scheduler has: flows (x = (1−σ)·x0 + σ·noise), σ-space samples
    (x = x0 + σ·noise, whose initial noise is larger than 1) and variance-preserving ones (x = √ᾱ·x0 + √(1−ᾱ)·noise).
    """
    config = scheduler.config
    kind = getattr(config, "prediction_type", "flow_prediction")
    sigma = _sigma(scheduler, timestep)
    if sigma is not None and (kind == "flow_prediction" or getattr(config, "use_flow_sigmas", False)):
        return 1.0, -sigma
    if sigma is not None and float(scheduler.init_noise_sigma) > 1.001:
        variance = sigma**2 + 1
        return {
            "epsilon": (1.0, -sigma),
            "v_prediction": (1 / variance, -sigma / variance**0.5),
            "sample": (0.0, 1.0),
        }[kind]
    alpha = 1 / (sigma**2 + 1) if sigma is not None else float(scheduler.alphas_cumprod[int(timestep)])
    root, noise = alpha**0.5, (1 - alpha) ** 0.5
    return {
        "epsilon": (1 / max(root, 1e-4), -noise / max(root, 1e-4)),
        "v_prediction": (root, -noise),
        "sample": (0.0, 1.0),
    }[kind]


def _sigma(scheduler: Any, timestep: Tensor | float) -> float | None:
    """The noise level of a timestep, None for schedulers that know ᾱ alone."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return None
    at = (scheduler.timesteps.cpu() - torch.as_tensor(timestep).cpu()).abs().argmin()
    return float(sigmas[int(at)])


class SchedulerGuidance:
    """Guides every sample that a pipeline's scheduler is about to step from.

    The wrapper lies on the instance and comes off by `remove`; a scheduler put in its place while sampling goes on is
    wrapped when the denoiser is next called.
    """

    def __init__(self, host: DiffusersHost, session: Session, guidance: ReferenceGuidance) -> None:
        self._host, self._session, self._guidance = host, session, guidance
        self._wrappers = Wrappers()
        self._grid: tuple[int, int] | None = None
        self._hook = host.diffusion_model.register_forward_pre_hook(self._on_denoiser, with_kwargs=True)

    def remove(self) -> None:
        """Take everything off; does nothing when it is off."""
        self._hook.remove()
        self._wrappers.remove()

    def _on_denoiser(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:
            # As torch calls a hook that an earlier one has just removed.
            return
        ids = self._host.argument("img_ids", args, kwargs)
        if ids is not None:
            # FLUX packs 2×2 latents into a token; the ids tell how many rows and columns there are.
            rows, columns = (int(ids[..., axis].max()) + 1 for axis in (1, 2))
            self._grid = (rows, columns)
        scheduler = self._host.pipe.scheduler
        if not self._wrappers.has(scheduler):
            self._wrappers.wrap(scheduler, "step", lambda original: self._guiding(scheduler, original))

    def _guiding(self, scheduler: Any, original: Any) -> Any:
        # Pipelines look at the signature to see what they may pass.
        @functools.wraps(original)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            guided = self._guided(scheduler, model_output, timestep, sample)
            return original(model_output, timestep, guided, *args, **kwargs)

        return step

    def _guided(self, scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        tau = self._session.tau
        # The second call of a second-order step starts from the sample of the first.
        if tau is None or not self._guidance.acts(tau) or not getattr(scheduler, "state_in_first_order", True):
            return sample
        a, b = x0_coefficients(scheduler, timestep)
        fixed = b * model_output.detach().float()
        shift = self._guidance.shift(
            sample, lambda x: a * x + fixed, lambda x0: self._host.decode_latents(x0, self._grid)
        )
        return sample - shift
