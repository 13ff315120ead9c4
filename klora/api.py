"""The Python interface: `plan` and `fuse`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.fusion.plan import FusionPlan
from klora.hosts.diffusers import DiffusersHost
from klora.hosts.diffusers_follow import follow
from klora.hosts.refiner import make_refiner
from klora.pair import Pair
from klora.settings import Settings

Path = str | PathLike[str]


def plan(subject: Path, style: Path, *, cache: ScoreCache | None = None, **settings: Any) -> FusionPlan:
    """Say which of two LoRA files would act in which module at which step.

    `settings` are the fields of `klora.settings.Settings`. Raises SettingsError, LoraFileError or MismatchError.
    """
    return Pair.open(subject, style, cache).plan(Settings.parse(settings))


@contextmanager
def fuse(
    pipe: Any, subject: Path, style: Path, *, cache: ScoreCache | None = None, **settings: Any
) -> Iterator[Session]:
    """Fuse two LoRA files in a diffusers pipeline while the `with` block runs; the pipeline is as before afterwards.

    `settings` are the fields of `klora.settings.Settings`. Yields the session, whose `plan` tells what acted where.
    Raises SettingsError, LoraFileError or MismatchError before anything is touched.
    """
    host = DiffusersHost(pipe)
    pair = Pair.open(subject, style, cache)
    plan = pair.plan(Settings.parse(settings), host.architecture)
    session = Session(
        pair, plan, host.sites(), host.text_sites(), host.model_name, host.denoiser, host.conditional_rows
    )
    refiner = make_refiner(plan.settings, host.device)
    follower = follow(host, session, refiner)
    try:
        with session:
            yield session
    finally:
        follower.remove()
