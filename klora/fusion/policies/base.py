"""What a policy is: the rule that says which LoRA acts on a module at a moment of sampling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from klora.fusion.schedule import Schedule, subject_wins
from klora.settings import Settings

if TYPE_CHECKING:
    # The names of the policies are needed where torch need not be imported: in the command line's help, for one.
    from klora.fusion.scores import ModuleScore
    from klora.lora.deltas import Delta

DIFFUSERS, WEBUI = "diffusers", "webui"
"""The kinds of host; A1111 and the Forge family are WebUIs."""


class Weights(NamedTuple):
    """How much of each LoRA's ΔW acts, before the user's strengths."""

    subject: float
    style: float

    @property
    def letter(self) -> str:
        """One letter for reports: c subject, s style, b both, - neither."""
        return "-csb"[bool(self.subject) + 2 * bool(self.style)]

    def times(self, other: Weights) -> Weights:
        """Weigh each LoRA by what `other` says of it too."""
        return Weights(self.subject * other.subject, self.style * other.style)


SUBJECT = Weights(1.0, 0.0)
STYLE = Weights(0.0, 1.0)
BOTH = Weights(1.0, 1.0)
NEITHER = Weights(0.0, 0.0)


@dataclass(frozen=True)
class Contest:
    """The numbers about one module that both files touch; `k` is how many of the largest entries are compared."""

    name: str
    subject: ModuleScore
    style: ModuleScore
    k: int


@dataclass(frozen=True)
class Moment:
    """A point of sampling: position τ in a schedule of `steps` steps, and the balance in force."""

    tau: float
    steps: int
    balance: float

    @property
    def step(self) -> int:
        """The step under way, floor(τ·N); i/N times N can fall just short of i in floating point."""
        return math.floor(self.tau * self.steps + 1e-9)


class Forward(NamedTuple):
    """One forward of the denoiser: the LoRAs that act in it, its weight in the mean, the steps it may be reused for."""

    acting: Weights
    weight: float
    reuse: int = 1


class Policy:
    """K-LoRA's frame: a ratio ρ per module, constant while sampling, is compared with a scale of τ.

    A subclass overrides what differs. `balanced` tells whether balance and share target have a meaning, `hosts` on
    which kinds of host the policy runs, `forwards` how many forwards of the denoiser one evaluation takes at most.
    `measured`: the engine decides contested modules by their outputs, among the LoRAs that `weights` gives.
    `folds_strengths`: what `combine` gives has the user's strengths in it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    balanced: ClassVar[bool] = True
    hosts: ClassVar[frozenset[str]] = frozenset({DIFFUSERS, WEBUI})
    forwards: ClassVar[int] = 1
    measured: ClassVar[bool] = False
    folds_strengths: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.strict = settings.variant == "official"
        self.schedule = self.make_schedule(settings)

    def make_schedule(self, settings: Settings) -> Schedule:
        """Give the scale that ρ is compared with; `settings` are resolved."""
        if settings.alpha is None or settings.beta is None:
            raise ValueError("settings must be resolved before a policy is made of them")
        return Schedule(settings.scale, settings.alpha, settings.beta)

    def measure(self, score: ModuleScore, k: int) -> float:
        """Give the importance of one LoRA in one module: the sum of its K largest entries (paper, Eq. 1–4)."""
        value = score.top_k(k)
        if value is None:
            raise KeyError(f"no top-{k} sum is stored")
        return value

    def gamma(self, contests: Sequence[Contest]) -> float | None:
        """Give the factor that makes both LoRAs comparable; None where one side is zero everywhere."""
        raise NotImplementedError

    def standing(self, rho: float) -> float:
        """Give what is compared with the scale, for a module whose ratio is ρ."""
        return rho

    def weights(self, module: str, rho: float, moment: Moment) -> Weights:
        """Decide for one contested module at one moment."""
        scale = self.schedule(moment.tau)
        return SUBJECT if subject_wins(self.standing(rho), scale, moment.balance, self.strict) else STYLE

    def outside(self, module: str, allowed: Weights, moment: Moment) -> Weights:
        """Decide for a module that is not weighed against its twin, where the settings have `allowed` act."""
        return allowed

    def notices(self, subject: Sequence[str], style: Sequence[str]) -> Iterable[str]:
        """Say what a user should know, given the modules of each file."""
        return ()

    def check_model(self, modules: Iterable[str]) -> None:
        """Raise SettingsError where the policy can do nothing with those of the files' modules that a model has."""

    def combine(self, subject: Delta, style: Delta) -> tuple[Delta | None, Delta | None]:
        """Give what acts in place of a contested module's two deltas; MismatchError for a family that will not do."""
        return subject, style

    def predictions(self, moment: Moment) -> tuple[Forward, ...]:
        """List the forwards whose weighted mean is the model's prediction; empty where one forward as decided does."""
        return ()
