"""A fusion at work on one processing object, from the text encoder to the last evaluation of the model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from klora.balance.search import PLACES
from klora.engine.session import Session
from klora.engine.wrapping import Wrappers
from klora.errors import KloraError, named_by
from klora.hosts.guidance import make_guidance
from klora.hosts.webui.guidance import DenoiserGuidance
from klora.hosts.webui.host import WebuiHost
from klora.hosts.webui.loaded_model import host_of
from klora.hosts.webui.predictions import Predictions
from klora.hosts.webui.replay import JudgedModel, Recording
from klora.hosts.webui.schedule import schedule_of
from klora.settings import Settings
from klora.webui.acted import Acted, report
from klora.webui.attached_sessions import AttachedSessions, Uncompiled
from klora.webui.judged import is_judged, judge_picture
from klora.webui.messages import comment, fail, reason_of
from klora.webui.options import reference_folder
from klora.webui.picture_text import add_hashes
from klora.webui.requested_fusion import RequestedFusion


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
        self._put_on: Uncompiled | None = None
        self._host: WebuiHost | None = None
        self._guidance: DenoiserGuidance | None = None
        self._predictions: Predictions | None = None
        self._recording: Recording | None = None
        self._bound_to: tuple[Any, ...] | None = None
        self._wrappers = Wrappers()
        self._encoder = ExitStack()
        self._encoded_with: tuple[Any, ...] = ()
        self._pass: tuple[bool, Settings] = (False, Settings())
        """Whether the session's pass is the second one, and what its prompt asks for."""
        self._acted = Acted(p)

    def begin(self, fusion: RequestedFusion | None) -> None:
        """Take what the prompt of the coming pass asks for."""
        self.fusion = fusion
        self._acted.begin()
        if not self._wrappers:
            for name, around in (
                ("setup_conds", self._encoding),
                ("calculate_hr_conds", self._encoding),
            ):
                self._wrappers.wrap(self.p, name, _inside(around))
            self._wrappers.wrap(self.p, "sample", _inside(self._sampling, self._judge))
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
        if self._session is not None and self._put_on is not None and self._host is not None:
            self._host.evaluation = self.evaluation
            # A picture made inside this one (by another extension) may have taken the hooks off.
            self._attached.attach(self._put_on)
            self._session.at_level(level)
            if self._predictions is not None:
                self._predictions.begin_evaluation()
            self._acted.step(self._session)
            if self._recording is not None and self._session.tau is not None:
                self._recording.at(self._session.tau, level)

    def stop(self, error: Exception) -> None:
        """Go on without K-LoRA and say why."""
        self.fusion = None
        self._release()
        fail(self.p, reason_of(error), "stopped")

    def _bind(self, fusion: RequestedFusion, denoiser: Any, host: WebuiHost, hires: bool) -> None:
        same_pass = self._bound_to is not None and self._bound_to[1] is denoiser and self._session is not None
        sampling = self._session.sampling if same_pass and self._session else None
        self._release()
        with named_by(*fusion.paths):
            fusion = fusion.for_model(host)
            plan = fusion.plan(host.device, hires)
            session = host.session(fusion.pair, plan, partial(comment, self.p))
        with named_by(folder=reference_folder()):
            guidance = make_guidance(plan.settings, self.evaluation.x.device if self.evaluation else "cpu")
        if sampling is None:
            session.start_pass(schedule_of(denoiser))
        else:
            # The model has changed within a pass: a refiner.
            session.follow(sampling)
        self._session, self._put_on = session, Uncompiled(session, host, partial(comment, self.p))
        self._pass = hires, fusion.tag.settings
        if guidance is not None:
            self._guidance = DenoiserGuidance(host, session, guidance, denoiser)
        if plan.policy.forwards > 1:
            self._predictions = Predictions(host.diffusion_model, session)
        if is_judged(self.p):
            self._recording = Recording(host, denoiser, PLACES)
        report(self.p, session)

    def _judge(self, latents: Any) -> None:
        """Say how much of each LoRA is in the picture that was sampled, where that is asked for."""
        session, host, recording = self._session, self._host, self._recording
        if session is not None and host is not None and recording is not None:
            self._release()
            model = JudgedModel(host, session.pair, session.plan.settings, recording)
            judge_picture(self.p, model, latents, host.found_for(session.pair))

    def _release(self) -> None:
        if self._session is not None and self._put_on is not None:
            self._attached.detach(self._put_on)
            self._acted.note(self._session, *self._pass)
        for around in (self._guidance, self._predictions, self._recording):
            if around is not None:
                around.remove()
        self._session = self._put_on = self._host = self._guidance = self._predictions = self._recording = None
        self._bound_to = None

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        # A host may have loaded its LoRAs again after the text was encoded.
        self._take_out()
        try:
            yield
            self._look_back()
        finally:
            self._release()
            self._wrappers.remove()
            self._acted.tell()

    def _look_back(self) -> None:
        """Say of a picture of one evaluation too where nothing acted: no other evaluation has told."""
        if self._session is not None:
            try:
                self._session.evaluated()
            except KloraError as error:
                self.stop(error)

    def _take_out(self) -> None:
        """Leave the two files to K-LoRA alone, whatever else has the host load them."""
        if self.fusion is None:
            return
        host = host_of(importlib.import_module("modules.shared").sd_model)
        for name in host.take_out(set(self.fusion.paths)):
            comment(self.p, f"{name} is asked for by another tag or setting too; K-LoRA alone applies it")

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        # A host may encode the hires prompt inside the encoding of the first: then what acted so far has ended.
        self._encoder.close()
        self._encoded_with = ()
        if self.fusion is not None:
            try:
                self._take_out()
                with named_by(*self.fusion.paths):
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


def _inside(
    around: Callable[[], AbstractContextManager[None]], then: Callable[[Any], None] = lambda _result: None
) -> Callable[[Any], Any]:
    """What wraps a method so that it runs inside a context; `then` is told its result, still in there."""

    def wrapper_of(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with around():
                result = original(*args, **kwargs)
                then(result)
                return result

        return wrapper

    return wrapper_of
