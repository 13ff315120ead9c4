"""A fusion at work on one processing object of a host that runs diffusers pipelines, from the tag to the last pass."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from klora.engine.compiled import Calls
from klora.engine.session import Session
from klora.engine.wrapping import Wrappers
from klora.errors import KloraError, SettingsError, named_by
from klora.hosts.diffusers import follow
from klora.hosts.guidance import make_guidance
from klora.hosts.sdnext import SdnextHost, is_detail, is_refined, own_detail_prompt
from klora.hosts.webui.lora_library import Library
from klora.webui.acted import Acted, report
from klora.webui.attached_sessions import AttachedSessions
from klora.webui.messages import comment, fail, reason_of
from klora.webui.options import reference_folder
from klora.webui.picture_text import add_hashes
from klora.webui.prompt_tag import NAME
from klora.webui.requested_fusion import RequestedFusion

WITHOUT_REFINER = "SD.Next's refiner is a model of its own; it goes on without K-LoRA, as it does without LoRAs"

WITHOUT_DETAILER = f"the detailer's own prompt has no <{NAME}:…> tag; it goes on without K-LoRA"


class EncodedWith:
    """The files that act in a prompt's encoding, as they are now: stands among the prompt's tags, like one of them.

    The host keeps conditionings by what its tags hold, which are names alone.
    """

    def __init__(self, fusion: RequestedFusion) -> None:
        self.items = [str((part.sha256, part.strength, *part.deltas)) for part in fusion.text_parts()]
        self.positional: list[str] = []
        self.named: dict[str, str] = {}


class PipelineFusion:
    """What one processing object of SD.Next has of K-LoRA.

    The host tells nobody of an evaluation, so a session follows the calls of the denoiser itself. It acts from the
    encoding of the prompt on; the second pass of a hires fix has a session of its own.
    """

    def __init__(self, p: Any, attached: AttachedSessions) -> None:
        self.p = p
        self._attached = attached
        self._fusion: RequestedFusion | None = None
        self._session: Session | None = None
        self._hires = False
        self._acted = Acted(p)
        self._running = ExitStack()
        self._wrappers = Wrappers()

    def begin(self, fusion: RequestedFusion | None) -> None:
        """Take what the prompt of the coming pass asks for; KloraError where it cannot act in the loaded model."""
        self._attached.detach(self)
        self._fusion = fusion
        if fusion is not None:
            self._acted.begin()
            self._attached.attach(self)

    def end(self) -> None:
        """Leave the model as it was."""
        self.begin(None)

    def attach(self) -> None:
        """Put on what has been begun."""
        assert self._fusion is not None
        self._bind(self._fusion, hires=bool(self.p.is_hr_pass))
        add_hashes(self.p, self._fusion)
        if is_refined(self.p):
            comment(self.p, WITHOUT_REFINER)
        if (details := own_detail_prompt(self.p)) and f"<{NAME}:" not in details:
            comment(self.p, WITHOUT_DETAILER)
        self._wrappers.wrap(self.p, "init_hr", self._before_hires)

    def detach(self) -> None:
        """Take everything off; does nothing when it is off."""
        self._release()
        self._wrappers.remove()

    def stop(self, error: Exception) -> None:
        """Go on without K-LoRA and say why."""
        self.end()
        fail(self.p, reason_of(error), "stopped")

    def take_out(self, **parts: list[str] | None) -> None:
        """Have the host load its own LoRAs without those of the fusion's files, which K-LoRA alone applies.

        `parts` is what the host tells its handlers of tags beside these.
        """
        assert self._fusion is not None
        ours, names = set(self._fusion.paths), Library()
        tags = self.p.network_data.get("lora", [])
        same = [params for params in tags if _path(names, params) in ours]
        for params in same:
            # For a handler whose turn comes later; `items`, by which conditionings are cached, stays as it is.
            params.positional, params.named = [params.positional[0], "0"], {}
            comment(self.p, f"{params.positional[0]} is asked for by another tag too; K-LoRA alone applies it")
        if same:
            # For one whose turn has been.
            handler = importlib.import_module("modules.extra_networks").extra_network_registry["lora"]
            told = {name: part for name, part in parts.items() if part is not None}
            handler.activate(self.p, [params for params in tags if params not in same], **told)

    def _bind(self, fusion: RequestedFusion, hires: bool) -> None:
        shared = importlib.import_module("modules.shared")
        host = SdnextHost(shared.sd_model)
        if fusion.settings.passes != "both" and self.p.enable_hr and not hasattr(self.p, "init_hr"):
            raise SettingsError("passes", "this tab does not tell when its second pass begins; leave it at both")
        with named_by(*fusion.paths), named_by(folder=reference_folder()):
            fusion = fusion.for_model(host)
            plan = fusion.plan(host.device, hires)
            session = host.session(fusion.pair, plan)
            guidance = make_guidance(plan.settings, host.device)
        # They are called in the order in which they are put on.
        self._call(host.running, lambda *_: host.renew(shared.sd_model))
        self._running.enter_context(follow(host, session, guidance, self.stop))
        self._call(host.running, lambda *_: self._acted.step(session))
        self._running.enter_context(session)
        self._session, self._hires = session, hires

    def _call(self, model: nn.Module, function: Callable[..., None]) -> None:
        """Call a function before each call of a model, compiled or not."""
        calls = Calls(model, function)
        self._running.callback(calls.remove)
        calls.attach()

    def _before_hires(self, init_hr: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = init_hr(*args, **kwargs)
            try:
                if self._fusion is not None and self.p.is_hr_pass:
                    self._release()
                    self._bind(self._fusion, hires=True)
            except Exception as error:
                self.stop(error)
            return result

        return wrapper

    def _release(self) -> None:
        self._running.close()
        if self._session is not None and self._fusion is not None:
            # One that was begun for a pass whose own prompt asks for nothing has followed none.
            if self._session.sampling is not None:
                report(self.p, self._session)
            self._acted.note(self._session, self._hires, self._fusion.tag.settings)
            if not is_detail(self.p):
                self._acted.tell()
        self._session = None


def _path(names: Library, params: Any) -> Any:
    """The file of a LoRA's tag, None where it names none."""
    try:
        return names.find(params.positional[0]).path if params.positional else None
    except KloraError:
        return None
