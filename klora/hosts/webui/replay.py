"""Calls of a WebUI's model made again with other latents: which picture it sees in them.

What the host tells its model (prompts, sizes, whatever other extensions add) is taken as it was told while a picture
was sampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from klora.balance.judge import ALONE, Denoise, Who
from klora.balance.mixture import Mixture
from klora.engine.dynamic import BatchRows
from klora.engine.session import Session
from klora.errors import KloraError
from klora.hosts.rows import rows_of
from klora.hosts.webui.host import WebuiHost
from klora.pair import Pair
from klora.settings import Settings

_NEAR = 0.1
"""How far from a place that is asked for, in τ, a call may have been."""


@dataclass(frozen=True)
class Call:
    """A call of the model at τ and a noise level, for the first picture of its batch and its prompt."""

    tau: float
    level: float
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Recording:
    """Keeps, while a picture is sampled, the call that was nearest to each of some places."""

    def __init__(self, host: WebuiHost, denoiser: Any, places: Sequence[float]) -> None:
        """Listen to the calls of the host's model that `denoiser` makes; `remove` ends that."""
        self._host, self._denoiser = host, denoiser
        self._calls: dict[float, Call | None] = dict.fromkeys(places)
        self._now: tuple[float, float] | None = None
        self._hook = host.diffusion_model.register_forward_pre_hook(self._hear, with_kwargs=True)

    def at(self, tau: float, level: float) -> None:
        """Take note of where sampling is, before the model is called there."""
        self._now = tau, level

    def mixture(self, call: Call) -> Mixture:
        """What the model was shown in a call; KloraError where it is not known what this model predicts."""
        return self._host.mixture(call.level, self._denoiser)

    def remove(self) -> None:
        """Listen no more; what was heard is kept."""
        self._hook.remove()

    def near(self, tau: float) -> Call:
        """The call that was made nearest to a place; KloraError where none was near."""
        found = self._calls[tau]
        if found is None or abs(found.tau - tau) > _NEAR:
            raise KloraError(f"sampling did not pass {tau:.0%} of its schedule, so that its picture cannot be judged")
        return found

    def _hear(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._now is None:
            return
        (tau, level), call = self._now, None
        for place, known in self._calls.items():
            if known is None or abs(tau - place) < abs(known.tau - place):
                call = call or self._call(tau, level, args, kwargs)
                self._calls[place] = call or known

    def _call(self, tau: float, level: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        rows = self._host.conditional_rows(args, kwargs)
        if rows is None:
            rows = BatchRows(0, len(args[0]), len(args[0]))
        if not rows:
            return None
        first = BatchRows(rows.start, rows.start + 1, rows.of)
        options = kwargs.get("transformer_options")
        if isinstance(options, Mapping) and "cond_or_uncond" in options:
            kwargs = {**kwargs, "transformer_options": {**options, "cond_or_uncond": [0]}}
        return Call(tau, level, rows_of(args, first), rows_of(kwargs, first))


class JudgedModel:
    """A WebUI's model with a pair, as it was called while a picture was sampled (`klora.balance.judge.Model`).

    All three are told the picture's whole prompt, as the host had encoded it.
    """

    def __init__(self, host: WebuiHost, pair: Pair, settings: Settings, recording: Recording) -> None:
        """Take a pair that fits the host, and the settings of its fusion."""
        self._host, self._pair, self._settings, self._recording = host, pair, settings, recording

    @contextmanager
    def acting(self, who: Who) -> Iterator[Denoise]:
        """Have no LoRA act, or one alone; nothing is left on the model."""

        def denoise(clean: Tensor, noise: Tensor, tau: float) -> Tensor:
            call = self._recording.near(tau)
            mixture = self._recording.mixture(call)
            shown = mixture.of(clean.float(), noise.float())
            like = call.args[0]
            with torch.no_grad():
                predicted = self._host.diffusion_model(shown.to(like), *call.args[1:], **call.kwargs)
            return mixture.clean(shown, predicted.float().to(shown.device))

        with nullcontext() if who == "base" else self._alone(who):
            yield denoise

    def _alone(self, who: Who) -> Session:
        settings = dataclasses.replace(self._settings, **ALONE[who])
        return self._host.session(self._pair, self._pair.plan(settings, self._host.device))
