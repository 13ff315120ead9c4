"""Apply deltas beside a module instead of writing them into its weight: y ← W·x + s·ΔW·x.

A forward hook on the module instance adds the output of the deltas that are active. It works whatever the
weight is stored as (fp8, GGUF, NF4, offloaded), switching is a change of a number, and taking it off leaves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from klora.engine.products import Add, Product
from klora.engine.site import Site
from klora.errors import KloraError


def unchanged(x: Tensor, y: Tensor) -> Tensor:
    """Add nothing to y."""
    return y


Both = tuple[float, float]
"""A number for subject and style each."""
Biases = tuple[Tensor | None, Tensor | None]
"""What subject and style add to a bias."""


@dataclass
class Part:
    """What may act at one site: `operands` in the order subject, style; `strengths` is what of each acts now.

    `biases` are what each LoRA adds to the module's bias, fp32 (out,) of the site, None where either has none;
    `bias_strengths` is what of these acts, which differs where a policy has made other operands of both.
    """

    operands: tuple[Product | None, Product | None]
    strengths: Both = (0.0, 0.0)
    biases: Biases = (None, None)
    bias_strengths: Both = (0.0, 0.0)
    measured: ClassVar[bool] = False
    """Whether what acts is decided in the forward itself."""

    @property
    def any_operand(self) -> Product:
        """One of the operands, all of which lie at the same site."""
        return next(operand for operand in self.operands if operand is not None)

    @property
    def module(self) -> nn.Module:
        """The module that it lies in."""
        module: nn.Module = self.any_operand.site.module
        return module

    def lies_in(self, site: Site | None) -> bool:
        """Whether a site is the one that it lies in."""
        mine = self.any_operand.site
        return site is not None and site.module is mine.module and site.rows == mine.rows

    def set(self, strengths: Both) -> bool:
        """Make each operand act with its strength; 0 switches it off. False where nothing changes by it."""
        if strengths == self.strengths:
            return False
        for operand, strength in zip(self.operands, strengths, strict=True):
            if operand is not None:
                operand.set_acting(bool(strength))
        self.strengths = strengths
        return True

    def set_biases(self, strengths: Both) -> bool:
        """Make each LoRA's change of the bias act with its strength. False where nothing changes by it."""
        before, self.bias_strengths = self.bias_strengths, strengths
        return before != strengths and any(bias is not None for bias in self.biases)

    def expect(self) -> None:
        """Get ready for another picture."""
        for operand in self.operands:
            if operand is not None:
                operand.expect()

    @property
    def bias(self) -> Tensor | None:
        """What is added to the bias now, fp32 (out,); None where nothing is."""
        return summed(self.biases, self.bias_strengths)

    @property
    def acting(self) -> list[tuple[Product, float]]:
        """The operands that act, and how strongly."""
        pairs = zip(self.operands, self.strengths, strict=True)
        return [(operand, strength) for operand, strength in pairs if operand is not None and strength]

    def ready(self, device: torch.device, dtype: torch.dtype) -> None:
        """Have all factors there, also of what is not active: its becoming active then allocates nothing."""
        for operand in self.operands:
            if operand is not None:
                operand.ready(device, dtype)

    def adders(self, device: torch.device, dtype: torch.dtype) -> list[Add]:
        """What adds all that acts to an output there."""
        adders = [operand.adder(device, dtype, strength) for operand, strength in self.acting]
        bias = self.bias
        return adders if bias is None else [*adders, self.any_operand.bias_adder(bias, device, dtype)]


def summed(biases: Biases, strengths: Both) -> Tensor | None:
    """Σ s·Δb of what acts, fp32; None where nothing does."""
    pairs = zip(biases, strengths, strict=True)
    terms = [bias * strength for bias, strength in pairs if bias is not None and strength]
    return torch.stack(terms).sum(0) if terms else None


class Uncopied:
    """A hook that must not be copied with its module: the copy would be fused for ever."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raise KloraError: copying, pickling and torch.save come here."""
        raise KloraError("a fusion is at work on this model; copy or save the model before or after it")


class Hook(Uncopied):
    """The forward hook of a module: one flat function adds what acts, to outputs of one device and dtype.

    Where an output is of another, and when what acts has changed, `layer` makes the function anew.
    """

    __slots__ = ("add", "device", "dtype", "layer")

    def __init__(self, layer: HookedLayer) -> None:
        self.layer = layer
        self.add: Add = unchanged
        self.device: torch.device | None = None
        self.dtype: torch.dtype | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """Give the output with what acts added."""
        if y.dtype is not self.dtype or y.device != self.device:
            self.layer.prepare(y.device, y.dtype)
        return self.add(args[0] if args else kwargs["input"], y)


class HookedLayer:
    """One module, whose output has what acts added to it."""

    def __init__(self, module: nn.Module, parts: Sequence[Part]) -> None:
        """Take the parts that lie in the module."""
        self.module, self.parts = module, parts
        self.called = False
        """Whether the module has been called since `expect`."""
        self.hook = Hook(self)
        self._ready: tuple[torch.device, torch.dtype] | None = None

    def attach(self) -> None:
        """Put the hook on; does nothing when it is on."""
        if not self.attached:
            self.module.register_forward_hook(self.hook, with_kwargs=True)

    def detach(self) -> None:
        """Take the hook off; does nothing when it is off."""
        drop(self.module, self.hook)

    @property
    def attached(self) -> bool:
        """Whether the hook is on."""
        return self.hook in self.module._forward_hooks.values()

    def expect(self) -> None:
        """Wait for a call of the module."""
        self.called = False
        for part in self.parts:
            part.expect()
        self.changed()

    def changed(self) -> None:
        """Let what acts now act from the next call on."""
        self.hook.dtype = None

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the function that adds to an output there."""
        self.called = True
        if (device, dtype) != self._ready:
            for part in self.parts:
                part.ready(device, dtype)
            self._ready = (device, dtype)
        self.hook.add = in_turn([add for part in self.parts for add in part.adders(device, dtype)])
        self.hook.device, self.hook.dtype = device, dtype


def drop(module: nn.Module, hook: object) -> None:
    """Take a hook off a module, wherever it lies there; does nothing when it is off."""
    # By looking, not by a handle: an interrupt may come between registering a hook and getting its handle.
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for place in [place for place, found in hooks.items() if found is hook]:
            module._forward_hooks_with_kwargs.pop(place, None)
            module._forward_pre_hooks_with_kwargs.pop(place, None)
            module._forward_hooks_always_called.pop(place, None)
            # Last: as long as it is there, it can be found again.
            del hooks[place]


def in_turn(adders: Sequence[Add]) -> Add:
    """One function of several."""
    if len(adders) < 2:
        return adders[0] if adders else unchanged

    def add(x: Tensor, y: Tensor) -> Tensor:
        for one in adders:
            y = one(x, y)
        return y

    return add
