"""Methods of single instances, replaced for a while: never those of a class or a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Wrappers:
    """The methods that have been replaced; `remove` puts all of them back as they were."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, bool, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def has(self, instance: object) -> bool:
        """Whether a method of `instance` is replaced."""
        return any(instance is known for known, *_ in self._replaced)

    def wrap(self, instance: Any, name: str, wrapper_of: Callable[[Any], Any]) -> None:
        """Put `wrapper_of(original)` in the place of a method; does nothing where there is no such method."""
        original = getattr(instance, name, None)
        if original is not None:
            self._replaced.append((instance, name, name in vars(instance), original))
            setattr(instance, name, wrapper_of(original))

    def remove(self) -> None:
        """Put back what was there, the latest first; does nothing when it has been done."""
        while self._replaced:
            instance, name, own, original = self._replaced.pop()
            if own:
                setattr(instance, name, original)
            else:
                vars(instance).pop(name, None)
