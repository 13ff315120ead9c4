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

from klora.errors import MismatchError
from klora.lora.deltas import Delta, Factors


@dataclass(frozen=True)
class Site:
    """A place in a host's model: a module, or the output rows [start, stop) of one that is fused from several.

    `weight` gives the module's weight as a plain tensor (rows included), for the deltas that depend on it.
    """

    module: nn.Module
    rows: tuple[int, int] | None = None
    weight: Callable[[], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (out, in, kh, kw) for kernels larger than 1×1, of the rows of this site."""
        out, *rest = module_shape(self.module)
        return (self.rows[1] - self.rows[0] if self.rows else out, *rest)

    def base_weight(self) -> Tensor:
        """Give the weight of this site's rows, (out, in[, kh, kw]); MismatchError where it is no plain tensor."""
        weight = self.weight() if self.weight else getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
            raise MismatchError(
                f"a DoRA needs the weights it changes, and {type(self.module).__name__} does not show them"
                " (quantised or offloaded); use an unquantised model or a LoRA without DoRA"
            )
        weight = weight.detach()
        return weight[self.rows[0] : self.rows[1]] if self.rows else weight


def module_shape(module: nn.Module) -> tuple[int, ...]:
    """Give the shape of a Linear's or Conv's weight from its attributes, since a quantised weight is packed."""
    if hasattr(module, "in_channels") and hasattr(module, "kernel_size"):
        kernel = tuple(module.kernel_size)
        size = (module.out_channels, module.in_channels // module.groups)
        return size if all(side == 1 for side in kernel) else (*size, *kernel)
    if hasattr(module, "in_features"):
        return (module.out_features, module.in_features)
    return tuple(module.weight.shape)


class Operand:
    """One delta at one site, with its tensors kept for each (device, dtype) it was asked for."""

    def __init__(self, delta: Delta, site: Site) -> None:
        delta.check_finite()
        self.delta = delta
        self.site = site
        self._factors: dict[tuple[torch.device, torch.dtype], Factors] = {}
        self._dense: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def warm(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make a factor pair ready, so that becoming active later allocates nothing."""
        if (device, dtype) not in self._factors and (factors := self.delta.factors()) is not None:
            self._factors[device, dtype] = self._shaped(factors, device, dtype)

    def release(self) -> None:
        """Drop a dense delta, which is as large as the weight itself; it is formed again when needed."""
        self._dense.clear()

    def add(self, x: Tensor, y: Tensor, strength: float) -> Tensor:
        """Give y + strength·ΔW·x; in place where autograd does not watch."""
        x = x.to(y.dtype)
        factors = self._factors.get((y.device, y.dtype))
        conv = hasattr(self.site.module, "kernel_size")
        if factors is None:
            dense = self._dense_for(y.device, y.dtype)
            return (
                self._add_conv(y, self._convolve(x, dense), strength)
                if conv
                else self._add_linear(y, x, dense, strength)
            )
        strength *= self.delta.scale
        if not conv:
            return self._add_linear(y, F.linear(x, factors.down).to(y.dtype), factors.up, strength)
        if factors.mid is None:
            hidden = self._convolve(x, factors.down)
        else:
            hidden = self._convolve(F.conv2d(x, factors.down), factors.mid)
        return self._add_conv(y, F.conv2d(hidden, factors.up), strength)

    def _shaped(self, factors: Factors, device: torch.device, dtype: torch.dtype) -> Factors:
        conv = hasattr(self.site.module, "kernel_size")

        def ready(tensor: Tensor) -> Tensor:
            tensor = tensor.to(device=device, dtype=dtype)
            return tensor[:, :, None, None] if conv and tensor.ndim == 2 else tensor

        mid = None if factors.mid is None else ready(factors.mid)
        return Factors(up=ready(factors.up), down=ready(factors.down), mid=mid)

    def _dense_for(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if (device, dtype) not in self._dense:
            base = self.site.base_weight() if self.delta.needs_base else None
            matrix = self.delta.matrix(base).to(device=device, dtype=dtype)
            conv = hasattr(self.site.module, "kernel_size")
            self._dense[device, dtype] = matrix[:, :, None, None] if conv and matrix.ndim == 2 else matrix
        return self._dense[device, dtype]

    def _add_linear(self, y: Tensor, x: Tensor, weight: Tensor, strength: float) -> Tensor:
        """Add strength·x·weightᵀ to the site's rows of y."""
        rows = slice(*self.site.rows) if self.site.rows else slice(None)
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad):
            added = F.linear(x, weight) * strength
            if self.site.rows:
                added = F.pad(added, (self.site.rows[0], y.shape[-1] - self.site.rows[1]))
            return y + added
        if y.is_contiguous():
            y.view(-1, y.shape[-1])[:, rows].addmm_(x.reshape(-1, x.shape[-1]), weight.t(), alpha=strength)
        else:
            y[..., rows].add_(F.linear(x, weight), alpha=strength)
        return y

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        # The module's own method, so that its stride, padding and padding mode (tiling!) hold.
        return self.site.module._conv_forward(x, weight, None)

    @staticmethod
    def _add_conv(y: Tensor, added: Tensor, strength: float) -> Tensor:
        if torch.is_grad_enabled() and (y.requires_grad or added.requires_grad):
            return y + added * strength
        return y.add_(added, alpha=strength)


@dataclass
class Part:
    """What may act at one site: `operands` in the order subject, style; `strengths` is what of each acts now."""

    operands: tuple[Operand | None, Operand | None]
    strengths: tuple[float, float] = (0.0, 0.0)

    def set(self, strengths: tuple[float, float]) -> None:
        """Make each operand act with its strength; 0 switches it off."""
        if strengths == self.strengths:
            return
        for operand, strength in zip(self.operands, strengths, strict=True):
            if operand is not None and not strength:
                operand.release()
        self.strengths = strengths


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
            for operand in part.operands:
                if operand is not None:
                    operand.warm(output.device, output.dtype)
            for operand, strength in zip(part.operands, part.strengths, strict=True):
                if operand is not None and strength:
                    output = operand.add(x, output, strength)
        return output
