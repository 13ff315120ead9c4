"""Calls of a diffusers denoiser made again with other latents: which picture it sees in them.

A pipeline is asked for its first call and stopped there, so that whatever it tells its denoiser (encoded prompts,
sizes, guidance) is told again as it is, by any pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from klora.balance.mixture import Mixture
from klora.errors import KloraError
from klora.hosts.diffusers.pipeline import TIMES, DiffusersHost
from klora.hosts.rows import rows_of

PREDICTED = ("epsilon", "v_prediction", "sample")


class _Stop(Exception):  # noqa: N818 (nothing is wrong)
    """Ends a pipeline's call at the first call of its denoiser."""


@dataclass(frozen=True)
class Call:
    """The arguments of a denoiser's call for one picture with its prompt, by name."""

    arguments: Mapping[str, Any]


def first_call(host: DiffusersHost, arguments: Mapping[str, Any]) -> Call:
    """What a pipeline called with `arguments` first tells its denoiser, as far as it follows the prompt.

    Nothing is denoised. What acts in the text encoders meanwhile is in what is told.
    """
    found: list[Call] = []

    def keep(_denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = host.conditional_rows(args, kwargs)
        told = {**dict(zip(host.inputs, args, strict=False)), **kwargs}
        found.append(Call({name: rows_of(value, rows) for name, value in told.items()}))
        raise _Stop

    # Before all others: what follows the sampling need not hear of a call that is not made.
    hook = host.diffusion_model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    try:
        with suppress(_Stop):
            host.pipe(**arguments)
    finally:
        hook.remove()
    return found[0]


class Times:
    """The times that a pipeline tells its denoiser while it samples a picture, one for each step of its schedule."""

    def __init__(self, host: DiffusersHost) -> None:
        self._host = host
        self._told: list[Tensor] = []

    def __enter__(self) -> Times:
        self._hook = self._host.diffusion_model.register_forward_pre_hook(self._hear, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def __len__(self) -> int:
        return len(self._told)

    def __getitem__(self, step: int) -> Tensor:
        return self._told[step]

    def _hear(self, _denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = self._host.timestep(args, kwargs).flatten()[-1:]
        # Guidance in two calls tells a time twice, and so does a second-order step.
        if not any(torch.equal(time, told) for told in self._told):
            self._told.append(time.clone())


def mixture(scheduler: Any, step: int) -> Mixture:
    """What a pipeline's denoiser is shown at a step of its scheduler's schedule, repeats removed.

    Raises KloraError for a model whose kind of prediction is not known.
    """
    timesteps: list[float] = scheduler.timesteps.tolist()
    timestep = list(dict.fromkeys(timesteps))[step]
    sigmas = getattr(scheduler, "sigmas", None)
    kind: Any = getattr(scheduler.config, "prediction_type", "flow_prediction")
    if sigmas is not None and (kind == "flow_prediction" or getattr(scheduler.config, "use_flow_sigmas", False)):
        sigma = float(sigmas[timesteps.index(timestep)])
        return Mixture(1 - sigma, sigma, "flow")
    if kind not in PREDICTED:
        raise KloraError(
            f"{type(scheduler).__name__}: what a model of {kind!r} predicts is not known here, so that pictures cannot"
            " be judged; choose the balance by eye, with klora compare"
        )
    if sigmas is not None:
        return Mixture.at_level(float(sigmas[timesteps.index(timestep)]), kind)
    alpha = float(scheduler.alphas_cumprod[round(timestep)])
    return Mixture(alpha**0.5, (1 - alpha) ** 0.5, kind)


def check_latents(host: DiffusersHost, call: Call, shape: Sequence[int] | None = None) -> None:
    """Raise KloraError where a call does not show one tensor of latents, of `shape` if that is given."""
    shown = call.arguments[host.inputs[0]]
    if not isinstance(shown, Tensor) or shape not in (None, shown.shape):
        raise KloraError(
            f"{type(host.pipe).__name__}: its denoiser is not shown latents in the form that they have in the end, so"
            " that pictures cannot be judged; choose the balance by eye, with klora compare"
        )


def call_again(host: DiffusersHost, call: Call, shown: Tensor, time: Tensor) -> Tensor:
    """What the denoiser predicts for other latents (1, …) at another time, where all else is as in `call`; fp32.

    Raises KloraError for latents of another form than the call's.
    """
    check_latents(host, call, shown.shape)
    arguments = dict(call.arguments)
    latents, told = host.inputs[0], next(name for name in TIMES if name in arguments)
    before = arguments[latents]
    at = torch.as_tensor(arguments[told])
    arguments[latents] = shown.to(before)
    arguments[told] = time.to(at).expand(at.shape) if at.ndim else time.to(at)[0]
    with torch.no_grad():
        predicted: Tensor = host.diffusion_model(**arguments)[0]
    return predicted.float()
