"""What a session puts on the modules of one model: put on and taken off as a whole, compiled or not, and counted.

Whether a module was really called is seen, not concluded: each layer notes its first call in a sampling pass, and what
was not called is told by name, whatever the cause is (`uncalled`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from klora.engine.bypass import HookedLayer, Part
from klora.engine.compiled import Calls, Eagerly, compiled_regions, exchange_is_seen, is_compiled
from klora.engine.held import Held, HeldLayer, Samples, weight_of
from klora.engine.ways import BYPASS, Layer, is_plain, layer_of, may_hold, plain_modules
from klora.engine.weights import KEPT, Room
from klora.errors import KloraError

Say = Callable[[str], None]


class Layers:
    """The layers of one model, or of modules of which no model is known, and what is changed there beside weights."""

    def __init__(
        self,
        parts: Mapping[str, Part],
        model: nn.Module | None = None,
        engine: str = BYPASS,
        room: Room | None = None,
        say: Say = lambda text: None,
        parameters: Iterable[Held] = (),
        brief: bool = False,
    ) -> None:
        """Choose the way of each module that `parts`, by name, lie in; `say` hears what a user should know.

        Of a model that is `brief`, which is called once a picture, weights are held in what is compiled alone. It suits
        what has been compiled meanwhile at each of its calls, others at `expect`.
        """
        self.model, self._room, self._say = model, room or Room(), say
        self._engine, self._brief = engine, brief
        self._parameters = list(parameters)
        # Where it is not known when the model is called, these are shown all the time.
        self._parameters_in_calls = [] if model is None or brief else self._parameters
        self._weights: list[Held] = []
        """What is shown in calls of the model, in the place of weights."""
        self._gradients = False
        """Whether gradients were recorded in the last of these calls."""
        self._attached = False
        self._eagerly = Eagerly()
        self._compiled: list[nn.Module] = []
        """Compiled modules in which all that acts is held."""
        self._entry: Calls | None = None
        self._samples: Samples | None = None
        self._witnesses: list[Calls] = []
        self._parts = parts
        self._names: dict[int, list[str]] = {}
        modules: dict[int, nn.Module] = {}
        for name, part in parts.items():
            module = part.module
            modules[id(module)] = module
            self._names.setdefault(id(module), []).append(name)
        self._sharing = _sharing(model)
        self._plain = self._plain_now()
        way = BYPASS if model is None or brief else engine
        self._layers: dict[int, Layer] = {
            key: layer_of(module, self._parts_of(key), way, key in self._plain, self._room)
            for key, module in modules.items()
        }

    def attach(self) -> None:
        """Put everything on; nothing, where that fails half-way. Does nothing where it is on."""
        if self._attached:
            return
        self._attached = True
        try:
            self.fit()
            for layer in self._layers.values():
                layer.attach()
            for held in self._parameters:
                held.prepare() if self._parameters_in_calls else held.show()
            self._wait()
            self._listen()
            self._look_for_writing()
            KEPT.at_work.add(self)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take everything off."""
        self._attached = False
        KEPT.at_work.discard(self)
        # What runs eagerly lies beneath what listens, and so comes off first.
        self._eagerly.remove()
        self._compiled.clear()
        self._forget_witnesses()
        if self._entry:
            self._entry.remove()
        for layer in self._layers.values():
            layer.detach()
        for held in self._parameters:
            held.drop()

    def changed(self, names: Sequence[str]) -> None:
        """Let what now acts in these act from the next call on."""
        for key in {id(self._parts[name].module) for name in names}:
            self._layers[key].changed()

    def expect(self, running: nn.Module | None = None) -> None:
        """Wait for calls of all modules, from now on or once attached; `running` is what the model has become."""
        if running is not None:
            self.model = running
        for layer in self._layers.values():
            layer.called = False
        if self._attached:
            self._look_for_writing()
            self.fit(entering=True)
            self._listen(entering=True)
            self._wait()

    def let_go(self) -> None:
        """Go on by products, where weights are held outside of what is compiled: the memory is wanted elsewhere."""
        for key, layer in list(self._layers.items()):
            if isinstance(layer, HeldLayer) and key not in self._in_compiled():
                self._hook(key)
        self._sort()

    def leave_out(self, parameters: Iterable[Held]) -> None:
        """Have these parameters, of others too, be the model's own from now on."""
        for held in parameters:
            if held in self._parameters:
                self._parameters.remove(held)
                held.drop()

    def _wait(self) -> None:
        self._forget_witnesses()
        # A hook of a module inside would be compiled with it, or not be seen.
        inside = self._in_compiled()
        for region in self._compiled:
            witness = _witness(region, self._inside(region))
            self._witnesses.append(witness)
            witness.attach()
        for key, layer in self._layers.items():
            if key not in inside and not layer.called:
                layer.expect()

    def uncalled(self) -> list[str]:
        """The names of the modules that were not called since `expect`."""
        return [name for key, layer in self._layers.items() if not layer.called for name in self._names[key]]

    def cause(self) -> str:
        """Why none of the modules may have been called."""
        if self.model is None:
            return "the model that runs is not the one that was fused"
        found = {id(module) for module in self.model.modules()}
        if not found & self._layers.keys():
            return "its modules were exchanged after the fusion began; begin it anew"
        if any(is_compiled(module) for module in self.model.modules()):
            return "the model is compiled, and torch skips what comes to its modules later; compile it in another way"
        return "the model that runs is not the one that was fused, or something runs its modules in another way"

    def fit(self, entering: bool = False) -> None:
        """Suit what the model has become by now. `entering`: the model itself is being called.

        A weight that others have begun to move, cast or pack is held no longer. In what is compiled hooks are not seen:
        there weights are held where they may be and there is room, else the compiled modules run eagerly. KloraError
        where it is too late for that.
        """
        if self.model is None or not self._attached:
            return
        self._plain = self._plain_now()
        for key, layer in list(self._layers.items()):
            if isinstance(layer, HeldLayer) and key not in self._plain:
                self._hook(key)
        self._compiled = []
        for region in compiled_regions(self.model):
            found = self._inside(region)
            if not found or self._eagerly.runs(region):
                continue
            if exchange_is_seen() and self._hold(found):
                self._compiled.append(region)
                for layer in found:
                    if isinstance(layer, HeldLayer):
                        layer.unwatch()
            elif entering and region is self.model and hasattr(region, "_orig_mod"):
                raise KloraError(
                    f"{type(self.model).__name__} was compiled after the fusion began, and its weights cannot be held"
                    " beside the fused ones; compile it before the fusion begins"
                )
            else:
                self._eagerly.run(region)
                self._say(
                    f"{type(region).__name__} is compiled, and runs eagerly as long as it is fused: not all of its"
                    " weights can be held beside the fused ones"
                )
        self._sort()

    def _plain_now(self) -> set[int]:
        """Those of the modules whose weights may be held."""
        if self.model is None or not may_hold():
            return set()
        within = [module for module in plain_modules(self.model) if id(module) in self._names]
        return {id(module) for module in within if id(module) not in self._sharing and is_plain(module)}

    def _hook(self, key: int) -> None:
        """Go on by products in one module."""
        layer = self._layers[key]
        layer.detach()
        self._layers[key] = hooked = HookedLayer(layer.module, layer.parts)
        hooked.called = layer.called
        hooked.attach()

    def _listen(self, entering: bool = False) -> None:
        """Hear of the calls of the model, where that matters; `entering`: one is under way."""
        held = any(isinstance(layer, HeldLayer) for layer in self._layers.values())
        if self.model is None or not (held or self._parameters or self._brief):
            return
        if self._entry is None or self._entry.module is not self.model:
            if self._entry is not None:
                self._entry.remove()
            self._entry = Calls(self.model, self._enter, self._leave, always=True)
            if entering:
                self._enter()
        self._entry.attach()

    def _enter(self, *_: Any) -> None:
        """A call of the model begins."""
        if self._brief:
            self.fit()
        if self._gradients is not torch.is_grad_enabled():
            self._gradients = torch.is_grad_enabled()
            self._sort()
        if not all(held.enter() for held in (*self._weights, *self._parameters_in_calls)):
            self.fit()
            for held in (*self._weights, *self._parameters_in_calls):
                held.show()

    def _leave(self, *_: Any) -> None:
        """It has ended."""
        for held in self._weights:
            held.leave()
        # A backward pass may compute a part of the model once more.
        if not torch.is_grad_enabled():
            for held in self._parameters_in_calls:
                held.leave()

    def _sort(self) -> None:
        """Sort out which weights are shown in calls, now that layers or the recording of gradients have changed."""
        self._weights, inside = [], self._in_compiled()
        for key, layer in self._layers.items():
            if type(layer) is HeldLayer:
                aside = self._gradients and key not in inside
                layer.set_aside(aside)
                self._weights += [] if aside else layer.held

    def _look_for_writing(self) -> None:
        """Form anew what is made of values that somebody has written past torch since the last picture."""
        weights = [held for layer in self._layers.values() if type(layer) is HeldLayer for held in layer.held]
        before, self._samples = self._samples, Samples([*weights, *self._parameters])
        if before is not None:
            for one in self._samples.changed(before):
                one.changed()

    def _in_compiled(self) -> set[int]:
        return {id(layer.module) for region in self._compiled for layer in self._inside(region)}

    def _hold(self, layers: Sequence[Layer]) -> bool:
        """Hold all of these, or change nothing."""
        others = [layer for layer in layers if type(layer) is not HeldLayer]
        nbytes = sum(weight_of(layer.module).nbytes for layer in others if id(layer.module) in self._plain)
        if self._engine == BYPASS or any(id(layer.module) not in self._plain for layer in others):
            return False
        if any(part.measured for layer in others for part in layer.parts) or not self._room.take(nbytes):
            return False
        for layer in others:
            layer.detach()
            held = HeldLayer(layer.module, layer.parts)
            self._layers[id(layer.module)] = held
            held.attach()
        return True

    def _inside(self, region: nn.Module) -> list[Layer]:
        return [layer for module in region.modules() if (layer := self._layers.get(id(module))) is not None]

    def _parts_of(self, key: int) -> list[Part]:
        return [self._parts[name] for name in self._names[key]]

    def _forget_witnesses(self) -> None:
        while self._witnesses:
            self._witnesses[-1].remove()
            self._witnesses.pop()


def _sharing(model: nn.Module | None) -> set[int]:
    """The modules whose weight is that of another too, and cannot be held for each of them."""
    modules = [] if model is None else [m for m in model.modules() if m._parameters.get("weight") is not None]
    count = Counter(id(module._parameters["weight"]) for module in modules)
    return {id(module) for module in modules if count[id(module._parameters["weight"])] > 1}


def _witness(region: nn.Module, layers: Sequence[Layer]) -> Calls:
    """Notes the first call of a compiled module for the layers in it."""

    def called(*_: Any) -> None:
        for layer in layers:
            layer.called = True
        witness.remove()

    # After the call: one that is under way, and has this pass begin, is the first.
    witness = Calls(region, after=called)
    return witness
