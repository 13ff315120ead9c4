"""A session led through the sampling of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from klora.engine.ensemble import Ensemble
from klora.engine.guidance import ReferenceGuidance
from klora.engine.session import Session
from klora.errors import KloraError
from klora.hosts.diffusers.guidance import SchedulerGuidance
from klora.hosts.diffusers.pipeline import DiffusersHost
from klora.hosts.diffusers.time import Schedule

Failed = Callable[[KloraError], None]
"""What is told of an error in the place of raising it, where a picture is to go on without the fusion."""


@contextmanager
def follow(
    host: DiffusersHost, session: Session, guidance: ReferenceGuidance | None = None, failed: Failed | None = None
) -> Iterator[None]:
    """Tell `session` the noise level at every call of the diffusion model inside the block.

    Where its policy asks for several forwards per call, they are made and averaged. A `guidance` moves the latents
    before each step. Where the noise level cannot be told, `failed` hears why, and may end the block; without it, that
    is raised from the call.
    """
    model, ensemble = host.diffusion_model, Ensemble(session, host.condition)
    several = session.plan.policy.forwards > 1
    follower = _Follower(host, session, ensemble.begin if several else None, failed)
    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(follower, with_kwargs=True))
        if several:
            hooks.enter_context(model.register_forward_hook(ensemble.finish, with_kwargs=True, prepend=True))
        if guidance is not None:
            hooks.callback(SchedulerGuidance(host, session, guidance).remove)
        yield


class _Follower:
    """The pre-hook that reads the time that a denoiser is called with."""

    def __init__(
        self,
        host: DiffusersHost,
        session: Session,
        then: Callable[[], None] | None = None,
        failed: Failed | None = None,
    ) -> None:
        self.host = host
        self.session = session
        self.then = then
        self.failed = failed
        self.schedule: Schedule | None = None

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._follow(args, kwargs)
        except KloraError as error:
            if self.failed is None:
                raise
            self.failed(error)

    def _follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = self.host.timestep(args, kwargs)
        scheduler = self.host.pipe.scheduler
        # set_timesteps makes a new tensor: a new image, batch or pass.
        if self.schedule is None or scheduler.timesteps is not self.schedule.timesteps:
            self.schedule = Schedule(scheduler, timestep, type(self.host.pipe).__name__)
            self.session.start_pass(self.schedule.steps)
        self.session.at_level(self.schedule.level(timestep))
        if self.then is not None:
            self.then()
