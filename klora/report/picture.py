"""The selection map: which LoRA acts in which module at which step (K-LoRA, Fig. 6), above the ρ of each (Fig. 5)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from klora.fusion.plan import FusionPlan
from klora.fusion.policies.base import ScaledPolicy
from klora.lora.names import block_label, block_of
from klora.report.summary import WHO, absent_share, describe_rule
from klora.report.words import share_in_words
from klora.text import count_of, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image as Images

# Told apart by colour-blind people (Okabe & Ito's blue and orange) and, by their lightness, in print without colours.
COLOURS = {"c": "#0072B2", "s": "#E69F00", "b": "#2B2B2B", "-": "#E4E4E4"}

# Shown at half its size the type is still of 11 pixels.
DPI = 100
WIDTH, LEFT, RIGHT, SIDE = 1200, 92, 40, 130
TITLE, MAP, LABELS, PROFILE, BOTTOM = 158, 440, 96, 280, 116
LEGEND = 58
_POINTS = 72 / DPI
_NARROWEST = 26
_LETTER = 22
FONT: dict[str, Any] = {"fontsize": _LETTER * _POINTS}


class Theme(NamedTuple):
    """The colours of a picture; `cells` by the letter of a selection."""

    background: str
    ink: str
    faint: str
    line: str
    band: str
    cells: Mapping[str, str]


LIGHT = Theme("#FFFFFF", "#222222", "#4B5563", "#9CA3AF", "#F3EBDD", COLOURS)
_CELLS_IN_THE_DARK = {"c": "#3B97D3", "s": "#E69F00", "b": "#D5D9E0", "-": "#323B49"}
DARK = Theme("#111827", "#F3F4F6", "#C3C9D2", "#6B7280", "#2A2F3A", _CELLS_IN_THE_DARK)


class Block(NamedTuple):
    """Neighbouring modules [start, stop) of one block of the network."""

    label: str
    start: int
    stop: int


def selection_map(plan: FusionPlan, title: str | None = None) -> Images.Image:
    """Draw `plan`: one column per module in network order, one row per step, ρ below, subject share at the side.

    `title` names what was fused; the share is always added. Needs matplotlib, uses none of its global state.
    """
    drawing = _Drawing(plan, LIGHT, TITLE, TITLE + MAP + LABELS + PROFILE + BOTTOM)
    drawing.heading(title)
    cells = drawing.cells()
    profile = drawing.profile()
    drawing.block_labels(cells, cells, profile)
    return drawing.image()


def selection_cells(plan: FusionPlan, theme: Theme = LIGHT, width: int = WIDTH) -> Images.Image:
    """Draw only who acts where and when, without a heading; `cells_box` tells where the cells lie."""
    drawing = _Drawing(plan, theme, LEGEND, _cells_height(plan, width), width)
    drawing.legend(LEGEND)
    cells = drawing.cells()
    drawing.block_labels(cells, cells)
    return drawing.image()


def cells_box(plan: FusionPlan, width: int = WIDTH) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the cells in `selection_cells`, as fractions of its width and height."""
    height = _cells_height(plan, width)
    return LEFT / width, LEGEND / height, (width - SIDE - RIGHT) / width, (LEGEND + MAP) / height


def _cells_height(plan: FusionPlan, width: int) -> int:
    upright = any(_is_upright(block, plan, width) for block in blocks(plan))
    return LEGEND + MAP + (LABELS if upright else 48)


class _Drawing:
    """One figure of a plan; places are counted in pixels from the top left corner."""

    def __init__(self, plan: FusionPlan, theme: Theme, top: int, height: int, whole: int = WIDTH) -> None:
        from matplotlib.figure import Figure

        self.plan, self.theme, self.top, self.height = plan, theme, top, height
        self.whole, self.width = whole, whole - LEFT - SIDE - RIGHT
        self.figure: Figure = Figure(figsize=(whole / DPI, height / DPI), dpi=DPI, facecolor=theme.background)

    def image(self) -> Images.Image:
        """The finished picture."""
        return image_of(self.figure)

    def heading(self, title: str | None) -> None:
        """Write what was fused and what came of it, and below the picture the rule."""
        plan = self.plan
        heading = title or plan.policy.title
        self._line(14, heading, 30, self.theme.ink, fontweight="bold")
        self._line(58, describe_share(plan), 24, self.theme.ink)
        self._line(self.height - 40, describe_rule(plan), 20, self.theme.faint)
        self.legend(TITLE)

    def _line(self, top: int, text: str, pixels: int, colour: str, **font: Any) -> None:
        text = literal(text)
        # In a fixed width, as little smaller as it takes.
        size = pixels * min(1.0, (WIDTH - 60) / (0.56 * pixels * max(1, len(text))))
        self.figure.text(
            30 / WIDTH, 1 - top / self.height, text, va="top", fontsize=size * _POINTS, color=colour, **font
        )

    def legend(self, bottom: int) -> None:
        """Name the colours on a line of its own that ends at `bottom`; at the left, as buttons lie at the right."""
        from matplotlib.patches import Patch

        used = set("".join(self.plan.selections.values()))
        shown = {x: colour for x, colour in self.theme.cells.items() if x in used or x in "cs"}
        # As little smaller as it takes to end before the next heading.
        room = self.width / sum(_LETTER * (0.55 * len(WHO[x]) + 3) for x in shown)
        self.figure.legend(
            handles=[Patch(color=colour, label=WHO[x]) for x, colour in shown.items()],
            loc="lower left",
            bbox_to_anchor=(LEFT / self.whole, 1 - (bottom - 2) / self.height),
            ncols=4,
            frameon=False,
            borderaxespad=0,
            borderpad=0.3,
            handlelength=1,
            handleheight=1,
            columnspacing=1.4,
            labelcolor=self.theme.ink,
            fontsize=_LETTER * _POINTS * min(1.0, room),
        )

    def _place(self, left: int, top: int, width: int, height: int) -> Axes:
        box = (left / self.whole, 1 - (top + height) / self.height, width / self.whole, height / self.height)
        axes: Axes = self.figure.add_axes(box)
        dress(axes, self.theme, self.theme.faint)
        return axes

    def cells(self) -> Axes:
        """Draw who acts where and when, and the subject's share at the side."""
        from matplotlib.ticker import MaxNLocator

        axes = self._place(LEFT, self.top, self.width, MAP)
        if self.plan.modules:
            self._fill(axes)
        else:
            axes.set(xlim=(0, 1))
        axes.set(xticks=[], ylim=self._rows)
        axes.set_ylabel("step", color=self.theme.ink, **FONT)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=(1, 2, 5, 10)))
        self._share()
        return axes

    def _fill(self, axes: Axes) -> None:
        from matplotlib.colors import ListedColormap

        colours = self.theme.cells
        letters = np.array([list(selection) for selection in self.plan.selections.values()])
        codes = np.zeros(letters.shape, dtype=np.uint8)
        for code, letter in enumerate(colours):
            codes[letters == letter] = code
        axes.imshow(
            codes.T,
            cmap=ListedColormap(list(colours.values())),
            vmin=-0.5,
            vmax=len(colours) - 0.5,
            aspect="auto",
            interpolation="nearest",
            extent=(0, len(self.plan.modules), self.plan.steps, 0),
        )

    @property
    def _rows(self) -> tuple[int, int]:
        """The last and the first row, of the steps that are made."""
        made = self.plan.made or range(self.plan.steps)
        return made.stop, made.start

    def _share(self) -> None:
        axes = self._place(LEFT + self.width + 14, self.top, SIDE, MAP)
        shares = [math.nan if share is None else share for share in self.plan.subject_share()]
        rows = np.arange(self.plan.steps + 1)
        axes.fill_betweenx(rows, 0, [*shares, shares[-1]], step="post", color=self.theme.cells["c"], linewidth=0)
        axes.set(xlim=(0, 1), ylim=self._rows, yticks=[], xticks=[0, 1])
        axes.set_xticklabels(["0", "100 %"], ha="right")
        axes.get_xticklabels()[0].set_horizontalalignment("left")
        axes.set_title("share", color=self.theme.ink, pad=8, **FONT)

    def profile(self) -> Axes:
        """Draw the ρ of every module, and which values the scale takes."""
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes = self._place(LEFT, self.top + MAP + LABELS, self.width, PROFILE)
        thresholds = _thresholds(self.plan)
        low, high = _limits(self.plan, thresholds)
        axes.set(yscale="log", xlim=(0, max(1, len(self.plan.modules))), ylim=(low, high), xticks=[])
        if thresholds:
            self._draw_thresholds(axes, thresholds, low, high)
        self._draw_ratios(axes, low, high)
        axes.set_ylabel("ρ", color=self.theme.ink, **FONT)
        shaded = "; shaded: the values that the scale takes" if thresholds else ""
        axes.set_xlabel(f"module, in network order{shaded}", color=self.theme.faint, labelpad=12, **FONT)
        subs = (1, 1.5, 2, 3, 5, 7) if high / low < 6 else (1, 2, 5) if high / low < 60 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return axes

    def _draw_thresholds(self, axes: Axes, thresholds: list[float], low: float, high: float) -> None:
        start, end = thresholds[0], thresholds[-1]
        axes.axhspan(max(min(thresholds), low), max(*thresholds, low), color=self.theme.band, linewidth=0)
        marks = [(start, "start"), (end, "end")]
        for value, name in [(start, "start, end")] if math.isclose(start, end) else marks:
            if low <= value <= high:
                axes.axhline(value, color=self.theme.faint, linewidth=1.5, linestyle="--")
                place = axes.get_yaxis_transform()
                axes.text(1.012, value, name, transform=place, va="center", color=self.theme.ink, **FONT)

    def _draw_ratios(self, axes: Axes, low: float, high: float) -> None:
        """Draw each module's ρ in the colour of the LoRA that always acts there, dark where both have their steps.

        One that lies beyond the axis (0, infinite) is a triangle at the edge.
        """
        groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for i, module in enumerate(self.plan.modules):
            if module.rho is None:
                continue
            letters = set(self.plan.selections[module.name])
            colour = self.theme.cells[letters.pop() if len(letters) == 1 else "b"]
            marker = "^" if module.rho > high else "v" if module.rho < low else "o"
            groups.setdefault((marker, colour), []).append((i + 0.5, min(max(module.rho, low), high)))
        size = min(60.0, max(10.0, 6000 / max(1, len(self.plan.contested))))
        for (marker, colour), points in groups.items():
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=size, marker=marker, color=colour, linewidth=0, zorder=3)

    def block_labels(self, cells: Axes, *panels: Axes) -> None:
        """Draw the borders of the blocks through the panels, and their names below `cells` where there is room."""
        found, column = blocks(self.plan), self.width / max(1, len(self.plan.modules))
        if column > 30:
            for start in range(1, found[-1].stop if found else 0):
                cells.axvline(start, color=self.theme.background, linewidth=0.5, alpha=0.4)
        for block in found[1:]:
            for axes in panels:
                colour = self.theme.background if axes is cells else self.theme.line
                axes.axvline(block.start, color=colour, linewidth=1.5)
        for block in found:
            if (block.stop - block.start) * column < _NARROWEST:
                continue
            cells.annotate(
                literal(block_label(block.label)),
                ((block.start + block.stop) / 2, 0),
                xycoords=cells.get_xaxis_transform(),
                xytext=(0, -8),
                textcoords="offset points",
                ha="center",
                va="top",
                rotation=90 if _is_upright(block, self.plan, self.whole) else 0,
                annotation_clip=False,
                color=self.theme.ink,
                **FONT,
            )


def image_of(figure: Figure) -> Images.Image:
    """The finished picture, drawn without any window or global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def dress(axes: Axes, theme: Theme, ticks: str) -> None:
    """Give axes the colours of a theme, and their ticks a colour and the size of all type."""
    axes.set_facecolor(theme.background)
    axes.tick_params(labelsize=FONT["fontsize"], colors=ticks)
    axes.spines[:].set_color(theme.line)


def literal(text: str) -> str:
    """Text of one line that is drawn as it is written: a "$" of a file's name or key begins no formula."""
    return one_line(text).replace("$", r"\$")


def describe_share(plan: FusionPlan) -> str:
    """Say on one line what came of it: the subject's share, when it has it, and of how many steps."""
    steps = count_of(plan.steps, "step")
    if plan.made and len(plan.made) < plan.steps:
        steps = f"steps {plan.made.start + 1} to {plan.made.stop} of {plan.steps}"
    if plan.share is None:
        return f"{absent_share(plan)} · {steps}"
    share, when = share_in_words(plan)
    return ", ".join(filter(None, (f"subject {share}", when))) + f" · {steps}"


def blocks(plan: FusionPlan) -> list[Block]:
    """The runs of neighbouring modules that lie in one block, in network order."""
    found, start = [], 0
    for label, run in itertools.groupby(plan.modules, key=lambda module: block_of(module.name)):
        stop = start + len(list(run))
        found.append(Block(label, start, stop))
        start = stop
    return found


def _thresholds(plan: FusionPlan) -> list[float]:
    """What ρ must reach at each step made, and at the end; nothing where the policy has no scale."""
    policy, made = plan.policy, plan.made or range(plan.steps)
    if not isinstance(policy, ScaledPolicy):
        return []
    return [policy.scale(i / plan.steps) * 2.0**plan.balance for i in range(made.start, made.stop + 1)]


def _limits(plan: FusionPlan, thresholds: list[float]) -> tuple[float, float]:
    """The ends of the ρ axis: all finite ρ and scale(0) and scale(1), with room, over at most 8 decades."""
    seen = [module.rho for module in plan.contested if module.rho and math.isfinite(module.rho)]
    seen += [value for value in (*thresholds[:1], *thresholds[-1:]) if value > 0]
    if not seen:
        return 0.1, 10.0
    low, high = min(seen) / 1.4, max(seen) * 1.4
    return max(low, high / 1e8), high


def _is_upright(block: Block, plan: FusionPlan, width: int) -> bool:
    """Whether a block's label stands on end, for want of room."""
    space = (block.stop - block.start) * (width - LEFT - SIDE - RIGHT) / max(1, len(plan.modules))
    return _NARROWEST <= space <= 13 * len(block_label(block.label))
