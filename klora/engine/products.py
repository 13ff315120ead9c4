"""One delta at one site, applied beside the module by products of its own: y ← y + s·ΔW·x.

A class for each kind of product, all with the same verbs: `ready`, `adder`, `at_tokens`, `set_acting`. Which one a
site takes is settled once, when a session binds it (`product_of`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from klora.engine.joined import SharedInput, joins_on
from klora.engine.site import Site, is_conv
from klora.engine.weights import Chain, Room, Weights, as_dtype, preparing
from klora.errors import MismatchError
from klora.lora.deltas import Delta

Add = Callable[[Tensor, Tensor], Tensor]
"""From the input x and the output y of a module to y with something added, in place where autograd does not watch."""

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Source(Protocol):
    """Where the weights of a product come from."""

    weights: Weights

    def ready(self, device: torch.device, dtype: torch.dtype) -> None:
        """Have there already what takes little memory, so that its becoming active allocates nothing."""

    def kept(self, device: torch.device, dtype: torch.dtype) -> Chain | None:
        """The chain there, the same until `release`; None where it has to be formed for every forward."""

    def formed(self, device: torch.device, dtype: torch.dtype) -> Chain:
        """The chain there, for one forward."""

    def release(self) -> None:
        """Let go of what is as large as the weight."""


class Factored:
    """The factors that the file holds."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def ready(self, device: torch.device, dtype: torch.dtype) -> None:
        """Take them there."""
        self.weights.chain(device, dtype)

    def kept(self, device: torch.device, dtype: torch.dtype) -> Chain:
        """The factors."""
        return self.weights.chain(device, dtype)

    formed = kept

    def release(self) -> None:
        """Nothing is as large as the weight."""


class Dense:
    """ΔW formed, and kept while it acts and there is room for it."""

    def __init__(self, weights: Weights, site: Site, room: Room) -> None:
        """Take a delta without factors; MismatchError where it depends on a weight that cannot be read."""
        self.weights, self._site, self._room = weights, site, room
        # Raises now what would else end a forward of the model.
        self._base()
        self._reserved = 0
        self._chains: dict[tuple[torch.device, torch.dtype], Chain] = {}

    def ready(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing: it is formed when it acts."""

    def kept(self, device: torch.device, dtype: torch.dtype) -> Chain | None:
        """ΔW, if there is room."""
        place = (device, dtype)
        if place not in self._chains:
            nbytes = self.weights.delta.shape[0] * self.weights.delta.columns * dtype.itemsize
            if not self._room.take(nbytes):
                return None
            self._reserved += nbytes
            self._chains[place] = self.formed(device, dtype)
        return self._chains[place]

    def formed(self, device: torch.device, dtype: torch.dtype) -> Chain:
        """ΔW."""
        with preparing():
            return Chain((self.weights.delta.matrix(self._base()).to(device, dtype),), 1.0)

    def _base(self) -> Tensor | None:
        """The weight that ΔW depends on; None where it depends on none."""
        delta = self.weights.delta
        if not delta.needs_base:
            return None
        base = self._site.base_weight()
        if base is None:
            raise MismatchError(
                f"{delta.file}: {delta.key}: a DoRA needs the weights it changes, and"
                f" {type(self._site.module).__name__} does not show them (quantised or offloaded); use an unquantised"
                " model or a LoRA without DoRA"
            )
        return base

    def release(self) -> None:
        """Drop it."""
        self._chains.clear()
        self._room.give_back(self._reserved)
        self._reserved = 0


class Product(ABC):
    """One delta at one site."""

    def __init__(self, delta: Delta, site: Site, source: Source) -> None:
        self.delta, self.site, self.source = delta, site, source

    @abstractmethod
    def adder(self, device: torch.device, dtype: torch.dtype, strength: float) -> Add:
        """What adds strength·ΔW·x to an output y there."""

    @abstractmethod
    def at_tokens(self, x: Tensor, y: Tensor, take: Tensor, strength: float) -> Tensor:
        """strength·ΔW·x at the tokens `take` (T,) of y alone: fp32 (T, out of this site).

        A token is a row of a linear layer's flattened input, or a position of a convolution's output. A kernel larger
        than 1 is applied everywhere, at the LoRA's rank; what follows it, which costs most, at the tokens alone.
        """

    def count(self, y: Tensor) -> int:
        """How many tokens the output y of the module has."""
        return y.numel() // y.shape[-1]

    def picked(self, y: Tensor, take: Tensor) -> Tensor:
        """The tokens `take` (T,) of the output y of the module: (T, out of the module)."""
        return y.reshape(-1, y.shape[-1])[take]

    def base_tokens(self, y: Tensor, take: Tensor) -> Tensor:
        """The tokens `take` (T,) of this site's rows of y: fp32 (T, out)."""
        tokens = self.picked(y, take).float()
        return tokens[:, slice(*self.site.rows)] if self.site.rows else tokens

    def ready(self, device: torch.device, dtype: torch.dtype) -> None:
        """Have factors there before they act."""
        self.source.ready(device, dtype)

    def set_acting(self, acts: bool) -> None:
        """Get ready to act, or not to."""
        if not acts:
            self.source.release()

    def expect(self) -> None:
        """Get ready for another picture: the module's weight may have been written since the last."""
        if self.delta.needs_base:
            self.source.release()

    def bias_adder(self, bias: Tensor, device: torch.device, dtype: torch.dtype) -> Add:
        """What adds a `bias` (out of this site,) to an output there."""
        change = self._beside_rows(bias.to(device, dtype))
        return lambda x, y: self._add_rows(change, y, 1.0)

    def _beside_rows(self, bias: Tensor) -> Tensor:
        """A bias in a shape that can be added to the site's rows of y."""
        return bias

    def _with(self, make: Callable[[Chain], Add], device: torch.device, dtype: torch.dtype) -> Add:
        """The adder that `make` makes of a chain: once, or where no chain is kept for each forward."""
        chain = self.source.kept(device, dtype)
        if chain is not None:
            return make(chain)
        return lambda x, y: make(self.source.formed(device, dtype))(x, y)

    def _add_rows(self, change: Tensor, y: Tensor, strength: float) -> Tensor:
        """Add strength·change to the site's rows of y, the last axis."""
        start, stop = self.site.rows or (0, y.shape[-1])
        if watched(change, y):
            return y + F.pad(change * strength, (start, y.shape[-1] - stop))
        y[..., start:stop].add_(change, alpha=strength)
        return y


class LinearProduct(Product):
    """down and up, or one ΔW, on a linear layer; the product with `down` may be shared with others of one input."""

    def __init__(self, delta: Delta, site: Site, source: Source) -> None:
        super().__init__(delta, site, source)
        self._shared: SharedInput | None = None
        self._place = 0

    def share(self, shared: SharedInput, place: int) -> None:
        """Take the product with `down` from what is shared with modules of the same input, where that pays."""
        self._shared, self._place = shared, place

    def set_acting(self, acts: bool) -> None:
        """Get ready to act, or not to."""
        super().set_acting(acts)
        if self._shared:
            self._shared.set_acting(self._place, acts)
            if not acts:
                self._shared.forget()

    def ready(self, device: torch.device, dtype: torch.dtype) -> None:
        """Have factors there before they act, those that are shared in one piece."""
        if self._shared and joins_on(device):
            self._shared.down.stack(device, dtype)
        super().ready(device, dtype)

    def adder(self, device: torch.device, dtype: torch.dtype, strength: float) -> Add:
        """Two products, the second of them added where y lies."""
        shared = self._shared if self._shared and joins_on(device) else None
        if shared:
            shared.down.stack(device, dtype)
        return self._with(lambda chain: self._flat(chain, dtype, strength, shared), device, dtype)

    def _flat(self, chain: Chain, dtype: torch.dtype, strength: float, shared: SharedInput | None) -> Add:
        (*before, last), alpha = chain.weights, strength * chain.factor
        down = before[0] if before else None
        narrowing = down.t() if down is not None else None
        columns, inner, rows, place = last.t(), last.shape[1], self.site.rows, self._place
        width = self.site.module_rows

        # Matrices throughout: a product of higher dimensions is one call of torch more.
        def add(x: Tensor, y: Tensor) -> Tensor:
            if x.requires_grad or y.requires_grad or not y.is_contiguous():
                narrow = as_dtype(x, dtype) if down is None else F.linear(as_dtype(x, dtype), down)
                return self._add_rows(F.linear(narrow, last), y, alpha)
            if shared and shared.pays:
                narrow = shared.product(place, x, dtype).reshape(-1, inner)
            else:
                narrow = (x if x.dtype is dtype else x.to(dtype)).reshape(-1, x.shape[-1])
                if narrowing is not None:
                    narrow = torch.mm(narrow, narrowing)
            if narrow.dtype is not dtype:
                # Under autocast a product of fp32 tensors may come back in half precision.
                narrow = narrow.to(dtype)
            flat = y.view(-1, width)
            if rows is not None:
                flat = flat[:, rows[0] : rows[1]]
            flat.addmm_(narrow, columns, alpha=alpha)
            return y

        return add

    def at_tokens(self, x: Tensor, y: Tensor, take: Tensor, strength: float) -> Tensor:
        """The same at some tokens."""
        chain = self.source.kept(y.device, y.dtype) or self.source.formed(y.device, y.dtype)
        x = x.to(y.dtype).reshape(-1, x.shape[-1])[take]
        for weight in chain.weights:
            x = F.linear(x, weight)
        return x.float().mul_(strength * chain.factor)


class KroneckerProduct(Product):
    """w1 ⊗ w2 on a linear layer, without forming it."""

    def adder(self, device: torch.device, dtype: torch.dtype, strength: float) -> Add:
        """The product of the small factors, added to the rows."""
        weights, factor = self.source.formed(device, dtype)

        def add(x: Tensor, y: Tensor) -> Tensor:
            return self._add_rows(kronecker_product(as_dtype(x, dtype), *weights), y, strength * factor)

        return add

    def at_tokens(self, x: Tensor, y: Tensor, take: Tensor, strength: float) -> Tensor:
        """The same at some tokens."""
        weights, factor = self.source.formed(y.device, y.dtype)
        x = x.to(y.dtype).reshape(-1, x.shape[-1])[take]
        return kronecker_product(x, *weights).float().mul_(strength * factor)


class ConvProduct(Product):
    """down, (mid,) up, or one ΔW, on a convolution of 1 to 3 dimensions, in groups or not.

    The kernel lies in the first weight of (ΔW) and (down, up), in the second of (down, mid, up).
    """

    def __init__(self, delta: Delta, site: Site, source: Source) -> None:
        super().__init__(delta, site, source)
        self._dims = len(site.module.kernel_size)

    def adder(self, device: torch.device, dtype: torch.dtype, strength: float) -> Add:
        """The convolutions in turn."""
        return self._with(lambda chain: self._flat(chain, dtype, strength), device, dtype)

    def _flat(self, chain: Chain, dtype: torch.dtype, strength: float) -> Add:
        steps, alpha = self._steps(chain), strength * chain.factor

        def add(x: Tensor, y: Tensor) -> Tensor:
            change = as_dtype(x, dtype)
            for step in steps:
                change = step(change)
            return self._add_rows(change, y, alpha)

        return add

    def _beside_rows(self, bias: Tensor) -> Tensor:
        return bias.reshape(-1, *self._dims * (1,))

    def _add_rows(self, change: Tensor, y: Tensor, strength: float) -> Tensor:
        """Add strength·change to the site's channels of y."""
        start, stop = self.site.rows or (0, self.site.shape[0])
        if watched(change, y):
            around = (*(2 * self._dims * (0,)), start, y.shape[-1 - self._dims] - stop)
            return y + F.pad(change * strength, around)
        y.narrow(-1 - self._dims, start, stop - start).add_(change, alpha=strength)
        return y

    def at_tokens(self, x: Tensor, y: Tensor, take: Tensor, strength: float) -> Tensor:
        """The same at some tokens."""
        chain = self.source.kept(y.device, y.dtype) or self.source.formed(y.device, y.dtype)
        *before, last = self._steps(chain)
        x = x.to(y.dtype)
        for step in before:
            x = step(x)
        if not before:
            return self.picked(last(x), take).float().mul_(strength * chain.factor)
        # What follows the kernel looks at one position at a time.
        x = last(self.picked(x, take).reshape(len(take), -1, *self._dims * (1,))).flatten(1)
        return x.float().mul_(strength * chain.factor)

    def count(self, y: Tensor) -> int:
        """The positions of y (B, C, …)."""
        return y.numel() // y.shape[1]

    def picked(self, y: Tensor, take: Tensor) -> Tensor:
        """Positions of y as rows: (T, C)."""
        y = y.flatten(2)
        return y[take // y.shape[2], :, take % y.shape[2]]

    def _steps(self, chain: Chain) -> list[Callable[[Tensor], Tensor]]:
        module, groups, apply = self.site.module, self.site.module.groups, _CONVOLUTIONS[self._dims]
        spatial = (len(chain.weights) - 1) // 2
        steps: list[Callable[[Tensor], Tensor]] = []
        for index, weight in enumerate(chain.weights):
            kernel = weight.reshape(*weight.shape, *((2 + self._dims - weight.ndim) * (1,)))
            if groups > 1 and index < len(chain.weights) - 1:
                # Each group of the input is multiplied by all of `down`, and has its own rows of `up`.
                kernel = torch.cat(groups * [kernel])
            if index == spatial:
                # The module's own method for the kernel, so that stride, padding and padding mode (tiling!) hold.
                steps.append(_own(module, kernel))
            else:
                steps.append(_plain(apply, kernel, groups))
        return steps


def _own(module: Any, kernel: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: module._conv_forward(x, kernel, None)


def _plain(apply: Callable[..., Tensor], kernel: Tensor, groups: int) -> Callable[[Tensor], Tensor]:
    return lambda x: apply(x, kernel, groups=groups)


def product_of(delta: Delta, site: Site, weights: Weights | None = None, room: Room | None = None) -> Product:
    """The product for a delta at a site, of what is prepared of its weights, with room for a formed ΔW.

    Raises MismatchError for a DoRA on a weight that cannot be read. Values are not checked.
    """
    weights = weights or Weights(delta)
    if weights.kronecker and not is_conv(site.module):
        return KroneckerProduct(delta, site, Factored(weights))
    kind = ConvProduct if is_conv(site.module) else LinearProduct
    return kind(delta, site, Factored(weights) if weights.low_rank else Dense(weights, site, room or Room()))


def kronecker_product(x: Tensor, w1: Tensor, *w2: Tensor) -> Tensor:
    """(w1 ⊗ w2)·x of x (…, b·d): (…, a·c). `w2` is one matrix (c, d), or factors to be applied in turn."""
    *before, last = w2
    x = x.unflatten(-1, (w1.shape[1], -1))
    for weight in before:
        x = F.linear(x, weight)
    # w1 may come anywhere: here nothing is copied, and between factors of low rank its input is narrow.
    return F.linear(w1 @ x, last).flatten(-2)


def watched(x: Tensor, y: Tensor) -> bool:
    """Whether autograd records what happens to y, so that it must not be changed in place."""
    return torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
