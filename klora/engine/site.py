"""A place in a host's model where a delta acts, and what can be said of the module there without its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Site:
    """A place in a host's model: a module, or the output rows [start, stop) of one that is fused from several.

    `weight` gives the module's weight as a plain tensor (all rows), or None where it cannot be read, for the deltas
    that depend on it; `known_shape` is the shape of that weight where the module's attributes do not tell.
    """

    module: Any
    rows: tuple[int, int] | None = None
    weight: Callable[[], Tensor | None] | None = None
    known_shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (out, in, *kernel) for kernels larger than 1, of the rows of this site."""
        out, *rest = self.known_shape or module_shape(self.module)
        return (self.rows[1] - self.rows[0] if self.rows else out, *rest)

    @property
    def module_rows(self) -> int:
        """The width of the module's output."""
        return int((self.known_shape or module_shape(self.module))[0])

    @property
    def has_bias(self) -> bool:
        """Whether the module adds a bias."""
        return getattr(self.module, "bias", None) is not None

    def base_weight(self) -> Tensor | None:
        """The weight of this site's rows, (out, in[, *kernel]); None where it is not a plain tensor."""
        weight = self.weight() if self.weight else getattr(self.module, "weight", None)
        plain = isinstance(weight, Tensor) and type(weight.data) is Tensor
        if weight is None or not plain or not weight.is_floating_point() or weight.is_meta:
            return None
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
