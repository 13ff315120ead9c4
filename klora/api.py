"""The Python interface: `plan` and `fuse`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.weights import KEPT
from klora.fusion.plan import FusionPlan
from klora.fusion.scores import OnScored
from klora.hosts.diffusers import DiffusersHost, follow
from klora.hosts.guidance import make_guidance
from klora.pair import PAIRS
from klora.settings import Settings

Path = str | PathLike[str]


def plan(
    subject: Path,
    style: Path,
    *,
    cache: ScoreCache | None = None,
    on_scored: OnScored | None = None,
    **settings: Any,
) -> FusionPlan:
    """Say which of two LoRA files would act in which module at which step.

    `settings` are the fields of `klora.settings.Settings`; `on_scored` hears how many modules of both files have been
    scored, of how many, when a file is new. Raises SettingsError, LoraFileError or MismatchError.
    """
    return PAIRS.open(subject, style, cache).plan(Settings.parse(settings), on_scored=on_scored)


@contextmanager
def fuse(
    pipe: Any,
    subject: Path,
    style: Path,
    *,
    cache: ScoreCache | None = None,
    on_scored: OnScored | None = None,
    **settings: Any,
) -> Iterator[Session]:
    """Fuse two LoRA files in a diffusers pipeline while the `with` block runs; the pipeline is as before afterwards.

    `settings` are the fields of `klora.settings.Settings`. Yields the session, whose `plan` tells what acted where.
    `on_scored` hears how many modules of both files have been scored, of how many, when a pair is new. Files used last
    are kept for the next time, unless they have changed on disk; `release_memory` lets go of them.
    Raises SettingsError, LoraFileError or MismatchError before anything is touched.
    """
    host = DiffusersHost(pipe)
    pair = PAIRS.open(subject, style, cache).for_model(host.index)
    plan = pair.plan(Settings.parse(settings), host.device, on_scored)
    session = Session(
        pair, plan, host.sites(), host.text_sites(), host.model_name, host.denoiser, host.conditional_rows
    )
    guidance = make_guidance(plan.settings, host.device)
    follower = follow(host, session, guidance)
    try:
        with session:
            yield session
    finally:
        follower.remove()


def release_memory() -> None:
    """Let go of the weights that are kept, on every device, for the next `fuse` of the same files."""
    KEPT.clear()
