"""An interrupt may come at any line: nothing of a fusion is left then, whichever line it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from klora.engine.weights import KEPT, Room
from tests.engine.test_held import Model, assert_untouched, pair_of, session_of, storage

PACKAGE = str(Path(__file__).parents[2] / "klora")
TRIED = 50


def run(act: Callable[[], object], at: int = 0) -> int:
    """Do something, interrupted at the line number `at` of the package that it comes to; gives how many it came to."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        assert at
    finally:
        sys.settrace(before)
    return lines


def names(model: nn.Module) -> list[set[str]]:
    """What each module has of its own: a wrapper of a method would be among it."""
    return [set(vars(module)) for module in model.modules()]


def compiled(model: Model) -> None:
    model.conv.compile(backend="eager")


@pytest.mark.parametrize(
    ("engine", "room", "prepare"),
    [("bypass", 2**20, None), ("held", 2**20, None), ("held", 0, None), ("held", 2**20, compiled)],
    ids=["bypass", "held", "formed", "compiled"],
)
def test_nothing_is_left_at_whichever_line_an_interrupt_comes(
    tmp_path: Path,
    engine: str,
    room: int,
    prepare: Callable[[Model], None] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Room, "on", classmethod(lambda cls, device: Room(room)))
    pair, model = pair_of(tmp_path, "full"), Model()
    if prepare:
        prepare(model)
        model.outputs()
    before, own, plain = storage(model), names(model), model.outputs()

    def once(at: int = 0) -> int:
        session = session_of(pair, model, engine=engine)

        def sample() -> None:
            # As `klora.fuse` does it.
            with ExitStack() as stack:
                stack.callback(session.detach)
                stack.enter_context(session)
                session.start_pass([2.0, 1.0])
                for level in (2.0, 1.0):
                    session.at_level(level)
                    model.outputs()

        return run(sample, at)

    total = once()
    for at in range(1, total + 1, total // TRIED):
        once(at)
        assert_untouched(model, before)
        assert names(model) == own
        assert not KEPT.at_work
    assert all(torch.equal(plain[name], value) for name, value in model.outputs().items())
