"""A session led through the sampling of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from klora.engine.ensemble import Ensemble
from klora.engine.refine import Refiner
from klora.engine.session import Session
from klora.hosts.diffusers import DiffusersHost
from klora.hosts.diffusers_refine import LatentRefinement


def follow(host: DiffusersHost, session: Session, refiner: Refiner | None = None) -> Handles:
    """Tell `session` the noise level at every call of the denoiser; the handles' `remove` ends that.

    Where its policy asks for several forwards per call, they are made and averaged. A `refiner` moves the latents
    before each step.
    """
    ensemble = Ensemble(session, partial(host.argument, "encoder_hidden_states"))
    several = session.plan.policy.forwards > 1
    follower = _Follower(host, session, ensemble.begin if several else None)
    handles = Handles([host.denoiser.register_forward_pre_hook(follower, with_kwargs=True)])
    if several:
        handles.add(host.denoiser.register_forward_hook(ensemble.finish, with_kwargs=True, prepend=True))
    if refiner is not None:
        handles.add(LatentRefinement(host, session, refiner))
    return handles


class Removable(Protocol):
    """What can be taken off."""

    def remove(self) -> None:
        """Take it off."""


class Handles:
    """Hooks that are taken off together."""

    def __init__(self, handles: list[Removable]) -> None:
        self._handles = handles

    def add(self, handle: Removable) -> None:
        """Take one more."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Take all of them off; does nothing when they are off."""
        while self._handles:
            self._handles.pop().remove()


class _Follower:
    """The pre-hook that reads the timestep a denoiser is called with."""

    def __init__(self, host: DiffusersHost, session: Session, then: Callable[[], None] | None = None) -> None:
        self.host = host
        self.session = session
        self.then = then
        # FLUX pipelines hand their transformer t/1000.
        self.divisor = 1000.0 if "Flux" in type(host.denoiser).__name__ else 1.0
        self.schedule: Tensor | None = None

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = self.host.timestep(args, kwargs)
        scheduler = self.host.pipe.scheduler
        # set_timesteps makes a new tensor: a new image, batch or pass.
        if scheduler.timesteps is not self.schedule:
            self.schedule = scheduler.timesteps
            self.session.start_pass(self._levels(timestep.dtype))
        self.session.at_level(timestep.flatten()[0].item())
        if self.then is not None:
            self.then()

    def _levels(self, dtype: torch.dtype) -> list[float]:
        """The schedule as the denoiser will see it, rounded to the type in which pipelines pass timesteps."""
        scheduler = self.host.pipe.scheduler
        levels = scheduler.timesteps
        # Flow schedulers of older diffusers keep no count, and list no midpoints.
        steps = getattr(scheduler, "num_inference_steps", None)
        if steps and len(levels) == 2 * steps - 1:
            # Second-order schedulers list the level of every call: of these, every other one is a step's.
            levels = levels[::2]
        return (levels.to(dtype) / self.divisor).tolist()
