"""Blocks of real models with random weights, run with and without LoRAs: what `python -m bench.gpu` measures first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.machine import timed
from bench.model import merged
from klora.engine import joined
from klora.engine.session import Session
from klora.engine.site import Site
from klora.engine.weights import KEPT
from klora.fusion.policies.base import NEITHER
from klora.lora.names import kind_of
from klora.pair import Pair
from klora.settings import Settings

Forward = Callable[[], Tensor]

STEPS = 30
WAYS = ("no LoRA", "merged", "hooks alone", "one by one", "K-LoRA")
FLUX_TEXT = 512
FLUX_BLOCKS = {
    "flux": (FluxSingleTransformerBlock, "single_transformer_blocks"),
    "flux-double": (FluxTransformerBlock, "transformer_blocks"),
}


class Heads(NamedTuple):
    """The attention heads of a block."""

    number: int
    width: int


HEADS = {"sd15": Heads(8, 40), "sdxl": Heads(20, 64), "flux": Heads(24, 128), "flux-double": Heads(24, 128)}


class Blocks(NamedTuple):
    """`depth` blocks of one kind in a row, and what one forward of the first takes."""

    path: str
    blocks: nn.ModuleList
    inputs: tuple[Tensor, dict[str, Any]]

    def forward(self) -> Tensor:
        """One forward of all of them."""
        x, others = self.inputs
        for block in self.blocks:
            found = block(x, **others)
            x = found[-1] if isinstance(found, tuple) else found
        return x

    def linears(self) -> dict[str, nn.Linear]:
        """The attention linears by canonical name."""
        named = ((f"{self.path}.{name}", module) for name, module in self.blocks.named_modules())
        return {
            name: module for name, module in named if isinstance(module, nn.Linear) and kind_of(name) == "attention"
        }


def make_blocks(
    model: str, depth: int, batch: int, pixels: int, device: torch.device, dtype: torch.dtype, shrink: int = 1
) -> Blocks:
    """The blocks that most of a model's time goes into: the widest of SD 1.5 or SDXL, or either kind of FLUX.

    They have `shrink` times fewer heads than the model's, at least one.
    """
    torch.manual_seed(0)
    heads = max(1, HEADS[model].number // shrink)
    make = _flux_blocks if model.startswith("flux") else _unet_blocks
    with torch.device(device):
        blocks = make(model, depth, batch, pixels, heads, heads * HEADS[model].width, dtype)
    blocks.blocks.to(dtype).eval().requires_grad_(False)
    return blocks


def _unet_blocks(model: str, depth: int, batch: int, pixels: int, heads: int, width: int, dtype: torch.dtype) -> Blocks:
    side, context = (8, 768) if model == "sd15" else (32, 2048)
    made = nn.ModuleList(
        BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=context) for _ in range(depth)
    )
    # Guidance doubles the batch.
    x = torch.randn(2 * batch, (pixels // side) ** 2, width, dtype=dtype)
    others = {"encoder_hidden_states": torch.randn(2 * batch, 77, context, dtype=dtype)}
    return Blocks("mid_block.attentions.0.transformer_blocks", made, (x, others))


def _flux_blocks(model: str, depth: int, batch: int, pixels: int, heads: int, width: int, dtype: torch.dtype) -> Blocks:
    kind, path = FLUX_BLOCKS[model]
    made = nn.ModuleList(kind(width, heads, width // heads) for _ in range(depth))
    tokens = (pixels // 16) ** 2
    angles = torch.randn(tokens + FLUX_TEXT, width // heads)
    others = {
        "encoder_hidden_states": torch.randn(batch, FLUX_TEXT, width, dtype=dtype),
        "temb": torch.randn(batch, width, dtype=dtype),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return Blocks(path, made, (torch.randn(batch, tokens, width, dtype=dtype), others))


class Operations(TorchDispatchMode):
    """Counts the operations inside its block that compute something: on a GPU each is at least one launch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one, unless it gives another view of what is there."""
        self.count += not _is_view(func)
        return func(*args, **(kwargs or {}))


def _is_view(operation: Any) -> bool:
    """Whether what an operation gives is another view of what it takes."""
    aliases = [value.alias_info for value in operation._schema.returns]
    return operation.overloadpacket is torch.ops.aten._unsafe_view or any(
        alias is not None and not alias.is_write for alias in aliases
    )


@contextmanager
def joining(devices: set[str]) -> Iterator[None]:
    """Join products on these kinds of device alone."""
    before, joined.JOINING_DEVICES = joined.JOINING_DEVICES, devices
    try:
        yield
    finally:
        joined.JOINING_DEVICES = before


class Fused:
    """A pair at work on blocks, in the ways that are compared with one merged LoRA."""

    def __init__(self, blocks: Blocks, pair: Pair, device: torch.device) -> None:
        self.blocks, self.pair, self.device = blocks, pair, device
        self.layers = blocks.linears()
        self.sites = {name: Site(layer) for name, layer in self.layers.items()}
        self.plan = pair.plan(Settings(), device=device)

    def new_session(self) -> Session:
        """One more session of the pair."""
        return Session(self.pair, self.plan, self.sites)

    def ways(self, step: int) -> Iterator[tuple[str, AbstractContextManager[Forward]]]:
        """All of them, with their names; each gives what is to be measured: a forward, of K-LoRA that of a step."""
        applied = (
            nullcontext(self.blocks.forward),
            self._merged(),
            self._silent(),
            self._acting(False, step),
            self._acting(True, step),
        )
        return zip(WAYS, applied, strict=True)

    @contextmanager
    def _merged(self) -> Iterator[Forward]:
        """The subject in the weights."""
        with merged(self.layers, self.pair.subject.loras[0]):
            yield self.blocks.forward

    @contextmanager
    def _silent(self) -> Iterator[Forward]:
        """The hooks, none of which does anything."""
        with self.new_session() as session:
            session.set_active(NEITHER)
            # The factors get to the device in the first forward, whether they act or not.
            self.blocks.forward()
            yield self.blocks.forward

    @contextmanager
    def _acting(self, join: bool, step: int) -> Iterator[Forward]:
        """K-LoRA, with the products of modules of one input joined or one by one; the cost of switching is in it."""
        with joining({self.device.type} if join else set()), self.new_session() as session:
            self._step(session, step - 1)
            yield partial(self._step, session, step)

    def _step(self, session: Session, step: int) -> Tensor:
        session.set_tau(step % STEPS / STEPS)
        return self.blocks.forward()


@torch.no_grad()
def measure(blocks: Blocks, pair: Pair, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds per forward by way, and of making a session."""
    fused = Fused(blocks, pair, device)
    seen: dict[str, list[float]] = {}
    for round_ in range(rounds + 1):
        KEPT.clear()
        seen.setdefault("new session", []).append(timed(fused.new_session))
        seen.setdefault("session again", []).append(timed(fused.new_session))
        for way, applied in fused.ways(round_):
            with applied as forward:
                seen.setdefault(way, []).append(timed(forward, device=device))
    # The first round warms up.
    return {way: statistics.median(times[1:]) for way, times in seen.items()}


@torch.no_grad()
def operations(blocks: Blocks, pair: Pair, device: torch.device) -> dict[str, int]:
    """Operations of one forward, by way; of K-LoRA in the first step."""
    found = {}
    for way, applied in Fused(blocks, pair, device).ways(0):
        with applied as forward, Operations() as counted:
            forward()
        found[way] = counted.count
    return found
