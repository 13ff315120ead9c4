"""A Gradio that only takes note of what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Component:
    """One control, with what it was made from and the events that were connected to it."""

    def __init__(self, kind: str, *args: Any, **kwargs: Any) -> None:
        self.kind, self.args, self.kwargs = kind, args, kwargs
        self.visible = kwargs.get("visible", True)
        self.events: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, event: str) -> Callable[..., None]:
        if event not in ("click", "change"):
            raise AttributeError(event)
        return lambda fn=None, **wiring: self.events.setdefault(event, []).append({"fn": fn, **wiring})

    @property
    def texts(self) -> list[str]:
        """What a person reads on it."""
        said = [self.kwargs.get(name) for name in ("label", "info", "placeholder")]
        said += self.args if self.kind in ("Button", "Accordion") else []
        return [text for text in said if text]


class RecordedGradio:
    """Stands for the module `gradio`."""

    def __init__(self) -> None:
        self.made: list[Component] = []

    def __getattr__(self, kind: str) -> Callable[..., Component]:
        if not kind[0].isupper():
            raise AttributeError(kind)

        def make(*args: Any, **kwargs: Any) -> Component:
            self.made.append(Component(kind, *args, **kwargs))
            return self.made[-1]

        return make

    def by_id(self, elem_id: str) -> Component:
        """The control with an id."""
        return next(made for made in self.made if made.kwargs.get("elem_id") == elem_id)
