"""What torch.compile has made, run as it was written."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from klora.engine.compiled import uncompiled

COSTLY = """
import sys
import torch
from klora.engine.compiled import uncompiled
with uncompiled():
    pass
sys.exit("torch._dynamo" in sys.modules)
"""


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.6 is the first that can")
def test_what_is_compiled_runs_as_it_was_written_inside() -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        return lambda *args: seen.append("compiled") or graph(*args)

    double = torch.compile(lambda x: x * 2, backend=backend)
    with uncompiled():
        assert double(torch.ones(2)).tolist() == [2, 2]
    assert seen == []
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert seen == ["compiled"]


def test_where_nothing_compiles_it_costs_no_import() -> None:
    assert subprocess.run([sys.executable, "-c", COSTLY], check=False).returncode == 0
