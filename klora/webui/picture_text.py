"""What the text of a picture says of K-LoRA: of that picture alone, for each of its passes, what acted in it.

The host keeps one dictionary of keys for a processing object, which may make many pictures, one prompt after another.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from klora.fusion.plan import FusionPlan
from klora.settings import Settings
from klora.webui.infotext import PREFIX, SHARE_KEY, share_text, to_infotext
from klora.webui.messages import ERROR
from klora.webui.requested_fusion import RequestedFusion

HIRES = f"{PREFIX}hires"
_OF_JOB = "klora_text_of_job"
_SHORT = 12


def begin_job(p: Any) -> None:
    """Forget what an earlier job of the same processing object has left."""
    vars(p).pop(_OF_JOB, None)
    _forget(p)


def keep_for_job(p: Any) -> None:
    """Have what stands in the text now stand in that of every picture of this job."""
    if kept := _ours(p):
        setattr(p, _OF_JOB, kept)


def begin_picture(p: Any) -> None:
    """Forget what the picture before has left."""
    _forget(p)
    p.extra_generation_params.update(getattr(p, _OF_JOB, {}))


def announce(p: Any, plan: FusionPlan, given: Settings) -> None:
    """Write what is going to act, for the host saves a text before it makes the picture; the share is not known yet."""
    p.extra_generation_params.update(to_infotext(plan.settings, given))


def tell(p: Any, first: list[FusionPlan], hires: list[FusionPlan], given: dict[bool, Settings]) -> None:
    """Write what acted in each pass; a plan each, or several where the model changed within the pass.

    Of the second pass only what differs from the first is written, and always the share.
    """
    error = p.extra_generation_params.get(ERROR)
    begin_picture(p)
    entries = _of_pass(first, given.get(False))
    p.extra_generation_params.update(entries)
    if hires:
        for key, value in _of_pass(hires, given.get(True)).items():
            if key == SHARE_KEY or entries.get(key) != value:
                p.extra_generation_params[f"{HIRES} {key.removeprefix(PREFIX)}"] = value
    elif first and getattr(p, "enable_hr", False):
        p.extra_generation_params[HIRES] = "off"
    if error is not None:
        p.extra_generation_params[ERROR] = error


def add_hashes(p: Any, fusion: RequestedFusion) -> None:
    """Name all files in "Lora hashes", by which image sites and a later paste recognise them.

    The host's own hashes are those of the files as they were when it listed them.
    """
    shared = importlib.import_module("modules.shared")
    if not shared.opts.lora_add_hashes_to_infotext or getattr(shared.cmd_opts, "no_hashing", False):
        return
    hashes = dict(getattr(p, "lora_hashes", None) or {})
    for one, lora in zip((*fusion.subject, *fusion.style), fusion.pair.loras, strict=True):
        hashes[one.name.replace(":", "").replace(",", "")] = lora.model_hash[:_SHORT]
    p.lora_hashes = hashes
    p.extra_generation_params["Lora hashes"] = ", ".join(f"{name}: {value}" for name, value in hashes.items())


def _of_pass(plans: list[FusionPlan], given: Settings | None) -> dict[str, Any]:
    if not plans or given is None:
        return {}
    entries = to_infotext(plans[0].settings, given)
    chosen = [(plan.share, len(plan.made or range(plan.steps))) for plan in plans]
    if all(plan.chooses for plan in plans) and all(share is not None for share, _ in chosen):
        share = math.fsum((share or 0.0) * steps for share, steps in chosen) / sum(steps for _, steps in chosen)
        entries[SHARE_KEY] = share_text(share)
    return entries


def _ours(p: Any) -> dict[str, Any]:
    return {key: value for key, value in p.extra_generation_params.items() if key.startswith(PREFIX)}


def _forget(p: Any) -> None:
    for key in _ours(p):
        del p.extra_generation_params[key]
