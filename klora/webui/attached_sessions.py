"""What has hooks on a model at the moment."""

from __future__ import annotations

from typing import Protocol


class Attachable(Protocol):
    """What can be put on a model and taken off again, any number of times: a session, or all of a pipeline's fusion."""

    def attach(self) -> None:
        """Put it on."""

    def detach(self) -> None:
        """Take it off."""


class AttachedSessions:
    """What has hooks on: at most one, unless a host ends a picture in a way that is not known here."""

    def __init__(self) -> None:
        self._attached: list[Attachable] = []

    def attach(self, session: Attachable) -> None:
        """Put a session's hooks on; does nothing when they are on."""
        if session not in self._attached:
            self._attached.append(session)
            session.attach()

    def detach(self, session: Attachable) -> None:
        """Take a session's hooks off; does nothing when they are off."""
        session.detach()
        if session in self._attached:
            self._attached.remove(session)

    def detach_all(self) -> None:
        """Take every hook off."""
        for session in list(self._attached):
            self.detach(session)
