"""What has hooks on a model at the moment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

from klora.engine.compiled import Calls, as_written, is_compiled, uncompiled
from klora.hosts.webui.host import WebuiHost

RUNS_AS_WRITTEN = "the model that the host compiles runs uncompiled as long as it is fused"


class Attachable(Protocol):
    """What can be put on a model and taken off again, any number of times: a session, or all of a pipeline's fusion."""

    def attach(self) -> None:
        """Put it on."""

    def detach(self) -> None:
        """Take it off."""


class Uncompiled:
    """A session of a model whose host may compile it for each call, as Forge Neo does: while it is on, none is.

    `say` hears where that makes a difference, at the first call: before it nothing tells.
    """

    def __init__(self, session: Attachable, host: WebuiHost, say: Callable[[str], None]) -> None:
        self._session, self._host, self._say = session, host, say
        self._stance = ExitStack()
        self._first = Calls(as_written(host.diffusion_model), self._look)

    def attach(self) -> None:
        """Put it on."""
        self._stance.enter_context(uncompiled())
        self._session.attach()
        self._first.attach()

    def detach(self) -> None:
        """Take it off."""
        self._first.remove()
        with self._stance:
            self._session.detach()

    def _look(self, *_: Any) -> None:
        self._first.remove()
        if is_compiled(self._host.diffusion_model):
            self._say(RUNS_AS_WRITTEN)


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
