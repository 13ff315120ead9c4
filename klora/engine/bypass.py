"""Apply deltas beside a module instead of writing them into its weight: y ← W·x + s·ΔW·x.

A forward hook on the module instance adds the output of the deltas that are active. It works whatever the
weight is stored as (fp8, GGUF, NF4, offloaded), switching is a change of a number, and taking it off leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from klora.engine.joined import SharedInput, joins_on
from klora.engine.weights import Room, Weights, as_dtype
from klora.errors import MismatchError
from klora.lora.deltas import Delta


@dataclass(frozen=True)
class Site:
    """A place in a host's model: a module, or the output rows [start, stop) of one that is fused from several.

    `weight` gives the module's weight as a plain tensor (all rows), for the deltas that depend on it; `known_shape`
    is the shape of that weight where the module's attributes do not tell.
    """

    module: Any
    rows: tuple[int, int] | None = None
    weight: Callable[[], Tensor] | None = None
    known_shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (out, in, kh, kw) for kernels larger than 1×1, of the rows of this site."""
        out, *rest = self.known_shape or module_shape(self.module)
        return (self.rows[1] - self.rows[0] if self.rows else out, *rest)

    def base_weight(self) -> Tensor:
        """The weight of this site's rows, (out, in[, kh, kw]); MismatchError where it is not a plain tensor."""
        weight = self.weight() if self.weight else getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
            raise MismatchError(
                f"a DoRA needs the weights it changes, and {type(self.module).__name__} does not show them"
                " (quantised or offloaded); use an unquantised model or a LoRA without DoRA"
            )
        weight = weight.detach()
        return weight[self.rows[0] : self.rows[1]] if self.rows else weight


def module_shape(module: Any) -> tuple[int, ...]:
    """The shape of a Linear's or Conv's weight from its attributes, since a quantised weight is packed."""
    if is_conv(module):
        kernel = tuple(module.kernel_size)
        size = (module.out_channels, module.in_channels // module.groups)
        return size if all(side == 1 for side in kernel) else (*size, *kernel)
    if hasattr(module, "in_features"):
        return (module.out_features, module.in_features)
    return tuple(module.weight.shape)


def is_conv(module: Any) -> bool:
    """Whether a module is a convolution, by its attributes."""
    # What a module of torch lacks is found out slowly, so what most modules have is asked for first.
    return not hasattr(module, "in_features") and hasattr(module, "kernel_size")


class Operand:
    """One delta at one site, as a chain of weights to be applied in turn: down, (mid,) up, or one dense ΔW.

    A dense ΔW is kept while it acts and there is room for it; else it is formed for every forward.
    """

    def __init__(self, delta: Delta, site: Site, weights: Weights | None = None, room: Room | None = None) -> None:
        """Take what is prepared of the delta's weights, if it is, and room for a dense one; values are not checked."""
        if delta.needs_base:
            # Raises now what would else end a forward of the model.
            site.base_weight()
        self.delta = delta
        self.site = site
        self.weights = weights or Weights(delta)
        self.is_conv = is_conv(site.module)
        self.kronecker = self.weights.kronecker and not self.is_conv
        self.factored = self.weights.low_rank or self.kronecker
        self._room = room or Room()
        self._reserved = 0
        self._shared: SharedInput | None = None
        self._place = 0
        self._chains: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def chain(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The weights, from the cache when they were asked for before."""
        return self._chains.get((device, dtype)) or self._made(device, dtype)

    def _made(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if not self.factored:
            return self._dense(device, dtype)
        if self._shared and joins_on(device):
            self._shared.down.stack(device, dtype)
        self._chains[device, dtype] = self._shaped(self.weights.chain(device, dtype))
        return self._chains[device, dtype]

    def _dense(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        base = self.site.base_weight() if self.delta.needs_base else None
        chain = self._shaped((self.delta.matrix(base).to(device, dtype),))
        if self._room.take(chain[0].nbytes):
            self._reserved += chain[0].nbytes
            self._chains[device, dtype] = chain
        return chain

    def _shaped(self, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.is_conv:
            return weights
        return tuple(weight[:, :, None, None] if weight.ndim == 2 else weight for weight in weights)

    def share(self, shared: SharedInput, place: int) -> None:
        """Take the product with `down` from what is shared with modules of the same input, where that pays."""
        self._shared, self._place = shared, place

    def set_acting(self, acts: bool) -> None:
        """Get ready to act, or not to."""
        if self._shared:
            self._shared.set_acting(self._place, acts)
        if not acts:
            self.release()

    def release(self) -> None:
        """Drop a dense delta, which is as large as the weight itself; it is formed again when needed."""
        if self._shared:
            self._shared.forget()
        if not self.factored:
            self._chains.clear()
            self._room.give_back(self._reserved)
            self._reserved = 0

    def add(self, x: Tensor, y: Tensor, strength: float) -> Tensor:
        """y + strength·ΔW·x; in place where autograd does not watch."""
        chain = self.chain(y.device, y.dtype)
        if self.factored:
            strength *= self.delta.scale
        if self._shared and self._shared.pays and joins_on(y.device):
            return self._add_linear(self._shared.product(self._place, x, y.dtype), y, chain[-1], strength)
        x = as_dtype(x, y.dtype)
        if self.is_conv:
            return self._add_conv(x, y, chain, strength)
        if self.kronecker:
            return self._add_rows(kronecker_product(x, *chain), y, strength)
        for weight in chain[:-1]:
            x = F.linear(x, weight)
        return self._add_linear(x, y, chain[-1], strength)

    def at_tokens(self, x: Tensor, y: Tensor, take: Tensor, strength: float) -> Tensor:
        """strength·ΔW·x at the tokens `take` (T,) of y alone: fp32 (T, out of this site).

        A token is a row of a linear layer's flattened input, or a position of a convolution's output. A kernel larger
        than 1×1 is applied everywhere, at the LoRA's rank; what follows it, which costs most, at the tokens alone.
        """
        *before, last = self.chain(y.device, y.dtype)
        x = x.to(y.dtype)
        if self.factored:
            strength *= self.delta.scale
        if not self.is_conv:
            x = x.reshape(-1, x.shape[-1])[take]
            if self.kronecker:
                return kronecker_product(x, *before, last).float().mul_(strength)
            for weight in before:
                x = F.linear(x, weight)
            return F.linear(x, last).float().mul_(strength)
        spatial = len(before) // 2
        for index, weight in enumerate((*before, last) if spatial == len(before) else before):
            x = self.site.module._conv_forward(x, weight, None) if index == spatial else F.conv2d(x, weight)
        x = tokens_of(x, take, is_conv=True)
        return (x if spatial == len(before) else F.linear(x, last.flatten(1))).float().mul_(strength)

    def base_tokens(self, y: Tensor, take: Tensor) -> Tensor:
        """The tokens `take` (T,) of this site's rows of y: fp32 (T, out)."""
        tokens = tokens_of(y, take, self.is_conv).float()
        return tokens[:, slice(*self.site.rows)] if self.site.rows else tokens

    def _add_linear(self, x: Tensor, y: Tensor, weight: Tensor, strength: float) -> Tensor:
        """Add strength·x·weightᵀ to the site's rows of y."""
        if _watched(x, y):
            return self._add_rows(F.linear(x, weight), y, strength)
        # Under autocast a product of fp32 tensors may come back in half precision.
        x = as_dtype(x, y.dtype)
        if not y.is_contiguous():
            return self._add_rows(F.linear(x, weight), y, strength)
        rows = y.view(-1, y.shape[-1])
        if self.site.rows:
            rows = rows[:, slice(*self.site.rows)]
        rows.addmm_(x.reshape(-1, x.shape[-1]), weight.t(), alpha=strength)
        return y

    def _add_rows(self, change: Tensor, y: Tensor, strength: float) -> Tensor:
        """Add strength·change to the site's rows of y."""
        start, stop = self.site.rows or (0, y.shape[-1])
        if _watched(change, y):
            return y + F.pad(change * strength, (start, y.shape[-1] - stop))
        y[..., start:stop].add_(change, alpha=strength)
        return y

    def _add_conv(self, x: Tensor, y: Tensor, chain: tuple[Tensor, ...], strength: float) -> Tensor:
        # The kernel lies in the first weight of (dense) and (down, up), in the second of (down, mid, up).
        spatial = (len(chain) - 1) // 2
        for index, weight in enumerate(chain):
            # The module's own method for the kernel, so that its stride, padding and padding mode (tiling!) hold.
            x = self.site.module._conv_forward(x, weight, None) if index == spatial else F.conv2d(x, weight)
        return y + x * strength if _watched(x, y) else y.add_(x, alpha=strength)


def kronecker_product(x: Tensor, w1: Tensor, *w2: Tensor) -> Tensor:
    """(w1 ⊗ w2)·x of x (…, b·d): (…, a·c). `w2` is one matrix (c, d), or factors to be applied in turn."""
    *before, last = w2
    x = x.unflatten(-1, (w1.shape[1], -1))
    for weight in before:
        x = F.linear(x, weight)
    # w1 may come anywhere: here nothing is copied, and between factors of low rank its input is narrow.
    return F.linear(w1 @ x, last).flatten(-2)


def tokens_of(y: Tensor, take: Tensor, is_conv: bool) -> Tensor:
    """The tokens `take` (T,) of y (…, C), or of the output y (B, C, H, W) of a convolution: (T, C)."""
    if not is_conv:
        return y.reshape(-1, y.shape[-1])[take]
    size = y.shape[2] * y.shape[3]
    return y.flatten(2)[take // size, :, take % size]


def _watched(x: Tensor, y: Tensor) -> bool:
    """Whether autograd records what happens to y, so that it must not be changed in place."""
    return torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)


@dataclass
class Part:
    """What may act at one site: `operands` in the order subject, style; `strengths` is what of each acts now."""

    operands: tuple[Operand | None, Operand | None]
    strengths: tuple[float, float] = (0.0, 0.0)
    _acting: tuple[tuple[Operand, float], ...] = field(init=False)
    _ready: tuple[torch.device, torch.dtype] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._acting = self._pairs()

    def set(self, strengths: tuple[float, float]) -> None:
        """Make each operand act with its strength; 0 switches it off."""
        if strengths == self.strengths:
            return
        for operand, strength in zip(self.operands, strengths, strict=True):
            if operand is not None:
                operand.set_acting(bool(strength))
        self.strengths = strengths
        self._acting = self._pairs()

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """y with what acts added, in place where possible."""
        if (y.device, y.dtype) != self._ready:
            self._prepare(y.device, y.dtype)
        for operand, strength in self._acting:
            y = operand.add(x, y, strength)
        return y

    def _pairs(self) -> tuple[tuple[Operand, float], ...]:
        pairs = zip(self.operands, self.strengths, strict=True)
        return tuple((operand, strength) for operand, strength in pairs if operand is not None and strength)

    def _prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        for operand in self.operands:
            # Also what is not active: its becoming active then allocates nothing.
            if operand is not None and operand.factored:
                operand.chain(device, dtype)
        self._ready = (device, dtype)


@dataclass
class BypassLayer:
    """The hook on one module instance, for all the parts that lie in it."""

    module: nn.Module
    parts: list[Part] = field(default_factory=list)
    _handle: RemovableHandle | None = None

    def attach(self) -> None:
        """Put the hook on; does nothing when it is on."""
        if self._handle is None:
            self._handle = self.module.register_forward_hook(self._hook, with_kwargs=True)

    def detach(self) -> None:
        """Take the hook off; does nothing when it is off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        for part in self.parts:
            output = part.apply(x, output)
        return output
