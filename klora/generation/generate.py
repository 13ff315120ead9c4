"""Pictures of a fused pair, one for each seed."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from klora import __version__
from klora.api import fuse
from klora.engine.session import Session
from klora.fusion.scores import OnScored
from klora.generation.pipeline import call_arguments, memory_errors, model_name
from klora.generation.request import GenerationRequest
from klora.hosts.diffusers import DiffusersHost
from klora.pair import side_facts
from klora.report.summary import notices
from klora.settings import options

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class GeneratedPicture:
    """One picture: all that made it, how long the pipeline took, and how often the denoiser ran for each step."""

    image: Image
    facts: dict[str, Any]
    seconds: float
    forwards: float
    session: Session


def generate(
    pipe: Any,
    request: GenerationRequest,
    seeds: Sequence[int],
    announce: Callable[[int, Session], None],
    on_scored: OnScored | None = None,
) -> Generator[GeneratedPicture, None, None]:
    """Fuse the pair of a request in `pipe` and generate one picture for each seed.

    `announce` is told the number of each picture, from 1, before it is begun; `on_scored`, how far the scoring of new
    files is. Raises KloraError for a pair or a setting that does not do, and where memory does not suffice. Closing the
    generator leaves the pipeline as it was.
    """
    call = call_arguments(pipe, request)
    fusion = fuse(pipe, request.subject, request.style, on_scored=on_scored, **request.settings.to_dict())
    with memory_errors(), fusion as session:
        for number, seed in enumerate(seeds, 1):
            announce(number, session)
            # On the CPU whatever the device, so that a seed means the same noise everywhere.
            generator = torch.Generator("cpu").manual_seed(seed)
            with _counted(DiffusersHost(pipe).diffusion_model) as calls:
                start = time.perf_counter()
                image = pipe(**call, generator=generator).images[0]
                seconds = time.perf_counter() - start
            facts = _facts(request, pipe, session, image, seed)
            yield GeneratedPicture(image, facts, seconds, len(calls) / session.plan.steps, session)


@contextmanager
def _counted(denoiser: torch.nn.Module) -> Iterator[list[None]]:
    """Count the runs of a denoiser at its first layer, where no way of calling it goes unseen."""
    calls: list[None] = []
    first: Any = getattr(denoiser, "conv_in", None) or getattr(denoiser, "x_embedder", denoiser)
    hook = first.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def session_notices(session: Session) -> list[str]:
    """What a person should know of a fusion: about the pair, and about what the model lacks."""
    return [*notices(session.pair, session.plan), *session.left_out]


def _facts(request: GenerationRequest, pipe: Any, session: Session, image: Image, seed: int) -> dict[str, Any]:
    """All that made a picture, ready for JSON. Files and folders go by name: a path may tell who made it."""
    pair, plan = session.pair, session.observed
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return {
        "klora": __version__,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": seed,
        "steps": plan.steps,
        "size": list(image.size),
        "guidance_scale": request.guidance if request.guidance is not None or default is None else default.default,
        "model": model_name(request.model),
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "subject": side_facts(pair.subject, pair.cache),
        "style": side_facts(pair.style, pair.cache),
        "settings": _without_paths(plan.settings.to_dict()),
        "gamma": plan.gamma,
        "balance": plan.balance,
        "share": plan.share,
    }


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    known = options()
    return {
        name: ";".join(Path(part).name if Path(part).is_absolute() else part for part in value.split(";"))
        if known[name].free
        else value
        for name, value in settings.items()
    }
