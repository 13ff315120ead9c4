"""A contact sheet: pictures side by side, with rows and columns named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image as Images
    from PIL.ImageFont import FreeTypeFont

_GAP, _GROUP_GAP, _MARGIN, _HEAD = 4, 20, 24, 66
_INK, _FAINT = "#222222", "#666666"


def contact_sheet(
    groups: Sequence[Sequence[Sequence[Images.Image]]],
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, str]],
    side: int = 128,
) -> Images.Image:
    """Lay out `groups[row][column]`, each a list of pictures, `side` pixels wide when small.

    `columns` and `rows` are headings, each with a fainter second line. Small pictures are enlarged by a whole factor,
    pixel by pixel, so that what is seen is what was made.
    """
    from PIL import Image, ImageDraw

    first = groups[0][0][0]
    zoom = max(1, side // first.width)
    width, height = first.width * zoom, first.height * zoom
    count = len(groups[0][0])
    group = count * (width + _GAP) - _GAP
    title, small = font(18), font(13)
    label = 24 + int(max(max(title.getlength(a), small.getlength(b)) for a, b in rows))
    sheet = Image.new(
        "RGB",
        (
            2 * _MARGIN + label + len(columns) * (group + _GROUP_GAP) - _GROUP_GAP,
            2 * _MARGIN + _HEAD + len(rows) * (height + _GAP) - _GAP,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for i, heading in enumerate(columns):
        _heading(draw, (_MARGIN + label + i * (group + _GROUP_GAP), _MARGIN), heading, (title, small))
    for j, heading in enumerate(rows):
        top = _MARGIN + _HEAD + j * (height + _GAP)
        _heading(draw, (_MARGIN, top + height // 2 - 22), heading, (title, small))
        for i, pictures in enumerate(groups[j]):
            for k, picture in enumerate(pictures):
                left = _MARGIN + label + i * (group + _GROUP_GAP) + k * (width + _GAP)
                sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
    return sheet


def _heading(draw: object, place: tuple[int, int], heading: tuple[str, str], fonts: Sequence[FreeTypeFont]) -> None:
    for line, font, colour, down in zip(heading, fonts, (_INK, _FAINT), (0, 26), strict=True):
        draw.text((place[0], place[1] + down), line, fill=colour, font=font)  # type: ignore[attr-defined]


def font(size: int) -> FreeTypeFont:
    """The font that comes with matplotlib, which has the signs we write on every system."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
