"""When each side may act: a window of the schedule for each, outside of which the other acts alone."""

from __future__ import annotations

from typing import NamedTuple

from klora.errors import SettingsError
from klora.settings import Settings

WINDOWS = ("subject_from", "subject_to", "style_from", "style_to")
"""The settings that are these."""
_ROUNDING = 1e-9
"""i/N, or a place found from a noise level, may fall just short of a window's end."""


class Window(NamedTuple):
    """The part [start, stop) of the schedule, the very end included where it reaches it; empty where start = stop."""

    start: float
    stop: float

    def holds(self, tau: float) -> bool:
        """Whether position τ lies inside."""
        inside = self.start - _ROUNDING <= tau and (tau < self.stop - _ROUNDING or self.stop == 1)
        return inside and not self.empty

    @property
    def empty(self) -> bool:
        """Whether it is never open."""
        return self.start == self.stop


class Windows(NamedTuple):
    """The windows of both sides."""

    subject: Window
    style: Window

    @classmethod
    def of(cls, settings: Settings) -> Windows:
        """Those that settings name; SettingsError where one ends before it begins, or neither is ever open."""
        for side in cls._fields:
            start, stop = (getattr(settings, f"{side}_{end}") for end in ("from", "to"))
            if start > stop:
                raise SettingsError(f"{side}_from", f"{start:g} lies behind {side}_to, which is {stop:g}")
        found = cls(Window(settings.subject_from, settings.subject_to), Window(settings.style_from, settings.style_to))
        if found.subject.empty and found.style.empty:
            raise SettingsError("subject_to", "neither side is ever to act; open one of the two windows")
        return found

    @property
    def always(self) -> bool:
        """Whether both are open from the beginning to the end."""
        return self == (Window(0, 1), Window(0, 1))

    def open_at(self, tau: float) -> tuple[bool, bool]:
        """Whether subject and style may act at position τ."""
        return self.subject.holds(tau), self.style.holds(tau)
