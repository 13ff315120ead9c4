"""Weights with the deltas in them, beside the model's own: W′ = W0 + Σ s·ΔW of what acts.

W′ is formed in fp32 and rounded once. The parameter's data points at it and is pointed back at W0, whose storage is
never written. A forward then costs what it costs with one merged LoRA, whatever the family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from klora.engine.bypass import HookedLayer, Part, Uncopied, drop
from klora.engine.parameters import HeldParameter
from klora.engine.weights import preparing
from klora.errors import KloraError


class Witness(Uncopied):
    """A forward hook that notes the first call of its module and is gone."""

    __slots__ = ("layer",)

    def __init__(self, layer: HeldLayer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note it."""
        self.layer.called = True
        drop(module, self)


class PlainState(Uncopied):
    """A hook of `state_dict`: what is saved of a model at work is its own weight."""

    __slots__ = ("layer",)

    def __init__(self, layer: HeldLayer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Give W0 in the place of W′."""
        for leaf, base in (("weight", self.layer.base), ("bias", self.layer.bias and self.layer.bias.base)):
            if base is not None and f"{prefix}{leaf}" in state:
                state[f"{prefix}{leaf}"] = base


class HeldLayer:
    """One module whose weight points at W′ while it is attached."""

    def __init__(self, module: nn.Module, parts: Sequence[Part]) -> None:
        """Take a module whose weight is plain, and the parts that lie in it."""
        self.module, self.parts = module, parts
        self.called = False
        """Whether the module has been called since `expect`."""
        self.base: Tensor | None = None
        """W0, while W′ stands in its place."""
        changes_bias = any(bias is not None for part in parts for bias in part.biases)
        self.bias = HeldParameter(module, "bias") if changes_bias else None
        self._parameter = weight_of(module)
        self._formed: Tensor | None = None
        self._version = 0
        for part in parts:
            for product in filter(None, part.operands):
                # Nothing is read from the file while the model is at work.
                product.source.weights.read()
        self._witness, self._state = Witness(self), PlainState(self)

    def attach(self) -> None:
        """Point at W′; does nothing where that is done."""
        if self.base is None:
            self.module._register_state_dict_hook(self._state)
            self._point()

    def detach(self) -> None:
        """Point back at W0; does nothing where that is done. KloraError where somebody has exchanged the weight."""
        drop(self.module, self._witness)
        drop(self.module, self._state)
        self._point_back()

    def expect(self) -> None:
        """Wait for a call of the module."""
        self.called = False
        if self._witness not in self.module._forward_hooks.values():
            self.module.register_forward_hook(self._witness)

    def changed(self) -> None:
        """Let what acts now act from the next call on."""
        if self.base is not None:
            self._point()

    def _point(self) -> None:
        """Form W′ of what acts and point at it, or at W0 where nothing does."""
        if self.base is None or self._parameter._version != self._version:
            # Whatever is loaded into the model meanwhile is its own weight from then on.
            self._parameter = weight_of(self.module)
            self.base = self._parameter.data
            self._version = self._parameter._version
        with preparing():
            # Where the model has been moved, W0 goes too.
            self.base = self.base.to(self._parameter.data)
            acts = any(part.acting for part in self.parts)
            self._formed = merged(self.base, self.parts) if acts else self.base
            self._swap(self._formed)
        if self.bias:
            self.bias.point(self._bias_change)

    def _bias_change(self, base: Tensor) -> Tensor:
        change = torch.zeros(base.shape, dtype=torch.float32, device="cpu")
        for part in self.parts:
            if (bias := part.bias) is not None:
                change[slice(*(part.any_operand.site.rows or (0, len(base))))] += bias
        return change

    def _point_back(self) -> None:
        base, formed, self.base, self._formed = self.base, self._formed, None, None
        if self.bias:
            self.bias.point_back()
        if base is None or formed is None:
            return
        if self.module._parameters.get("weight") is not self._parameter:
            raise KloraError(
                f"the weight of a {type(self.module).__name__} was exchanged while a fusion was at work in it; load the"
                " model again, or fuse with engine=bypass"
            )
        if self._parameter._version == self._version:
            moved = self._parameter.data.data_ptr() != formed.data_ptr()
            self._swap(base.to(self._parameter.data) if moved else base)

    def _swap(self, data: Tensor) -> None:
        self._parameter.data = data
        # So that a backward pass through what was there before is an error, not a gradient of something else.
        increment_version(self._parameter)
        self._version = self._parameter._version


class FormedLayer(HeldLayer):
    """One module for whose W′ there is no room to stay: it is formed for each forward.

    With gradients on, its products are added instead: W′ would be gone when the backward pass comes to it.
    """

    def __init__(self, module: nn.Module, parts: Sequence[Part]) -> None:
        super().__init__(module, parts)
        self._before, self._after = Before(self), After(self)
        self._beside = HookedLayer(module, parts)

    def attach(self) -> None:
        """Put the hooks on; does nothing when they are on."""
        if self._before not in self.module._forward_pre_hooks.values():
            self.module.register_forward_pre_hook(self._before)
            self.module.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    def detach(self) -> None:
        """Take the hooks off; does nothing when they are off."""
        drop(self.module, self._before)
        drop(self.module, self._after)
        self._point_back()

    def expect(self) -> None:
        """Wait for a call of the module."""
        self.called = False

    def changed(self) -> None:
        """Let what now acts act from the next call on."""
        self._beside.changed()

    def enter(self) -> None:
        """Point at W′, formed for the forward that begins."""
        self.called = True
        if not torch.is_grad_enabled():
            self._point()

    def leave(self, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor | None) -> Tensor | None:
        """Point back, or give the output with what acts added; y is None where the forward has failed."""
        if self.base is not None:
            self._point_back()
            return None
        return None if y is None else self._beside.hook(self.module, args, kwargs, y)


class Before(Uncopied):
    """A pre-hook that has W′ formed."""

    __slots__ = ("layer",)

    def __init__(self, layer: FormedLayer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Form it."""
        self.layer.enter()


class After(Uncopied):
    """A forward hook, called also where the forward has failed, that drops it."""

    __slots__ = ("layer",)

    def __init__(self, layer: FormedLayer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Drop it."""
        return self.layer.leave(args, kwargs, output)


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight parameter of a module that has one."""
    weight = module._parameters["weight"]
    if weight is None:
        raise ValueError(f"a {type(module).__name__} without a weight")
    return weight


def merged(base: Tensor, parts: Sequence[Part]) -> Tensor:
    """W0 + Σ s·ΔW of what acts, formed in fp32 and rounded once to the dtype of W0."""
    weight = base.to(torch.float32, copy=True)
    for part in parts:
        for product, strength in part.acting:
            rows = slice(*(product.site.rows or (0, len(base))))
            change = product.source.weights.difference(base[rows])
            weight[rows] += strength * change.reshape(weight[rows].shape)
    return weight.to(base.dtype)
