"""Pictures of a grid of shares, each judged by the pair's own LoRAs as soon as it is sampled."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klora.balance.found import Found, FoundShares
from klora.balance.parts import Parts
from klora.balance.search import PLACES, Candidate, best_of
from klora.errors import KloraError
from klora.webui.messages import comment, reason_of
from klora.webui.options import score_cache

if TYPE_CHECKING:
    from PIL.Image import Image

    from klora.balance.judge import Model

CELL, JUDGED = "klora_judged_cell", "klora_judged_picture"
"""Where a processing object keeps which cell of a grid it is, and what was judged of its picture."""
_BAR, _INK, _BEST = "#ffffff", "#222222", "#c8efc8"


@dataclass(frozen=True)
class Cell:
    """A share, and all shares of its grid, in order."""

    share: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Judged:
    """The parts of both LoRAs in a picture, and what a share is found for by it."""

    parts: Parts
    found: Found


def is_judged(p: Any) -> bool:
    """Whether a processing object's picture is to be judged; a hires pass starts in the middle, and is not."""
    return getattr(p, CELL, None) is not None and not getattr(p, "enable_hr", False)


def judge_picture(p: Any, model: Model, latents: Any, found: Found) -> None:
    """Keep on `p` how much of each LoRA is in a picture, by its latents; an interrupt ends it, and an error is said."""
    from klora.balance.judge import judge

    setattr(p, JUDGED, None)
    state = importlib.import_module("modules.shared").state
    before = getattr(state, "textinfo", None)

    def show(done: int, total: int) -> None:
        state.textinfo = f"K-LoRA: judging, {done} of {total}"
        if _stopped(state):
            raise _StoppedError

    try:
        if not _stopped(state):
            setattr(p, JUDGED, Judged(judge(model, [latents[:1].detach()], PLACES, show)[0], found))
    except _StoppedError:
        pass
    except Exception as error:
        comment(p, f"the picture is not judged: {reason_of(error)}")
    finally:
        state.textinfo = before


class _StoppedError(Exception):
    """The user has stopped it."""


def _stopped(state: Any) -> bool:
    return bool(getattr(state, "interrupted", False) or getattr(state, "skipped", False))


class Judgement:
    """The judged pictures of one grid as they come."""

    def __init__(self) -> None:
        self._shares: tuple[float, ...] = ()
        self._cells: list[tuple[Candidate, Image]] = []

    def take(self, p: Any, processed: Any) -> None:
        """Write under a cell's picture what is in it, and after the last one, mark the best and say which it is."""
        cell, judged = getattr(p, CELL, None), getattr(p, JUDGED, None)
        if cell is not None and not hasattr(p, JUDGED):
            comment(p, "not judged: A1111 and the Forge family alone do that, for pictures without a hires pass")
        if cell is None or judged is None or not processed.images:
            return
        if cell.shares != self._shares or cell.share == cell.shares[0]:
            self._shares, self._cells = cell.shares, []
        image = with_figures(processed.images[0], judged.parts)
        processed.images = [image, *processed.images[1:]]
        self._cells.append((Candidate(cell.share, judged.parts), image))
        if len(self._cells) == len(self._shares):
            self._finish(p, judged.found)

    def _finish(self, p: Any, found: Found) -> None:
        try:
            best = best_of([candidate for candidate, _ in self._cells])
        except KloraError as error:
            comment(p, str(error))
            return
        for candidate, image in self._cells:
            if candidate is best:
                # In place: the host puts the grid together of the very pictures it was given.
                _write(image, candidate.parts, best=True)
        found_shares().keep(found, best.share)
        comment(p, f"share {best.share:g} has most of both: {best.parts}")


def found_shares() -> FoundShares:
    """The shares found, beside the scores."""
    return FoundShares(score_cache().folder)


def with_figures(picture: Image, parts: Parts) -> Image:
    """A picture with a bar below it that says how much of each LoRA is in it."""
    from PIL import Image as Images

    larger = Images.new("RGB", (picture.width, picture.height + _height(picture.width)), _BAR)
    larger.paste(picture, (0, 0))
    _write(larger, parts)
    return larger


def _height(width: int) -> int:
    return max(14, width // 12)


def _write(picture: Image, parts: Parts, best: bool = False) -> None:
    """Write the bar at the bottom of a picture that has one."""
    from PIL import ImageDraw

    from klora.report.sheet import font

    height = _height(picture.width)
    draw, top = ImageDraw.Draw(picture), picture.height - height
    draw.rectangle((0, top, picture.width, picture.height), fill=_BEST if best else _BAR)
    text = f"{'★ ' if best else ''}{parts}"
    size = height * 2 // 3
    while size > 6 and font(size).getlength(text) > picture.width - 4:
        size -= 1
    draw.text((picture.width // 2, top + height // 2), text, fill=_INK, font=font(size), anchor="mm")
