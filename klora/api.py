"""The Python interface: `plan` and `fuse`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.weights import KEPT
from klora.errors import LeftOutWarning
from klora.fusion.plan import FusionPlan
from klora.fusion.scores import OnScored
from klora.hosts.diffusers import DiffusersHost, follow
from klora.hosts.guidance import make_guidance
from klora.keywords import SettingsKeywords
from klora.lora.coverage import idle
from klora.lora.side import SideSource
from klora.pair import PAIRS
from klora.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack


def plan(
    subject: SideSource,
    style: SideSource,
    *,
    cache: ScoreCache | None = None,
    on_scored: OnScored | None = None,
    **settings: Unpack[SettingsKeywords],
) -> FusionPlan:
    """Say which of two LoRAs would act in which module at which step.

    `subject` and `style` are paths of .safetensors files, or state dicts in memory; or lists of these and of (path,
    weight), whose weighted sum is then one side. `settings` are the fields of `klora.Settings`; `on_scored` is
    called with how many modules of both are scored, and of how many, where they are new. Raises what `fuse` raises
    of settings and files.
    """
    return PAIRS.open(subject, style, cache).plan(Settings.parse(settings), on_scored=on_scored)


@contextmanager
def fuse(
    pipe: Any,
    subject: SideSource,
    style: SideSource,
    *,
    cache: ScoreCache | None = None,
    on_scored: OnScored | None = None,
    **settings: Unpack[SettingsKeywords],
) -> Iterator[Session]:
    """Fuse two LoRAs in a diffusers pipeline while the `with` block runs; the pipeline is as before afterwards.

    `subject` and `style` are paths of .safetensors files, or state dicts in memory; or lists of these and of (path,
    weight), whose weighted sum is then one side: `[("dog.safetensors", 0.8), "coat.safetensors"]`. `settings` are
    the fields of `klora.Settings`. Yields the session, whose `plan` tells what acts where, and `observed` what did.
    `on_scored` is called with how many modules of both are scored, and of how many, where they are new. Files used
    last are kept for the next time, unless they have changed on disk; `release_memory` lets go of them.

    Raises, before anything is touched:
        SettingsError: a setting is unknown, has an impossible value, or asks for what cannot be done with this model;
            reference pictures or their models cannot be loaded.
        LoraFileError: a file cannot be read or understood; UnsupportedFormatError for a kind of LoRA, or a pickle,
            that K-LoRA does not fuse, LoraValueError for NaN or infinity.
        MismatchError: the two belong to different models, or to another than the pipeline's.
        KloraError: the pipeline has no denoiser, has two of them, or does not tell it the time.
    And, from a call of the pipeline inside the block:
        KloraError: the pipeline tells the time in a unit that its scheduler does not have, or nothing that should act
            was called, as in a model that was compiled before.
        LoraFileError: a file that was too large to hold has changed on disk.
    """
    host = DiffusersHost(pipe)
    pair = host.fit(PAIRS.open(subject, style, cache))
    plan = pair.plan(Settings.parse(settings), host.device, on_scored)
    session = host.session(pair, plan)
    for text in (*idle(pair.loras), *session.left_out):
        warnings.warn(f"klora: {text}", LeftOutWarning, stacklevel=3)
    guidance = make_guidance(plan.settings, host.device)
    with ExitStack() as stack:
        # Once more at the very end: its own end may be interrupted.
        stack.callback(session.detach)
        stack.enter_context(follow(host, session, guidance))
        yield stack.enter_context(session)


def release_memory() -> None:
    """Let go of the weights that are kept, on every device, for the next `fuse` of the same files."""
    KEPT.clear()
