"""Parameters with the deltas in them, beside the model's own: W′ = W0 + Σ s·ΔW of what acts.

W′ is formed in fp32 and rounded once. While the model is being called, its module is shown W′ in the place of W0, which
is never touched: whatever is read, moved or written between two calls is the model's own. A forward then costs what it
costs with one merged LoRA, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from klora.engine.bypass import HookedLayer, Part, Uncopied, drop
from klora.engine.weights import preparing

Form = Callable[[Tensor], "Tensor | None"]
"""From W0 to W′, or None where nothing acts."""
_STANDS = "_klora_held"
"""Where a W′ notes whose it is."""


class Held:
    """One parameter of a module, and W′, which stands in its place from `enter` to `leave`."""

    def __init__(self, module: nn.Module, leaf: str, form: Form) -> None:
        """Take the parameter `leaf` of `module`, and what makes W′ of W0."""
        self.module, self.leaf, self._form = module, leaf, form
        self._own: nn.Parameter | None = None
        """The module's parameter, while another stands in its place."""
        self._formed: nn.Parameter | None = None
        self._of: tuple[nn.Parameter | None, int, int | None] = (None, 0, None)
        """What `_formed` has been made of: the parameter, where its values lay, and how often they had been written.

        The last is None where torch does not count that.
        """

    @property
    def own(self) -> nn.Parameter | None:
        """The module's own parameter."""
        return self.module._parameters.get(self.leaf) if self._own is None else self._own

    @property
    def stands(self) -> bool:
        """Whether the module is shown W′."""
        return self._own is not None

    def prepare(self) -> None:
        """Form W′, where that is not done and the parameter is plain."""
        own = self.own
        if self._formed is None and own is not None and is_plain(own):
            with preparing():
                formed = self._form(own.data)
                self._formed = own if formed is None else nn.Parameter(formed, own.requires_grad)
            if self._formed is not own:
                setattr(self._formed, _STANDS, self)
            self._of = own, own.data_ptr(), None if own.is_inference() else own._version

    def changed(self) -> None:
        """Form W′ anew where it has been formed: of what now acts, or of what the parameter has become."""
        if self._formed is None:
            return
        self._formed = None
        self.prepare()
        if self._own is not None:
            self.module._parameters[self.leaf] = self._own if self._formed is None else self._formed

    def enter(self) -> bool:
        """Show W′; False where the parameter is no longer what it was made of, as far as torch knows."""
        if self._own is None:
            shown = self.module._parameters
            own, (of, place, version) = shown.get(self.leaf), self._of
            if self._formed is None or own is None or own is not of or own.data_ptr() != place:
                return False
            if version is not None and own._version != version:
                return False
            self._own = own
            shown[self.leaf] = self._formed
        return True

    def show(self) -> None:
        """Show W′ of what the parameter is now, unless that is no longer plain."""
        if not self.enter():
            self._formed = None
            self.prepare()
            self.enter()

    def leave(self) -> None:
        """Show W0 again, where the model has gone meanwhile; does nothing where that is done."""
        own = self._own
        if own is None:
            return
        shown = self.module._parameters.get(self.leaf)
        if shown is not self._formed and (above := self._above(shown)):
            # Another fusion, begun later, goes on.
            above._own = own
            above.changed()
        else:
            if shown is not None and shown.get_device() != own.get_device():
                own.data = own.data.to(shown.device)
            self.module._parameters[self.leaf] = own
        self._own = None

    def _above(self, shown: nn.Parameter | None) -> Held | None:
        """Whose W′ stands in the place of this one's."""
        above: Held | None = getattr(shown, _STANDS, None)
        while above is not None and above._own is not self._formed:
            above = getattr(above._own, _STANDS, None)
        return above

    def drop(self) -> None:
        """Show W0 again, and let go of W′."""
        self.leave()
        self._formed = None


class HeldLayer:
    """One module that is shown W′ in calls of its model.

    With gradients on, its products are added instead: a backward pass may compute a part of the model once more, when
    W′ is gone. Inside of what is compiled, where no hooks are seen, W′ is shown all the same.
    """

    def __init__(self, module: nn.Module, parts: Sequence[Part]) -> None:
        """Take a module whose weight is plain, and the parts that lie in it."""
        self.module, self.parts = module, parts
        self.called = False
        """Whether the module has been called since `expect`."""
        self.held = [Held(module, "weight", lambda base: merged(base, parts))]
        if any(bias is not None for part in parts for bias in part.biases):
            self.held.append(Held(module, "bias", lambda base: with_biases(base, parts)))
        self._beside = HookedLayer(module, parts)
        self._witness = Witness(self)
        for part in parts:
            for product in filter(None, part.operands):
                # Nothing is read from the file while the model is at work.
                product.source.weights.read()

    def attach(self) -> None:
        """Have W′ ready."""
        for held in self.held:
            held.prepare()

    def detach(self) -> None:
        """Show W0 and take everything off; does nothing where that is done."""
        self.unwatch()
        self._beside.detach()
        for held in self.held:
            held.drop()

    def expect(self) -> None:
        """Wait for a call of the module."""
        self.called = False
        if self._witness not in self.module._forward_hooks.values():
            self.module.register_forward_hook(self._witness, with_kwargs=True)

    def unwatch(self) -> None:
        """Wait no longer: torch is to compile the module, and would its hook with it."""
        drop(self.module, self._witness)

    def changed(self) -> None:
        """Let what acts now act from the next call on."""
        self._beside.changed()
        for held in self.held:
            held.changed()

    @property
    def stands(self) -> bool:
        """Whether the module is shown W′."""
        return self.held[0].stands

    @property
    def acts(self) -> bool:
        """Whether a call of the module has what acts in it, by W′ or by products."""
        return self.stands or self._beside.attached

    def beside(self, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """The output of the module's own weight with what acts added."""
        return self._beside.hook(self.module, args, kwargs, y)

    def set_aside(self, aside: bool) -> None:
        """Have the products act in the place of W′, or W′ again."""
        if aside:
            for held in self.held:
                held.leave()
            self._beside.attach()
        else:
            self._beside.detach()


class Witness(Uncopied):
    """A forward hook that notes the first call of its module by the model and is gone.

    Until then somebody may call the module by itself, who is to see what acts.
    """

    __slots__ = ("layer",)

    def __init__(self, layer: HeldLayer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Note it, and add what acts where it does not yet."""
        self.layer.called = True
        if not self.layer.acts:
            return self.layer.beside(args, kwargs, output)
        drop(module, self)
        return None


class FormedLayer(HeldLayer):
    """One module for whose W′ there is no room to stay: it is formed for each forward of the module."""

    def __init__(self, module: nn.Module, parts: Sequence[Part]) -> None:
        super().__init__(module, parts)
        self._before, self._after = Before(self), After(self)

    def attach(self) -> None:
        """Put the hooks on; does nothing when they are on."""
        if self._before not in self.module._forward_pre_hooks.values():
            self.module.register_forward_pre_hook(self._before)
            self.module.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    def detach(self) -> None:
        """Take the hooks off; does nothing when they are off."""
        drop(self.module, self._before)
        drop(self.module, self._after)
        for held in self.held:
            held.drop()

    def expect(self) -> None:
        """Wait for a call of the module."""
        self.called = False

    def changed(self) -> None:
        """Let what now acts act from the next call on."""
        self._beside.changed()

    def begin(self) -> None:
        """Show W′, formed for the forward that begins."""
        self.called = True
        if not torch.is_grad_enabled():
            for held in self.held:
                held.show()

    def end(self, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor | None) -> Tensor | None:
        """Drop it, or give the output with what acts added; y is None where the forward has failed."""
        if self.stands:
            for held in self.held:
                held.drop()
            return None
        return None if y is None else self._beside.hook(self.module, args, kwargs, y)


class Before(Uncopied):
    """A pre-hook that has W′ formed."""

    __slots__ = ("layer",)

    def __init__(self, layer: FormedLayer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Form it."""
        self.layer.begin()


class After(Uncopied):
    """A forward hook, called also where the forward has failed, that drops it."""

    __slots__ = ("layer",)

    def __init__(self, layer: FormedLayer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Drop it."""
        return self.layer.end(args, kwargs, output)


class Samples:
    """A few values of each of some parameters, by which it is seen that somebody has written into them past torch."""

    SIZE = 8

    def __init__(self, held: Sequence[Held]) -> None:
        """Look at the parameters as they are now."""
        groups: dict[tuple[torch.device, torch.dtype], list[Held]] = {}
        for one in held:
            if (own := one.own) is not None and is_plain(own):
                groups.setdefault((own.device, own.dtype), []).append(one)
        self._groups = {place: (found, _sample(found)) for place, found in groups.items()}

    def changed(self, since: Samples) -> list[Held]:
        """Those of which other samples have been taken than `since`."""
        changed = []
        for place, (held, values) in self._groups.items():
            before, earlier = since._groups.get(place, ([], values))
            if before == held and not torch.equal(values, earlier):
                changed += [held[row] for row in (values != earlier).any(1).nonzero().flatten().tolist()]
        return changed


@torch.no_grad()
def _sample(held: Sequence[Held]) -> Tensor:
    """(parameters, SIZE), fetched at once."""
    views = []
    for one in held:
        own = one.own
        assert own is not None
        # Wherever the values lie: a view is made and nothing is copied.
        views.append(own.detach().as_strided((Samples.SIZE,), (own.numel() // Samples.SIZE,)))
    return torch.stack(views).cpu()


def is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter's values can be read as they are."""
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    return plain and parameter.is_floating_point() and not parameter.is_meta


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight parameter of a module that has one."""
    weight = module._parameters["weight"]
    if weight is None:
        raise ValueError(f"a {type(module).__name__} without a weight")
    return weight


def merged(base: Tensor, parts: Sequence[Part]) -> Tensor | None:
    """W0 + Σ s·ΔW of what acts, formed in fp32 and rounded once to the dtype of W0; None where nothing does."""
    acting = [(product, strength) for part in parts for product, strength in part.acting]
    if not acting:
        return None
    weight = base.to(torch.float32, copy=True)
    for product, strength in acting:
        rows = slice(*(product.site.rows or (0, len(base))))
        change = product.source.weights.difference(base[rows])
        weight[rows] += strength * change.reshape(weight[rows].shape)
    return weight.to(base.dtype)


def with_biases(base: Tensor, parts: Sequence[Part]) -> Tensor | None:
    """The same of a bias."""
    acting = [(part, bias) for part in parts if (bias := part.bias) is not None]
    if not acting:
        return None
    total = base.to(torch.float32, copy=True)
    for part, bias in acting:
        total[slice(*(part.any_operand.site.rows or (0, len(base))))] += bias.to(base.device)
    return total.to(base.dtype)
