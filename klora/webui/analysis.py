"""What a pair would do, before any picture is made."""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from klora.errors import KloraError, named_by
from klora.webui.analysis_page import View, page, rule_line
from klora.webui.analysis_run import COMPARING, Hear, Result
from klora.webui.args import FusionRequest
from klora.webui.messages import scoring_shown, without_effect
from klora.webui.prompt_tag import Tag

if TYPE_CHECKING:
    from PIL import Image as Images

    from klora.fusion.plan import FusionPlan
    from klora.fusion.scores import OnScored
    from klora.pair import Pair
    from klora.report.overlap import Overlap
    from klora.report.picture import Theme


def plan_of(request: FusionRequest, hear: OnScored | None = None) -> tuple[Pair, FusionPlan]:
    """Open the two files, which the host must list, and decide as for the next picture with the loaded model.

    Where none is loaded, or the pair is for another, which the warnings then say, modules go by the files' own names.
    `hear` is told how many modules have been scored, of how many. Raises KloraError where the files do not go together.
    """
    from klora.hosts.webui.lora_library import Library
    from klora.webui.sides import find_side, open_pair

    names = Library()
    subject, style = (find_side(getattr(request, side), side, names) for side in ("subject", "style"))
    with named_by(*(one.lora.path for one in (*subject, *style))):
        pair, warnings = _in_loaded_model(open_pair(subject, style))
        with scoring_shown(request.subject, request.style) as on_scored:
            plan = pair.plan(request.settings, on_scored=_both(on_scored, hear))
        return pair, dataclasses.replace(plan, warnings=(*plan.warnings, *warnings))


def _both(first: OnScored, second: OnScored | None) -> OnScored:
    def hear(done: int, total: int) -> None:
        first(done, total)
        if second is not None:
            second(done, total)

    return hear


def _in_loaded_model(pair: Pair) -> tuple[Pair, list[str]]:
    """The pair under the names of the loaded model, if any, and what of it does not fit that model."""
    from klora.engine.left_out import left_out
    from klora.hosts.webui.loaded_model import loaded_host

    host = loaded_host()
    if host is None:
        return pair, without_effect(pair, [])
    try:
        with named_by(*(Path(lora.where) for lora in pair.loras)):
            pair = host.fit(pair)
    except KloraError as error:
        return pair, [str(error)]
    return pair, without_effect(pair, left_out(pair, host.sites(), host.text_sites(), {"": host.diffusion_model}))


def analyse(request: FusionRequest, view: View, hear: Hear) -> Result:
    """What the pair would do over that many steps, and the rule with its numbers, as HTML; `hear` how far it is."""
    from klora.report.overlap import overlap_of

    settings = dataclasses.replace(request.settings, steps=view.steps)
    pair, plan = plan_of(dataclasses.replace(request, settings=settings), hear)
    title = f"{request.subject} × {request.style}"
    overlap = overlap_of(pair, plan, partial(hear, doing=COMPARING))
    drawn = _cells(plan, view), overlap, _bars(overlap, view)
    return page(title, pair, plan, *drawn, _found(pair)), rule_line(plan)


def _found(pair: Pair) -> float | None:
    """The share that was found for the pair with the loaded checkpoint; None where there is none."""
    from klora.hosts.webui.host import WebuiHost
    from klora.hosts.webui.loaded_model import loaded_host
    from klora.webui.judged import found_shares

    host = loaded_host()
    return found_shares().get(host.found_for(pair)) if isinstance(host, WebuiHost) else None


def _bars(overlap: Overlap, view: View) -> Images.Image | None:
    if not _can_draw() or overlap.whole is None:
        return None
    from klora.report.overlap_picture import overlap_picture

    return overlap_picture(overlap, None, _theme(view), _width(view))


def _cells(plan: FusionPlan, view: View) -> Images.Image | None:
    if not _can_draw():
        return None
    from klora.report.picture import selection_cells

    return selection_cells(plan, _theme(view), _width(view))


def _width(view: View) -> int:
    """What is drawn for a narrow page is half as wide, so that its type can be read when it is made to fit."""
    from klora.report.picture import WIDTH

    return WIDTH if view.width >= WIDTH // 2 else WIDTH // 2


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _theme(view: View) -> Theme:
    from klora.report.picture import DARK, LIGHT

    return DARK if view.dark else LIGHT


def draw(plan: FusionPlan, title: str) -> Images.Image:
    """Draw the selection map; KloraError without matplotlib."""
    if not _can_draw():
        raise KloraError("the selection map needs matplotlib; install it into the WebUI's environment")
    from klora.report.picture import selection_map

    _make_temporary_folder()
    return selection_map(plan, title)


def _make_temporary_folder() -> None:
    """Make the folder through which the host shows pictures: a fresh Forge Neo has none, and then shows nothing."""
    folder = getattr(importlib.import_module("modules.shared").opts, "temp_dir", None)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)


def gallery_map(plan: FusionPlan, tag: Tag | None) -> Images.Image:
    """Draw the map of what a picture was made with."""
    return draw(plan, _title(tag))


def map_text(plan: FusionPlan, tag: Tag | None) -> str:
    """The text that the gallery shows below the map."""
    from klora.report.summary import describe_rule

    return f"{_title(tag)}: {describe_rule(plan)}"


def _title(tag: Tag | None) -> str:
    return f"{tag.subject} × {tag.style}" if tag is not None else "K-LoRA"
