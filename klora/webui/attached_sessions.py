"""Which sessions have hooks on a model at the moment."""

from __future__ import annotations

from klora.engine.session import Session


class AttachedSessions:
    """The sessions whose hooks are on: at most one, unless a host ends a picture in a way that is not known here."""

    def __init__(self) -> None:
        self._sessions: list[Session] = []

    def attach(self, session: Session) -> None:
        """Put a session's hooks on; does nothing when they are on."""
        if session not in self._sessions:
            self._sessions.append(session)
            session.attach()

    def detach(self, session: Session) -> None:
        """Take a session's hooks off; does nothing when they are off."""
        session.detach()
        if session in self._sessions:
            self._sessions.remove(session)

    def detach_all(self) -> None:
        """Take every hook off."""
        for session in list(self._sessions):
            self.detach(session)
