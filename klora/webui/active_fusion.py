"""A fusion at work on one processing object, from the text encoder to the last evaluation of the model."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from klora.engine.session import Session
from klora.engine.wrapping import Wrappers
from klora.fusion.plan import FusionPlan
from klora.hosts.guidance import make_guidance
from klora.hosts.webui.guidance import DenoiserGuidance
from klora.hosts.webui.host import WebuiHost
from klora.hosts.webui.loaded_model import host_of
from klora.hosts.webui.schedule import schedule_of
from klora.settings import Settings
from klora.webui.injection import PLANS
from klora.webui.messages import ABSENT, comment, fail, left_out, logger, named_by, reason_of
from klora.webui.options import reference_folder
from klora.webui.picture_text import add_hashes, tell
from klora.webui.requested_fusion import RequestedFusion


class AttachedSessions:
    """The sessions whose hooks are on: at most one, unless a host ends a picture in a way that is not known here."""

    def __init__(self) -> None:
        self._sessions: list[Session] = []

    def attach(self, session: Session) -> None:
        """Put a session's hooks on; does nothing when they are on."""
        if session not in self._sessions:
            self._sessions.append(session)
            session.attach()

    def detach(self, session: Session) -> None:
        """Take a session's hooks off; does nothing when they are off."""
        session.detach()
        if session in self._sessions:
            self._sessions.remove(session)

    def detach_all(self) -> None:
        """Take every hook off."""
        for session in list(self._sessions):
            self.detach(session)


class ActiveFusion:
    """What one processing object has of K-LoRA: the fusion its prompt asks for, and the session of the current pass.

    Wraps four methods on the instance: `setup_conds`, `calculate_hr_conds` and `cached_params`, for the text encoder,
    and `sample`, whose end, however it comes, takes every hook off and the wrappers too.
    """

    def __init__(self, p: Any, attached: AttachedSessions) -> None:
        self.p = p
        self._attached = attached
        self.fusion: RequestedFusion | None = None
        self.evaluation: Any = None
        """What the host's callback was told of the evaluation that is under way."""
        self._session: Session | None = None
        self._host: WebuiHost | None = None
        self._guidance: DenoiserGuidance | None = None
        self._bound_to: tuple[Any, ...] | None = None
        self._wrappers = Wrappers()
        self._encoder = ExitStack()
        self._encoded_with: tuple[Any, ...] = ()
        self._hires = False
        self._steps: set[int] = set()
        # By pass, the second one True.
        self._acted: dict[bool, list[FusionPlan]] = {False: [], True: []}
        self._given: dict[bool, Settings] = {}

    def begin(self, fusion: RequestedFusion | None) -> None:
        """Take what the prompt of the coming pass asks for."""
        self.fusion = fusion
        if not getattr(self.p, "is_hr_pass", False):
            self._acted = {False: [], True: []}
        if not self._wrappers:
            for name, around in (
                ("setup_conds", self._encoding),
                ("calculate_hr_conds", self._encoding),
                ("sample", self._sampling),
            ):
                self._wrappers.wrap(self.p, name, _inside(around))
            self._wrappers.wrap(self.p, "cached_params", self._cached_by)

    def evaluate(self, denoiser: Any, level: float) -> None:
        """Make what the plan decides at this noise level active, in the model that is about to be evaluated."""
        fusion = self.fusion
        if fusion is None:
            self._release()
            return
        shared = importlib.import_module("modules.shared")
        host = host_of(shared.sd_model)
        hires = bool(getattr(self.p, "is_hr_pass", False))
        # Compared by identity: the objects are kept, so none can take another's place.
        bound_to = (fusion, denoiser, host.diffusion_model)
        if self._bound_to is None or any(a is not b for a, b in zip(self._bound_to, bound_to, strict=True)):
            self._bind(fusion, denoiser, host, hires)
            self._bound_to, self._host = bound_to, host
        if self._session is not None and self._host is not None:
            self._host.evaluation = self.evaluation
            # A picture made inside this one (by another extension) may have taken the hooks off.
            self._attached.attach(self._session)
            self._session.at_level(level)
            moment = self._session.moment
            self._steps.add(min(moment.step, moment.steps - 1))

    def stop(self, error: Exception) -> None:
        """Go on without K-LoRA and say why."""
        self.fusion = None
        self._release()
        fail(self.p, reason_of(error), "stopped")

    def _bind(self, fusion: RequestedFusion, denoiser: Any, host: WebuiHost, hires: bool) -> None:
        same_pass = self._bound_to is not None and self._bound_to[1] is denoiser and self._session is not None
        sampling = self._session.sampling if same_pass and self._session else None
        self._release()
        with named_by(fusion.subject.path, fusion.style.path):
            fusion = fusion.for_model(host)
            plan = fusion.plan(host.device, hires)
            session = host.session(fusion.pair, plan)
        with named_by(folder=reference_folder()):
            guidance = make_guidance(plan.settings, self.evaluation.x.device if self.evaluation else "cpu")
        if sampling is None:
            session.start_pass(schedule_of(denoiser))
        else:
            # The model has changed within a pass: a refiner.
            session.follow(sampling)
        self._session = session
        self._hires, self._given[hires] = hires, fusion.tag.settings
        if guidance is not None:
            self._guidance = DenoiserGuidance(host, session, guidance, denoiser)
        self._report(session)

    def _report(self, session: Session) -> None:
        coverage = session.pair.coverage
        share = "–" if session.plan.share is None else f"{session.plan.share:.0%}"
        logger.info(
            "K-LoRA: %s × %s: %d modules contested, %d subject only, %d style only, %d unmatched keys; subject %s",
            session.pair.subject.name,
            session.pair.style.name,
            len(coverage.contested),
            len(coverage.subject_only),
            len(coverage.style_only),
            len(coverage.unmatched),
            share,
        )
        for warning in session.plan.warnings:
            comment(self.p, warning)
        for names, what in ((session.missing, ABSENT), (coverage.unmatched, "keys are unknown")):
            if names:
                comment(self.p, left_out(names, what))

    def _note(self, session: Session) -> None:
        """Keep what acted, with what was decided while sampling, for the steps that were made."""
        if self._steps:
            plan = dataclasses.replace(session.observed, made=range(min(self._steps), max(self._steps) + 1))
            self._acted[self._hires].append(plan)
            setattr(self.p, PLANS, [*getattr(self.p, PLANS, ()), plan])
        self._steps.clear()

    def _release(self) -> None:
        if self._session is not None:
            self._attached.detach(self._session)
            self._note(self._session)
        if self._guidance is not None:
            self._guidance.remove()
        self._session = self._host = self._guidance = None
        self._bound_to = None

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        # A host may have loaded its LoRAs again after the text was encoded.
        self._take_out()
        try:
            yield
        finally:
            self._release()
            self._wrappers.remove()
            tell(self.p, self._acted[False], self._acted[True], self._given)

    def _take_out(self) -> None:
        """Leave the two files to K-LoRA alone, whatever else has the host load them."""
        if self.fusion is None:
            return
        host = host_of(importlib.import_module("modules.shared").sd_model)
        for name in host.take_out({self.fusion.subject.path, self.fusion.style.path}):
            comment(self.p, f"{name} is asked for by another tag or setting too; K-LoRA alone applies it")

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        # A host may encode the hires prompt inside the encoding of the first: then what acted so far has ended.
        self._encoder.close()
        self._encoded_with = ()
        if self.fusion is not None:
            try:
                self._take_out()
                with named_by(self.fusion.subject.path, self.fusion.style.path):
                    self._encoder.enter_context(self._text_encoder(self.fusion))
            except Exception as error:
                # The host would end the job.
                self._encoded_with = ()
                self.stop(error)
        try:
            yield
        finally:
            self._encoder.close()

    def _text_encoder(self, fusion: RequestedFusion) -> AbstractContextManager[None]:
        add_hashes(self.p, fusion)
        parts = fusion.text_parts()
        self._encoded_with = (True, *((part.sha256, part.strength, *part.deltas) for part in parts))
        if not parts:
            return nullcontext()
        shared = importlib.import_module("modules.shared")
        return host_of(shared.sd_model).text_encoder_with(parts)

    def _cached_by(self, cached_params: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """Cache conditionings by the files that acted too: the host knows the prompt, whose tags are but names."""

        def wrapper(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            return (*cached_params(*args, **kwargs), self._encoded_with)

        return wrapper


def _inside(around: Callable[[], AbstractContextManager[None]]) -> Callable[[Any], Any]:
    """What wraps a method so that it runs inside a context."""

    def wrapper_of(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with around():
                return original(*args, **kwargs)

        return wrapper

    return wrapper_of
