"""Policies that take several forwards of the model, in a WebUI: around its diffusion model, on the instance."""

from __future__ import annotations

from typing import Any

from torch import nn

from klora.engine.compiled import Calls
from klora.engine.ensemble import Ensemble
from klora.engine.session import Session


class Predictions:
    """Has each call of the diffusion model give the mean of the forwards that a session's policy asks for.

    The calls of an evaluation come in the same order at every step: a call's number stands for its conditioning.
    """

    def __init__(self, model: nn.Module, session: Session) -> None:
        self._ensemble = Ensemble(session, self._condition)
        self._conditions: dict[tuple[int, int], object] = {}
        self._calls = 0
        self._heard = Calls(model, self._before, self._ensemble.finish)
        self._heard.attach()

    def begin_evaluation(self) -> None:
        """Count the calls anew."""
        self._calls = 0

    def remove(self) -> None:
        """Take everything off; does nothing when it is off."""
        self._heard.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls += 1
        self._ensemble.begin(args, kwargs)

    def _condition(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        return self._conditions.setdefault((self._calls, len(args[0])), object())
