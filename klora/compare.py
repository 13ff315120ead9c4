"""The work of `klora compare`: one pair by several methods, on one contact sheet, with the time of each picture."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from klora.engine.session import Session
from klora.errors import KloraError
from klora.generate import (
    Painted,
    Request,
    call_arguments,
    next_number,
    open_pipeline,
    paint,
    session_notices,
    write_picture,
)
from klora.methods import Method
from klora.pair import Pair
from klora.report.files import OutputFile, output_folder, png_bytes
from klora.report.sheet import contact_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 320
"""Pixels of the longer side of a picture on the sheet, where it is larger; its file keeps them all."""
HEADER = ("policy", "seed", "seconds_per_image", "forwards_per_step", "picture", "note")


@dataclass
class Row:
    """What came of one method: its pictures, or why it has none."""

    method: Method
    pictures: list[Image] = field(default_factory=list)
    table: list[tuple[str, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    forwards: float = 0.0
    reason: str | None = None

    @property
    def cost(self) -> str:
        """Say what a picture costs."""
        return f"{count_of(self.forwards, 'forward')} per step, {median(self.seconds):.3g} s per image"


def count_of(number: float, noun: str) -> str:
    """Write a number with its noun, as in: 2 forwards."""
    return f"{number:.3g} {noun}{'' if number == 1 else 's'}"


def compare_pair(request: Request, methods: Sequence[Method], warn: Callable[[str], None]) -> Iterator[str]:
    """Paint the pictures of a request by every method; write each, the contact sheet and the table, and say where.

    A method that does not run on this model or with this pair is named with its reason. Raises KloraError for a
    model or a file that does not do, and where no method runs.
    """
    Pair.open(request.subject, request.style)
    pipe = open_pipeline(request)
    call_arguments(pipe, request)
    folder = output_folder(request.out)
    sheet, table = (OutputFile.check(folder / name) for name in ("contact-sheet.png", "times.csv"))
    rows = []
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            warn(text)

    for method in methods:
        rows.append(_row(pipe, request, method, say_once))
        yield f"{method.name}: {rows[-1].reason or rows[-1].cost}"
    done = [row for row in rows if row.pictures]
    if not done:
        raise KloraError(f"none of the policies runs here; {methods[0].name}: {rows[0].reason}")
    sheet.write(png_bytes(_sheet(done, _seeds(request))))
    yield f"contact sheet: {sheet.path}"
    table.write(csv_bytes([HEADER, *(line for row in rows for line in row.table)]))
    yield f"times: {table.path}"


def _seeds(request: Request) -> range:
    return range(request.seed, request.seed + request.images)


def _row(pipe: Any, request: Request, method: Method, warn: Callable[[str], None]) -> Row:
    row = Row(method)

    def announce(number: int, session: Session) -> None:
        for notice in session_notices(session) if number == 1 else ():
            warn(notice)
        cost = count_of(row.forwards or method.forwards, "forward")
        pipe.set_progress_bar_config(
            desc=f"{method.name}, picture {number} of {request.images}, {cost} per step", leave=False
        )

    asked = dataclasses.replace(request, settings=method.settings)
    with closing(paint(pipe, asked, _seeds(request), announce)) as pictures:
        while True:
            try:
                painted = next(pictures, None)
            except KloraError as error:
                return _failed(method, error)
            if painted is None:
                return row
            _add(row, painted, request.out)


def _failed(method: Method, error: KloraError) -> Row:
    reason = f"cannot run: {error}"
    return Row(method, table=[(method.name, "", "", "", "", reason)], reason=reason)


def _add(row: Row, painted: Painted, folder: Path) -> None:
    seed = painted.facts["seed"]
    path = folder / f"{next_number(folder):05d}-{row.method.slug}-{seed}.png"
    write_picture(painted.image, path, painted.facts)
    small = painted.image.copy()
    small.thumbnail((CELL, CELL))
    row.pictures.append(small)
    row.seconds.append(painted.seconds)
    row.forwards = painted.forwards
    row.table.append((row.method.name, str(seed), f"{painted.seconds:.4f}", f"{painted.forwards:g}", path.name, ""))


def _sheet(rows: Sequence[Row], seeds: Sequence[int]) -> Image:
    groups = [[[picture] for picture in row.pictures] for row in rows]
    return contact_sheet(
        groups, [(f"seed {seed}", "") for seed in seeds], [(row.method.name, row.cost) for row in rows]
    )


def csv_bytes(lines: Sequence[Sequence[str]]) -> bytes:
    """Write lines as a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()
