"""One network trained by the processes of `training.parallel`, resumed from its last checkpoint."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from training.parallel import Pace, average_into, share_gradients, write_checkpoint

Net = TypeVar("Net", bound=torch.nn.Module)
DECAY = 0.998


def falling(step: int, total: int) -> float:
    """The share of the highest rate that is left at a step: one cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / total))


def fit(
    net: Net,
    loss_at: Callable[[int], torch.Tensor],
    rank: int,
    total: int,
    rate: float,
    file: Path,
    save_every: float = 60,
) -> Net:
    """Train what of `net` wants a gradient for `total` steps; its moving average.

    `loss_at` gives the loss of `net` at a step. The rate warms up over 50 steps and falls by a cosine. The first
    process prints, and writes `file` every `save_every` seconds.
    """
    average, step = copy.deepcopy(net).requires_grad_(False), 0
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    if file.exists():
        state = torch.load(file, weights_only=True)
        step = state["step"]
        for part, name in ((net, "net"), (average, "average"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
    pace, losses = Pace(save_every), []
    while step < total:
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * falling(step, total)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        share_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        average_into(average, net, min(DECAY, step / (step + 10)))
        losses.append(loss.item())
        if rank == 0 and step % 100 == 0:
            print(f"{time.strftime('%H:%M:%S')} {step}/{total} {np.mean(losses[-100:]):.4f}", flush=True)
        if rank == 0 and (step == total or pace.due()):
            state = {"step": step, "net": net.state_dict(), "average": average.state_dict()}
            write_checkpoint(file, state | {"optimizer": optimizer.state_dict()})
    return average
