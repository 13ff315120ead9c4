"""Which way each module goes: products beside it, a held weight W′, or W′ formed for each forward.

Weights are held only where they are plain, and where nobody else moves or writes them. What pays is measured
(docs/benchmarks.md, "Other families"), not argued.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from klora.engine.bypass import HookedLayer, Part
from klora.engine.held import FormedLayer, HeldLayer, weight_of
from klora.engine.products import Dense, Product
from klora.engine.weights import Room

Layer = HookedLayer | HeldLayer

AUTO, BYPASS, HELD = "auto", "bypass", "held"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HIGH_RANK = 64
WORTH = 1 / 8
"""The multiplications of a low-rank product, as a fraction of its layer's own, from which holding a weight pays."""
_TORCHS_OWN = ("torch.nn.modules.linear", "torch.nn.modules.conv")
_MOVERS = {"_hf_hook", "_diffusers_hook", "base_layer", "network_layer_name", "network_current_names"}
"""What accelerate, diffusers, PEFT and A1111 leave on a module whose weights they move, cast, or merge into."""


def layer_of(module: nn.Module, parts: Sequence[Part], engine: str, plain: bool, room: Room) -> Layer:
    """The way of a module: `plain` says whether its weight may be held, `engine` what the user wants."""
    measured = any(part.measured for part in parts)
    if engine == BYPASS or measured or not plain or not (engine == HELD or pays(module, parts)):
        return HookedLayer(module, parts)
    if room.take(weight_of(module).nbytes):
        return HeldLayer(module, parts)
    return FormedLayer(module, parts) if engine == HELD or formed_pays(module, parts) else HookedLayer(module, parts)


def pays(module: nn.Module, parts: Sequence[Part]) -> bool:
    """Whether products cost enough to be spared: those with a ΔW always, those with its factors at high ranks."""
    own = weight_of(module).numel()
    operands = [operand for part in parts for operand in part.operands if operand]
    return any(_is_dense(operand) or _multiplications(operand) >= WORTH * own for operand in operands)


def formed_pays(module: nn.Module, parts: Sequence[Part]) -> bool:
    """Whether forming W′ at each forward costs less than forming and applying each ΔW."""
    operands = [operand for part in parts for operand in part.operands if operand]
    if not any(_is_dense(operand) for operand in operands):
        return False
    # In half precision a DoRA needs more conversions than its product costs.
    return weight_of(module).dtype == torch.float32 or not any(operand.delta.needs_base for operand in operands)


def _multiplications(operand: Product) -> int:
    """Of a low-rank product of high rank, for one token, at each position of a kernel; 0 for others."""
    delta = operand.delta
    if delta.rank < HIGH_RANK or not operand.source.weights.low_rank:
        return 0
    return delta.rank * (delta.shape[0] + delta.columns)


def _is_dense(operand: Product) -> bool:
    return isinstance(operand.source, Dense)


def plain_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model whose weights nobody else moves, casts or writes while it is at work."""
    # What a module of torch lacks is found out slowly, and all of them are looked at before each picture.
    own, inside = vars(model), model._modules
    if not (_MOVERS.isdisjoint(own) and _MOVERS.isdisjoint(inside)) or ("forward" in own and "_orig_mod" not in inside):
        return
    yield model
    for child in model.children():
        yield from plain_modules(child)


def is_plain(module: nn.Module) -> bool:
    """Whether a module has a floating-point weight of its own that its forward takes as it is."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return False
    if weight.dtype not in DTYPES or weight.is_meta or weight.is_inference():
        return False
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def may_hold() -> bool:
    """Whether weights may be held at all."""
    # A host that has put a forward of its own in torch's place (A1111) merges into the weight when it likes.
    return all(kind.forward.__module__ in _TORCHS_OWN for kind in (nn.Linear, nn.Conv2d))
