"""The host's handler of `<klora:…>` tags, and the callback before each evaluation of the model.

Both are called for every processing object, also those that run no scripts of ours (ADetailer's inner passes): a
fusion hangs on the processing object alone."""

from __future__ import annotations

import importlib
from typing import Any

from klora.errors import named_by
from klora.fusion.policies import make_policy, resolve
from klora.hosts.sdnext import is_detail, is_pipeline
from klora.hosts.webui.loaded_model import model_of
from klora.hosts.webui.lora_library import Library
from klora.webui.active_fusion import ActiveFusion
from klora.webui.attached_sessions import AttachedSessions
from klora.webui.messages import comment, fail, reason_of, scoring_shown
from klora.webui.picture_text import announce, begin_picture
from klora.webui.pipeline_fusion import EncodedWith, PipelineFusion
from klora.webui.prompt_tag import NAME, Tag
from klora.webui.references import with_references
from klora.webui.requested_fusion import RequestedFusion
from klora.webui.sides import find_side, open_pair

STATE = "klora_active_fusion"
"""Where a processing object keeps its ActiveFusion or PipelineFusion."""


def make_extra_network() -> Any:
    """Make the host's handler of `<klora:…>` tags."""
    extra_networks: Any = importlib.import_module("modules.extra_networks")

    class ExtraNetworkKlora(extra_networks.ExtraNetwork):  # type: ignore[misc]
        """Starts a fusion for every processing object whose prompt holds the tag."""

        def __init__(self) -> None:
            super().__init__(NAME)
            self.attached = AttachedSessions()

        def activate(
            self,
            p: Any,
            params_list: list[Any],
            step: int = 0,
            include: list[str] | None = None,
            exclude: list[str] | None = None,
        ) -> None:
            """Take the tags of a prompt; called for every prompt, mostly with none.

            SD.Next names the `step`, where it calls again in the middle of sampling, and which parts of its pipeline
            its own LoRAs are to `include` and `exclude`.
            """
            if step:
                return
            # Whatever the end of an earlier picture has left on; a pass that is under way puts its own on again.
            self.attached.detach_all()
            if _begins_picture(p):
                begin_picture(p)
            active = getattr(p, STATE, None)
            # What is made of a copy of `p`, such as a detail, has a fusion of its own.
            if active is None or active.p is not p:
                if not params_list and not _in_hires_prompt(p):
                    return
                active = self._active(p)
                setattr(p, STATE, active)
            tags = [params for params in params_list if not isinstance(params, EncodedWith)]
            try:
                fusion = self._fusion(p, tags) if tags else None
                active.begin(fusion)
                if isinstance(active, PipelineFusion) and fusion is not None:
                    params_list[:] = [*tags, EncodedWith(fusion)]
                    active.take_out(include=include, exclude=exclude)
            except Exception as error:
                active.begin(None)
                fail(p, reason_of(error))

        def deactivate(self, p: Any, force: bool = False) -> None:
            """Let go of a pipeline; elsewhere the end of sampling has taken everything off."""
            on_processed(p)

        def _active(self, p: Any) -> ActiveFusion | PipelineFusion:
            loaded = importlib.import_module("modules.shared").sd_model
            return PipelineFusion(p, self.attached) if is_pipeline(loaded) else ActiveFusion(p, self.attached)

        def _fusion(self, p: Any, params_list: list[Any]) -> RequestedFusion:
            tag = Tag.parse([str(item) for item in params_list[0].items])
            make_policy(resolve(tag.settings, None))
            if len(params_list) > 1:
                comment(p, f"the prompt holds {len(params_list)} <{NAME}:…> tags; only the first, {tag}, counts")
            names = Library()
            subject, style = find_side(tag.subject, "subject", names), find_side(tag.style, "style", names)
            with named_by(*(one.lora.path for one in (*subject, *style))):
                pair = open_pair(subject, style)
            fusion = RequestedFusion(tag, subject, style, pair, with_references(tag.settings))
            with named_by(*fusion.paths):
                self._check(p, fusion)
            return fusion

        def _check(self, p: Any, fusion: RequestedFusion) -> None:
            shared = importlib.import_module("modules.shared")
            host = model_of(shared.sd_model)
            # Refused here, and not at the first evaluation, so that the text encoder is left alone too.
            fusion = fusion.for_model(host)
            with scoring_shown(fusion.tag.subject, fusion.tag.style) as on_scored:
                plan = fusion.plan(host.device, on_scored=on_scored).with_steps(p.steps)
            if _begins_picture(p):
                announce(p, plan, fusion.tag.settings)

    return ExtraNetworkKlora()


def _begins_picture(p: Any) -> bool:
    return not getattr(p, "is_hr_pass", False) and not is_detail(p)


def _in_hires_prompt(p: Any) -> bool:
    # Activated inside p.sample, where it is too late to wrap that.
    return bool((getattr(p, "hr_extra_network_data", None) or {}).get(NAME))


def on_processed(p: Any) -> None:
    """Let go of a pipeline: called by SD.Next when a processing object is done, however it ended."""
    active = getattr(p, STATE, None)
    if isinstance(active, PipelineFusion):
        active.end()


def on_evaluation(params: Any) -> None:
    """Follow a sampler: called by the host before each evaluation of the model, for every processing object."""
    denoiser = params.denoiser
    active = getattr(getattr(denoiser, "p", None), STATE, None)
    if active is None:
        return
    active.evaluation = params
    try:
        active.evaluate(denoiser, float(params.sigma.flatten()[0]))
    except Exception as error:
        # The host swallows what a callback raises; a picture must not be made by half a fusion in silence.
        active.stop(error)
