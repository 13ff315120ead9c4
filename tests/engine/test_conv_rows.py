"""One delta on some output channels of a convolution that holds several in one weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from klora.engine.products import product_of
from klora.engine.site import Site
from klora.lora.file import LoraFile
from tests.support.lora_files import write_lora

NAME = "down_blocks.0.resnets.0.conv1"


@pytest.mark.parametrize("rows", [(0, 24), (18, 42), (30, 54)])
@pytest.mark.parametrize("watched", [False, True], ids=["alone", "with gradients"])
def test_the_channels_of_a_site_change_and_no_others(tmp_path: Path, rows: tuple[int, int], watched: bool) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(16, 54, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 16, 6, 6)
    delta = LoraFile.open(write_lora(tmp_path / "a.safetensors", {NAME: (24, 16, 3, 3)}, rank=4)).modules[NAME]
    expected = module(x)
    expected[:, slice(*rows)] += 0.5 * nn.functional.conv2d(x, delta.matrix().reshape(24, 16, 3, 3), padding=1)
    x.requires_grad_(watched)
    add = product_of(delta, Site(module, rows)).adder(x.device, x.dtype, 0.5)
    torch.testing.assert_close(add(x, module(x)), expected, rtol=1e-4, atol=1e-4)
