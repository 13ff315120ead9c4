"""The balance of a pair in a diffusers pipeline, found by what its own LoRAs see in a few pictures."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klora.api import fuse
from klora.balance.judge import ALONE, Denoise, Who, forwards, judge
from klora.balance.search import PLACES, SHARES, Candidate, best_of, check_findable
from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.errors import KloraError
from klora.hosts.diffusers import DiffusersHost
from klora.hosts.diffusers.replay import Call, Times, call_again, check_latents, first_call, mixture
from klora.keywords import SettingsKeywords
from klora.lora.side import SideSource
from klora.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack

OnStage = Callable[[str, float], None]
"""Is told what is done now, and how many pictures' worth of work has been done, of what `cost` says."""


@dataclasses.dataclass(frozen=True)
class Balance:
    """The share that a pair should have, and the candidates that it was found among, with the picture of each."""

    share: float
    candidates: tuple[Candidate, ...]
    images: tuple[Image, ...]


def cost(steps: int) -> float:
    """What finding a balance costs, in pictures of `steps` steps with guidance: those made, and judging them."""
    return len(SHARES) + forwards(len(SHARES), len(PLACES)) / (2 * steps)


def find_balance(
    pipe: Any,
    subject: SideSource,
    style: SideSource,
    *,
    prompt: str | None,
    subject_prompt: str | None = None,
    style_prompt: str | None = None,
    picture_seed: int = 0,
    call: Mapping[str, Any] | None = None,
    cache: ScoreCache | None = None,
    on_stage: OnStage | None = None,
    **settings: Unpack[SettingsKeywords],
) -> Balance:
    """Find the share of two LoRAs in a diffusers pipeline, which is as before afterwards.

    Makes a picture of `prompt` at a few shares, has each LoRA alone say how much of it is in them, under the prompt
    that it is given or else the same, and takes the share with most of both. `call` are other arguments of the
    pipeline's call, embeddings among them where the prompt is None; `settings`, `subject`, `style` and `cache` are
    those of `klora.fuse`.

    Raises what `klora.fuse` raises, and
        KloraError: the policy has no share, or balance or share are given; the pipeline does not show its latents; one
            of the LoRAs has no part in any of the pictures.
    """
    chosen = Settings.parse(settings)
    check_findable(chosen)
    prompts: dict[Who, str | None] = {
        "base": prompt,
        "subject": prompt if subject_prompt is None else subject_prompt,
        "style": prompt if style_prompt is None else style_prompt,
    }
    arguments = {**(call or {}), "num_inference_steps": chosen.steps}
    model = PipelineModel(pipe, (subject, style), prompts, arguments, chosen, picture_seed, cache)
    model.check()
    tell = on_stage or (lambda _what, _done: None)
    images, latents = [], []
    for number, share in enumerate(SHARES):
        tell(f"share {share:g}", number)
        image, found = model.picture(share)
        images.append(image)
        latents.append(found)
    made, whole = len(SHARES), cost(chosen.steps)
    tell("judging", made)
    parts = judge(model, latents, PLACES, lambda done, of: tell("judging", made + (whole - made) * done / of))
    candidates = tuple(Candidate(*both) for both in zip(SHARES, parts, strict=True))
    return Balance(best_of(candidates).share, candidates, tuple(images))


class PipelineModel:
    """A pipeline with a pair: it makes pictures of them, and says which picture it sees in noisy latents."""

    def __init__(
        self,
        pipe: Any,
        files: tuple[SideSource, SideSource],
        prompts: Mapping[Who, str | None],
        call: Mapping[str, Any],
        settings: Settings,
        seed: int,
        cache: ScoreCache | None = None,
    ) -> None:
        """Take the prompt for each that may act, `base` for the pictures too, and the rest of the pipeline's `call`.

        Raises KloraError for a pipeline that does not show its latents.
        """
        if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
            raise KloraError(
                f"{type(pipe).__name__} does not show its latents (callback_on_step_end), so that its pictures cannot"
                " be judged; choose the balance by eye, with klora compare"
            )
        self._host = DiffusersHost(pipe)
        self._pipe, self._files, self._prompts, self._call = pipe, files, prompts, call
        self._settings, self._seed, self._cache = settings, seed, cache
        self._times = Times(self._host)

    def check(self) -> None:
        """Raise KloraError, before anything is sampled, for a denoiser that is not shown one tensor of latents."""
        check_latents(self._host, self._first_call("base"))

    def picture(self, share: float) -> tuple[Image, Tensor]:
        """A picture of both at a share, and its latents (1, …) as the denoiser has them."""
        latents: list[Tensor] = []

        def keep(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            latents[:] = [values["latents"]]
            return {}

        asked = {"prompt": self._prompts["base"], "generator": self._generator(), "callback_on_step_end": keep}
        with self._fused({"share": share}), self._times:
            made = self._pipe(**self._call, **asked)
        if not hasattr(made, "images"):
            raise KloraError(f"{type(self._pipe).__name__} makes no pictures; use a text-to-image pipeline")
        return made.images[0], latents[0]

    @contextmanager
    def acting(self, who: Who) -> Iterator[Denoise]:
        """Have no LoRA act, or one alone, under its own prompt; a picture must have been made before."""
        host, scheduler = self._host, self._pipe.scheduler
        with nullcontext() if who == "base" else self._fused(ALONE[who]):
            call = self._first_call(who)

            def denoise(clean: Tensor, noise: Tensor, tau: float) -> Tensor:
                step = round(tau * len(self._times))
                mixed = mixture(scheduler, step)
                shown = mixed.of(clean.float(), noise.float())
                return mixed.clean(shown, call_again(host, call, shown, self._times[step]))

            yield denoise

    def _first_call(self, who: Who) -> Call:
        return first_call(self._host, {**self._call, "prompt": self._prompts[who], "generator": self._generator()})

    def _generator(self) -> torch.Generator:
        # On the CPU whatever the device, so that a seed means the same noise everywhere.
        return torch.Generator("cpu").manual_seed(self._seed)

    def _fused(self, changed: Mapping[str, Any]) -> AbstractContextManager[Session | None]:
        settings: Any = {**self._settings.to_dict(), **changed}
        return fuse(self._pipe, *self._files, cache=self._cache, **settings)
