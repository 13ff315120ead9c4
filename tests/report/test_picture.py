"""The selection map."""

import importlib
import sys
from typing import Any

import numpy as np
import pytest

from klora.fusion.interference import Interference
from klora.fusion.plan import FusionPlan
from klora.lora.names import block_label
from klora.report.overlap import Overlap
from klora.report.overlap_picture import overlap_picture
from klora.report.picture import COLOURS, DARK, LIGHT, WIDTH, blocks, cells_box, selection_cells, selection_map
from tests.support.models import real_shapes
from tests.support.pairs import ATTENTION, FEED_FORWARD, plan_of
from tests.support.processes import end_of, start


def pixels_of(image: object, letter: str, theme: Any = LIGHT) -> int:
    colour = [int(theme.cells[letter][i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(image) == colour).all(axis=-1).sum())


def cells_of(plan: FusionPlan) -> np.ndarray:
    """The part of the picture that shows the choices."""
    from klora.report import picture as p

    image = np.asarray(selection_map(plan))
    return image[p.TITLE + 2 : p.TITLE + p.MAP - 2, p.LEFT + 2 : p.WIDTH - p.SIDE - p.RIGHT - 2]


def test_the_area_of_a_colour_is_the_share_of_its_lora() -> None:
    plan = plan_of(ATTENTION, steps=20)
    cells = cells_of(plan)
    subject, style = pixels_of(cells, "c"), pixels_of(cells, "s")
    assert subject / (subject + style) == pytest.approx(plan.share, abs=0.02)
    assert subject + style > 0.85 * cells.shape[0] * cells.shape[1]


def test_a_column_shows_its_module_from_the_first_step_at_the_top_to_the_last() -> None:
    plan = plan_of(["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"], spread=0, steps=10)
    (selection,) = plan.selections.values()
    assert "c" in selection
    assert "s" in selection
    cells = cells_of(plan)
    height = cells.shape[0]
    for step, letter in enumerate(selection):
        row = cells[int((step + 0.5) * height / 10)][cells.shape[1] // 2]
        assert list(row) == [int(COLOURS[letter][i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("width", [534, 760, 1200])
def test_the_names_of_the_colours_end_where_the_cells_end(width: int) -> None:
    from klora.report import picture as p

    plan = plan_of([*ATTENTION, *FEED_FORWARD], in_scope=("attention",), scope="attention", subject_to=0.5)
    assert {"c", "s", "b"} <= set("".join(plan.selections.values()))
    image = np.asarray(selection_cells(plan, width=width))
    edge = width - p.SIDE - p.RIGHT
    assert (image[: p.LEGEND - 4, edge : edge + 14] == 255).all()


@pytest.mark.parametrize("name", ["dog\udcff", "dog\nink", "$dog^", r"$dog\frac$", "\x00dog"])
def test_a_pair_and_blocks_of_any_name_can_be_drawn(name: str) -> None:
    plan = plan_of([f"{name}_0_mix", f"{name}_1_mix", f"other_{name}_0_mix"], steps=4)
    assert cells_box(plan)
    assert selection_map(plan, name).size == selection_map(plan, "dog").size
    block = Interference(0.5, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25)
    assert overlap_picture(Overlap({name: block}, 0), name).width == WIDTH


def test_layers_outside_the_scope_are_shown_as_what_acts_there() -> None:
    plan = plan_of([*ATTENTION, *FEED_FORWARD], in_scope=("attention",), scope="attention")
    assert pixels_of(cells_of(plan), "b") > 0
    assert pixels_of(cells_of(plan_of(ATTENTION)), "b") == 0


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_the_cells_alone_are_drawn_in_the_colours_of_a_theme_and_lie_where_is_told(theme: Any) -> None:
    plan = plan_of(ATTENTION, steps=20)
    image = selection_cells(plan, theme)
    left, top, right, bottom = (int(a * b) for a, b in zip(cells_box(plan), image.size * 2, strict=True))
    cells = np.asarray(image)[top + 3 : bottom - 3, left + 3 : right - 3]
    subject, style = pixels_of(cells, "c", theme), pixels_of(cells, "s", theme)
    assert subject / (subject + style) == pytest.approx(plan.share, abs=0.02)
    assert subject + style > 0.85 * cells.shape[0] * cells.shape[1]
    outside = np.asarray(image)[0, 0]
    assert list(outside) == [int(theme.background[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize(("model", "columns"), [("sdxl", 722), ("flux", 494)])
def test_real_models_fit(model: str, columns: int) -> None:
    names = [n for n in real_shapes(model) if "attentions" in n or "transformer_blocks" in n]
    plan = plan_of(names[:columns], scale="s*")
    found = blocks(plan)
    assert sum(block.stop - block.start for block in found) == len(plan.modules)
    assert selection_map(plan, "subject × style").size == selection_map(plan_of(ATTENTION)).size


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "direct"},
        {"policy": "random"},
        {"policy": "top-k"},
        {"policy": "fixed"},
        {"alpha": 0, "beta": 0},
        {"steps": 1},
        {"steps": 400},
        {"share": 0.9},
        {"beta": 1e9},
    ],
)
def test_every_policy_and_extreme_can_be_drawn(settings: dict) -> None:
    assert selection_map(plan_of(ATTENTION, **settings)).mode == "RGB"


@pytest.mark.filterwarnings("ignore:Glyph")
def test_an_empty_plan_and_a_title_of_formula_signs_can_be_drawn() -> None:
    assert selection_map(plan_of([]), "a$\\frac{$b_c × ©漢").mode == "RGB"


def test_blocks_follow_the_network_and_have_short_labels() -> None:
    found = blocks(plan_of(ATTENTION))
    assert [(block.label, block.stop - block.start) for block in found] == [
        ("down_blocks.0", 8),
        ("mid_block", 8),
        ("up_blocks.1", 8),
    ]
    assert [block_label(block.label) for block in found] == ["down 0", "mid", "up 1"]


def draw_anew() -> bool:
    """Whether drawing, imported anew, imports what matplotlib keeps of all figures of a process."""
    for name in [name for name in sys.modules if name.startswith(("klora.report", "matplotlib.pyplot"))]:
        del sys.modules[name]
    importlib.import_module("klora.report.picture").selection_map(plan_of(ATTENTION))
    return "matplotlib.pyplot" in sys.modules


def test_drawing_uses_nothing_global_of_matplotlib() -> None:
    assert end_of(start(draw_anew)) == 0
