"""Methods of single instances, replaced for a while: never those of a class or a module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Wrapped:
    """A wrapper in the place of a method. Others may be put around it, and it may be taken off before them."""

    def __init__(self, inner: Any, own: bool, wrapper_of: Callable[[Any], Any]) -> None:
        """Take what the method was, whether that was the instance's `own`, and what makes the wrapper of it."""
        self.inner, self.own = inner, own
        self._wrapper: Any = wrapper_of(functools.wraps(inner)(lambda *args, **kwargs: self.inner(*args, **kwargs)))
        # With the signature and the name of the method, which hosts look at; not with what else is noted of it.
        functools.update_wrapper(self, inner, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapper."""
        return (self._wrapper or self.inner)(*args, **kwargs)

    def end(self) -> None:
        """Do nothing from now on but call what the method was."""
        self._wrapper = None


class Wrappers:
    """The methods that have been replaced; `remove` puts all of them back as they were."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Wrapped]] = []
        self._beneath: list[tuple[Wrapped, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def has(self, instance: object) -> bool:
        """Whether a method of `instance` is replaced."""
        return any(instance is known for known, *_ in self._replaced)

    def wrap(self, instance: Any, name: str, wrapper_of: Callable[[Any], Any]) -> None:
        """Put `wrapper_of(original)` in the place of a method; does nothing where there is no such method."""
        original = getattr(instance, name, None)
        if original is not None:
            wrapped = Wrapped(original, name in vars(instance), wrapper_of)
            self._replaced.append((instance, name, wrapped))
            setattr(instance, name, wrapped)

    def wrap_beneath(self, instance: Any, name: str, wrapper_of: Callable[[Any], Any]) -> None:
        """The same under all wrappers that are around the method: it acts in a call that these have begun."""
        lowest = _lowest(vars(instance).get(name))
        if lowest is None:
            self.wrap(instance, name, wrapper_of)
        else:
            wrapped = Wrapped(lowest.inner, lowest.own, wrapper_of)
            self._replaced.append((instance, name, wrapped))
            lowest.inner = wrapped

    def replace(self, instance: Any, name: str, instead: Any) -> None:
        """Put `instead` in the place of a method under all wrappers that are around it."""
        lowest = _lowest(vars(instance).get(name))
        if lowest is None:
            self.wrap(instance, name, lambda original: instead)
        else:
            self._beneath.append((lowest, lowest.inner))
            lowest.inner = instead

    def remove(self) -> None:
        """Put back what was there, whoever has put a wrapper around it since; does nothing when it has been done."""
        # What has been put back is forgotten only then: an interrupt may come at any line.
        while self._beneath:
            around, original = self._beneath[-1]
            around.inner = original
            self._beneath.pop()
        while self._replaced:
            instance, name, mine = self._replaced[-1]
            mine.end()
            top = vars(instance).get(name)
            if top is not mine:
                _unlink(top, mine)
            elif mine.own or isinstance(mine.inner, Wrapped):
                setattr(instance, name, mine.inner)
            else:
                del vars(instance)[name]
            self._replaced.pop()


def _lowest(found: Any) -> Wrapped | None:
    """The innermost of the wrappers that `found` begins with."""
    while isinstance(found, Wrapped) and isinstance(found.inner, Wrapped):
        found = found.inner
    return found if isinstance(found, Wrapped) else None


def _unlink(top: Any, mine: Wrapped) -> None:
    """Take a wrapper out from under those that `top` begins with; under others' it stays, and does nothing."""
    while isinstance(top, Wrapped) and top.inner is not mine:
        top = top.inner
    if isinstance(top, Wrapped):
        top.inner, top.own = mine.inner, mine.own
