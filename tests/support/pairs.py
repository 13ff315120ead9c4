"""Pairs of small LoRA files, and plans without any file."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path

from klora.fusion.plan import FileModule, FusionPlan, make_plan
from klora.fusion.policies import resolve
from klora.fusion.scores import ModuleScore
from klora.lora.names import kind_of, slice_of, sort_key
from klora.settings import Settings
from tests.support.lora_files import write_lora

BLOCKS = ("down_blocks.0", "mid_block", "up_blocks.1")
ATTENTION = [
    f"{block}.attentions.0.transformer_blocks.0.{attention}.{leaf}"
    for block in BLOCKS
    for attention in ("attn1", "attn2")
    for leaf in ("to_q", "to_k", "to_v", "to_out.0")
]
FEED_FORWARD = [f"{block}.attentions.0.transformer_blocks.0.ff.net.2" for block in BLOCKS]
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def shapes(names: Iterable[str], size: int = 32) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(names, (size, size))


def write_pair(folder: Path) -> tuple[Path, Path]:
    """A kohya subject (attention, feed-forward, a text-encoder module; rank 4) and a PEFT style (attention; rank 8)."""
    subject = write_lora(
        folder / "dog.safetensors", shapes([*ATTENTION, *FEED_FORWARD, TEXT]), "kohya", rank=4, alpha=2.0, seed=1
    )
    return subject, write_lora(folder / "ink.safetensors", shapes(ATTENTION), "peft", rank=8, seed=2)


def plan_of(
    names: Iterable[str],
    spread: float = 0.5,
    in_scope: tuple[str, ...] = ("attention", "linear", "conv"),
    **settings: object,
) -> FusionPlan:
    """A plan of random scores for `names`, both files having every one of them."""
    draw = random.Random(0)

    def score() -> ModuleScore:
        top = math.exp(draw.gauss(0, spread))
        return ModuleScore((8, 8), 4, 4.0, 3 * top, 1.0, {16: top})

    return make_plan(
        (
            FileModule(name, slice_of(name), kind_of(name) in in_scope, f"c_{name}", f"s_{name}", score(), score())
            for name in sorted(names, key=sort_key)
        ),
        resolve(Settings.parse(settings), None),
    )
