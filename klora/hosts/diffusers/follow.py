"""A session led through the sampling of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from klora.engine.compiled import Calls
from klora.engine.ensemble import Ensemble
from klora.engine.guidance import ReferenceGuidance
from klora.engine.session import Session
from klora.engine.wrapping import Wrappers
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
    ensemble = Ensemble(session, host.condition) if session.plan.policy.forwards > 1 else None
    follower = _Follower(host, session, ensemble, failed)
    with ExitStack() as hooks:
        calls, wrappers = Calls(host.running, follower.begin, follower.end), Wrappers()
        for remove in (calls.remove, wrappers.remove):
            # Twice: the first may be interrupted.
            hooks.callback(remove)
            hooks.callback(remove)
        calls.attach()
        # What all pipelines call when they begin to sample, whatever they sample with.
        wrappers.wrap(host.pipe, "progress_bar", follower.sampling)
        if guidance is not None:
            hooks.callback(SchedulerGuidance(host, session, guidance).remove)
        yield


class _Follower:
    """Reads the time that a denoiser is called with, and looks at what the call has come to."""

    def __init__(
        self, host: DiffusersHost, session: Session, ensemble: Ensemble | None = None, failed: Failed | None = None
    ) -> None:
        self.host = host
        self.session = session
        self.ensemble = ensemble
        self.failed = failed
        self.schedule: Schedule | None = None
        self._model = host.diffusion_model

    def sampling(self, progress_bar: Callable[..., Any]) -> Callable[..., Any]:
        """Around the pipeline's own: sampling begins."""

        def begun(*args: Any, **kwargs: Any) -> Any:
            with self._failing():
                self.host.check_is(self._model)
            return progress_bar(*args, **kwargs)

        return begun

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins."""
        with self._failing():
            self._follow(args, kwargs)
            if self.ensemble is not None:
                self.ensemble.begin(args, kwargs)

    def end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """It has ended; what this gives is its output instead."""
        with self._failing():
            # As soon as it can be known, so that no picture is made for nothing.
            self.session.evaluated()
        return self.ensemble.finish(model, args, kwargs, output) if self.ensemble is not None else None

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except KloraError as error:
            if self.failed is None:
                raise
            self.failed(error)

    def _follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = self.host.timestep(args, kwargs)
        pipe = self.host.calling()
        # set_timesteps makes a new tensor: a new image, batch or pass.
        if self.schedule is None or pipe.scheduler.timesteps is not self.schedule.timesteps:
            self.schedule = Schedule(pipe.scheduler, timestep, type(pipe).__name__)
            self.session.start_pass(self.schedule.steps, self.host.running)
        self.session.at_level(self.schedule.level(timestep))
