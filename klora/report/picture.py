"""The selection map: which LoRA acts in which module at which step (K-LoRA, Fig. 6), above the ρ of each (Fig. 5)."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from klora.fusion.plan import FusionPlan
from klora.fusion.policies.base import ScaledPolicy
from klora.lora.names import block_of
from klora.report.summary import WHO, absent_share, describe_rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image as Images

# Told apart by colour-blind people (Okabe & Ito's blue and orange) and, by their lightness, in print without colours.
COLOURS = {"c": "#0072B2", "s": "#E69F00", "b": "#2B2B2B", "-": "#E4E4E4"}

DPI = 100
WIDTH, LEFT, RIGHT, SIDE = 1500, 84, 44, 120
TITLE, MAP, LABELS, PROFILE, BOTTOM = 84, 420, 66, 250, 56
HEIGHT = TITLE + MAP + LABELS + PROFILE + BOTTOM
_TEXT: dict[str, Any] = {"fontsize": 9, "color": "#333333"}


class Block(NamedTuple):
    """Neighbouring modules [start, stop) of one block of the network."""

    label: str
    start: int
    stop: int


def selection_map(plan: FusionPlan, title: str | None = None) -> Images.Image:
    """Draw `plan`: one column per module in network order, one row per step, ρ below, subject share at the side.

    `title` names what was fused; the share is always added. Needs matplotlib, uses none of its global state.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    width = WIDTH - LEFT - SIDE - RIGHT
    cells = _place(figure, LEFT, TITLE, width, MAP)
    share = _place(figure, LEFT + width + 10, TITLE, SIDE, MAP)
    profile = _place(figure, LEFT, TITLE + MAP + LABELS, width, PROFILE)
    _draw_heading(figure, plan, title)
    _draw_cells(cells, plan)
    _draw_share(share, plan)
    _draw_profile(profile, plan)
    _draw_blocks((cells, profile), blocks(plan), width / max(1, len(plan.modules)))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def blocks(plan: FusionPlan) -> list[Block]:
    """The runs of neighbouring modules that lie in one block, in network order."""
    found, start = [], 0
    for label, run in itertools.groupby(plan.modules, key=lambda module: block_of(module.name)):
        stop = start + len(list(run))
        found.append(Block(label, start, stop))
        start = stop
    return found


def _place(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    """Add axes at pixels counted from the top left corner."""
    box = (left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT)
    axes: Axes = figure.add_axes(box)
    axes.tick_params(labelsize=9, colors="#333333")
    for spine in axes.spines.values():
        spine.set_color("#888888")
    return axes


def _draw_heading(figure: Figure, plan: FusionPlan, title: str | None) -> None:
    from matplotlib.patches import Patch

    share = absent_share(plan) if plan.share is None else f"subject share {plan.share:.1%}"
    # A "$" in a file name would begin a formula.
    heading = f"{title or plan.policy.title} · {share}".replace("$", r"\$")
    left = LEFT / WIDTH
    figure.text(left, 1 - 14 / HEIGHT, heading, va="top", fontsize=14, fontweight="bold", color="#222222")
    figure.text(left, 1 - 46 / HEIGHT, describe_rule(plan), va="top", fontsize=10, color="#555555")
    used = set("".join(plan.selections.values()))
    patches = [Patch(color=colour, label=WHO[x]) for x, colour in COLOURS.items() if x in used or x in "cs"]
    figure.legend(
        handles=patches,
        loc="upper right",
        bbox_to_anchor=(1 - RIGHT / WIDTH, 1 - 34 / HEIGHT),
        ncols=4,
        frameon=False,
        fontsize=10,
    )


def _draw_cells(axes: Axes, plan: FusionPlan) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    if plan.modules:
        letters = np.array([list(selection) for selection in plan.selections.values()])
        codes = np.zeros(letters.shape, dtype=np.uint8)
        for code, letter in enumerate(COLOURS):
            codes[letters == letter] = code
        axes.imshow(
            codes.T,
            cmap=ListedColormap(list(COLOURS.values())),
            vmin=-0.5,
            vmax=len(COLOURS) - 0.5,
            aspect="auto",
            interpolation="nearest",
            extent=(0, len(plan.modules), plan.steps, 0),
        )
    else:
        axes.set(xlim=(0, 1), ylim=(plan.steps, 0))
    axes.set_xticks([])
    axes.set_ylabel("step", **_TEXT)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))


def _draw_share(axes: Axes, plan: FusionPlan) -> None:
    shares = [math.nan if share is None else share for share in plan.subject_share()]
    rows = np.arange(plan.steps + 1)
    axes.fill_betweenx(rows, 0, [*shares, shares[-1]], step="post", color=COLOURS["c"], linewidth=0)
    axes.set(xlim=(0, 1), ylim=(plan.steps, 0), yticks=[], xticks=[0, 0.5, 1])
    axes.set_xticklabels(["0", "50", "100 %"])
    axes.set_xlabel("subject share", **_TEXT)


def _draw_profile(axes: Axes, plan: FusionPlan) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    thresholds = _thresholds(plan)
    low, high = _limits(plan, thresholds)
    axes.set(yscale="log", xlim=(0, max(1, len(plan.modules))), ylim=(low, high))
    if thresholds:
        _draw_thresholds(axes, thresholds, low, high)
    _draw_ratios(axes, plan, low, high)
    axes.set_ylabel("ρ = S_c / (γ·S_s)", **_TEXT)
    axes.set_xlabel("module, in network order (shaded: the values that the scale takes)", **_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    subs = (1, 1.5, 2, 3, 5, 7) if high / low < 20 else (1, 2, 5) if high / low < 1000 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _thresholds(plan: FusionPlan) -> list[float]:
    """What ρ must reach at each step, and at the end; nothing where the policy has no scale."""
    policy = plan.policy
    if not isinstance(policy, ScaledPolicy):
        return []
    return [policy.scale(i / plan.steps) * 2.0**plan.balance for i in range(plan.steps + 1)]


def _draw_thresholds(axes: Axes, thresholds: list[float], low: float, high: float) -> None:
    start, end = thresholds[0], thresholds[-1]
    axes.axhspan(max(min(thresholds), low), max(*thresholds, low), color="#F3EBDD", linewidth=0)
    marks = [(start, "scale(0)"), (end, "scale(1)")]
    for value, name in [(start, "scale(0), scale(1)")] if math.isclose(start, end) else marks:
        if low <= value <= high:
            axes.axhline(value, color="#555555", linewidth=1, linestyle="--")
            axes.text(1.008, value, name, transform=axes.get_yaxis_transform(), va="center", **_TEXT)


def _draw_ratios(axes: Axes, plan: FusionPlan, low: float, high: float) -> None:
    """Draw each module's ρ in the colour of the LoRA that always acts there, dark where both have their steps.

    One that lies beyond the axis (0, infinite) is a triangle at the edge.
    """
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for i, module in enumerate(plan.modules):
        if module.rho is None:
            continue
        letters = set(plan.selections[module.name])
        colour = COLOURS[letters.pop()] if len(letters) == 1 else COLOURS["b"]
        marker = "^" if module.rho > high else "v" if module.rho < low else "o"
        groups.setdefault((marker, colour), []).append((i + 0.5, min(max(module.rho, low), high)))
    size = min(36.0, max(6.0, 4000 / max(1, len(plan.contested))))
    for (marker, colour), points in groups.items():
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=size, marker=marker, color=colour, linewidth=0, zorder=3)


def _limits(plan: FusionPlan, thresholds: list[float]) -> tuple[float, float]:
    """The ends of the ρ axis: all finite ρ and scale(0) and scale(1), with room, over at most 8 decades."""
    seen = [module.rho for module in plan.contested if module.rho and math.isfinite(module.rho)]
    seen += [value for value in (*thresholds[:1], *thresholds[-1:]) if value > 0]
    if not seen:
        return 0.1, 10.0
    low, high = min(seen) / 1.4, max(seen) * 1.4
    return max(low, high / 1e8), high


def _draw_blocks(panels: tuple[Axes, Axes], found: list[Block], column: float) -> None:
    """Draw the borders of the blocks through both panels and their labels between them; `column` in pixels."""
    cells = panels[0]
    if column > 30:
        for start in range(1, found[-1].stop if found else 0):
            cells.axvline(start, color="white", linewidth=0.5, alpha=0.4)
    for block in found[1:]:
        for axes in panels:
            axes.axvline(block.start, color="white" if axes is cells else "#BBBBBB", linewidth=1)
    for block in found:
        label, space = short_label(block.label), (block.stop - block.start) * column
        if space < 11:
            continue
        cells.annotate(
            label,
            ((block.start + block.stop) / 2, 0),
            xycoords=cells.get_xaxis_transform(),
            xytext=(0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            rotation=0 if space > 8 * len(label) else 90,
            annotation_clip=False,
            **_TEXT,
        )


def short_label(block: str) -> str:
    """Shorten a block's name so that it fits under a narrow column: "down_blocks.1" is "down 1"."""
    known = {
        "mid_block": "mid",
        "transformer_blocks": "double-stream blocks",
        "single_transformer_blocks": "single-stream blocks",
        "time_embedding": "time",
        "time_text_embed": "time",
        "add_embedding": "added",
        "context_embedder": "context",
    }
    return known.get(block, block.replace("_blocks.", " "))
