"""Models that torch.compile has compiled, whole or in regions, before a fusion or while it lasts.

torch compiles the forward of a module with the hooks it finds, skips the guards on hooks inside, and takes parameters
as inputs. So held weights act in what is compiled; hooks that come later do not, and none may be there to be compiled.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from klora.engine.bypass import Uncopied, drop
from klora.engine.wrapping import Wrappers

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
_COMPILED = "_compiled_call_impl"
"""Where torch keeps what `module.compile()` has made."""


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` or `torch.compile(module)` has compiled it."""
    # Not by `hasattr`: what a module lacks is found out slowly, and all of a model are asked.
    return getattr(module, _COMPILED, None) is not None or "_orig_mod" in module._modules


def as_written(module: nn.Module) -> nn.Module:
    """The module that torch.compile was given, of what it has made of it."""
    return getattr(module, "_orig_mod", module)


def written_path(path: str) -> str:
    """The path of a module as it is without compiled modules around it."""
    return ".".join(name for name in path.split(".") if name != "_orig_mod")


def compiled_regions(model: nn.Module) -> Iterator[nn.Module]:
    """The compiled modules of a model, the model itself among them, without those inside other ones."""
    if is_compiled(model):
        yield model
    else:
        for child in model.children():
            yield from compiled_regions(child)


def exchange_is_seen() -> bool:
    """Whether a compiled module looks its parameters up when it is called: before torch 2.5 it kept those of before."""
    config = torch._dynamo.config
    with warnings.catch_warnings():
        # Where it is always so, asking is deprecated.
        warnings.simplefilter("ignore")
        return bool(getattr(config, "inline_inbuilt_nn_modules", hasattr(torch.compiler, "set_stance")))


def uncompiled() -> AbstractContextManager[Any]:
    """Inside the block, whatever torch.compile has made runs as it was written; before torch 2.6 nothing can be done.

    For a model that is compiled anew for each call, where nobody sees beforehand that it is.
    """
    stance: Callable[[str], AbstractContextManager[Any]] | None = getattr(torch.compiler, "set_stance", None)
    # What compiles costs more than a second to import; where nobody has, nothing is compiled.
    if stance is None or "torch._dynamo" not in sys.modules:
        return nullcontext()
    return stance("force_eager")


class Eagerly:
    """Compiled modules that run as they were written, until `remove`."""

    def __init__(self) -> None:
        self._wrappers = Wrappers()
        self._regions: list[nn.Module] = []

    def runs(self, region: nn.Module) -> bool:
        """Whether a region runs eagerly."""
        return any(region is known for known in self._regions)

    def run(self, region: nn.Module) -> None:
        """Let a region run eagerly, with all that is compiled inside it."""
        self._regions.append(region)
        for module in region.modules():
            for name, written in ((_COMPILED, "_call_impl"), ("forward", "_orig_mod")):
                if name in vars(module) and hasattr(module, written):
                    self._wrappers.replace(module, name, getattr(module, written))

    def remove(self) -> None:
        """Have them compiled as before."""
        self._regions.clear()
        self._wrappers.remove()


class Calls:
    """Hears of the calls of a module, outside of what torch.compile makes of it, now or while it listens."""

    def __init__(
        self, module: nn.Module, before: Before | None = None, after: After | None = None, always: bool = False
    ) -> None:
        """`before` and `after` are called like hooks; what `after` gives, if it does, is the output instead.

        With `always`, `after` is called also where the call has failed, with None for the output.
        """
        self.module, self._always = module, always
        self._before, self._after = before, after
        self._hooks = (BeforeCall(self), AfterCall(self))
        self._wrappers = Wrappers()
        self._listens = False

    def attach(self) -> None:
        """Listen; does nothing where that is done."""
        if self._listens:
            return
        self._listens = True
        if not hasattr(self.module, "_orig_mod"):
            self._wrappers.wrap(self.module, "compile", self._compiling)
        self._listen()

    def remove(self) -> None:
        """Listen no longer; does nothing where that is done."""
        self._listens = False
        for hook in self._hooks:
            drop(self.module, hook)
        self._wrappers.remove()

    def _listen(self) -> None:
        if getattr(self.module, _COMPILED, None) is not None:
            self._wrappers.wrap_beneath(self.module, _COMPILED, self._around)
        else:
            self.module.register_forward_pre_hook(self._hooks[0], with_kwargs=True)
            if self._after is not None:
                # Hooks of others see one forward: they get what comes of all.
                self.module.register_forward_hook(
                    self._hooks[1], with_kwargs=True, prepend=True, always_call=self._always
                )

    def _compiling(self, compile: Callable[..., Any]) -> Callable[..., Any]:
        def compile_without_hooks(*args: Any, **kwargs: Any) -> None:
            self.remove()
            try:
                compile(*args, **kwargs)
            finally:
                self.attach()

        return compile_without_hooks

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.before(args, kwargs)
            try:
                output = call(*args, **kwargs)
            except BaseException:
                if self._always:
                    self.after(args, kwargs, None)
                raise
            instead = self.after(args, kwargs, output)
            return output if instead is None else instead

        return called

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins."""
        if self._before is not None:
            self._before(self.module, args, kwargs)

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """It has ended."""
        return self._after(self.module, args, kwargs, output) if self._after is not None else None


class BeforeCall(Uncopied):
    """The pre-hook of a module that is not compiled."""

    __slots__ = ("calls",)

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Tell; torch calls a hook that an earlier one has just removed all the same, without the keywords."""
        if kwargs is not None:
            self.calls.before(args, kwargs)


class AfterCall(Uncopied):
    """Its forward hook."""

    __slots__ = ("calls",)

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Tell."""
        return self.calls.after(args, kwargs, output)
