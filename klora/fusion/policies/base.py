"""What a policy is: the rule that says which LoRA acts on a module at a moment of sampling."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from klora.fusion.gamma import given_gamma, global_gamma, trimmed_gamma
from klora.fusion.scale import Scale, subject_wins
from klora.settings import Settings

if TYPE_CHECKING:
    # The names of the policies are needed where torch need not be imported: in the command line's help, for one.
    from klora.fusion.scores import ModuleScore
    from klora.lora.deltas import Delta


class Active(NamedTuple):
    """Which LoRA is active: how much of each one's ΔW acts, before the user's strengths."""

    subject: float
    style: float

    @property
    def letter(self) -> str:
        """One letter for reports: c subject, s style, b both, - neither."""
        return "-csb"[bool(self.subject) + 2 * bool(self.style)]

    def times(self, other: Active) -> Active:
        """Weigh each LoRA by what `other` says of it too."""
        return Active(self.subject * other.subject, self.style * other.style)


SUBJECT = Active(1.0, 0.0)
STYLE = Active(0.0, 1.0)
BOTH = Active(1.0, 1.0)
NEITHER = Active(0.0, 0.0)


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
    """One forward of the denoiser: the LoRAs active in it, its weight in the mean, the steps it may be reused for."""

    active: Active
    weight: float
    reuse: int = 1


class Policy(ABC):
    """The rule of a fusion; a subclass says with `decide` what is active in a contested module.

    `forwards`: how many forwards of the denoiser one evaluation takes at most. `static`: what is active is so at every
    step. `measured`: the engine decides contested modules by their outputs, among the LoRAs that `decide` gives.
    `takes_references`: latents are moved towards references. `folds_strengths`: what `combine` gives has the user's
    strengths in it. `own_settings`: settings that only this policy and others that name them heed. `defaults`: what
    "auto" means for a setting where it is not what it usually means.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    forwards: ClassVar[int] = 1
    static: ClassVar[bool] = False
    measured: ClassVar[bool] = False
    takes_references: ClassVar[bool] = False
    folds_strengths: ClassVar[bool] = False
    own_settings: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, settings: Settings) -> None:
        """Take resolved settings."""
        self.settings = settings

    @abstractmethod
    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        """Say what is active in a contested module, whose ratio is ρ, at one moment."""

    def decide_other(self, module: str, allowed: Active, moment: Moment) -> Active:
        """Say what is active in a module that is not compared with its twin, where the settings allow `allowed`."""
        return allowed

    def importance(self, score: ModuleScore, k: int) -> float:
        """S: the sum of the K largest entries of one LoRA in one module (K-LoRA, Eq. 1-4)."""
        value = score.top_k(k)
        if value is None:
            raise KeyError(f"no top-{k} sum is stored")
        return value

    def gamma(self, subject: Sequence[float], style: Sequence[float]) -> float | None:
        """γ (K-LoRA, Eq. 9), given or of the contested modules' L1 sums; None where one side is zero everywhere."""
        if self.settings.gamma is not None:
            return given_gamma(self.settings.gamma, subject, style)
        return (trimmed_gamma if self.settings.variant == "official" else global_gamma)(subject, style)

    def notices(self, subject: Sequence[str], style: Sequence[str]) -> Iterable[str]:
        """What a user should know, given the names of the modules of each file."""
        return ()

    def check_model(self, modules: Iterable[str]) -> None:  # noqa: B027
        """Raise SettingsError where the policy can do nothing with those of the files' modules that a model has."""

    def combine(
        self, module: str, subject: Delta, style: Delta, weights: Active = BOTH
    ) -> tuple[Delta | None, Delta | None]:
        """What acts in place of a contested module's two deltas; MismatchError for a family that will not do.

        `weights` are what multiplies both in its block; only where strengths are folded in do they count here.
        """
        return subject, style

    def predictions(self, moment: Moment) -> tuple[Forward, ...]:
        """The forwards whose weighted mean is the model's prediction; empty where one forward as decided does."""
        return ()


class ScaledPolicy(Policy):
    """A policy of K-LoRA's form: a ratio ρ per module, constant while sampling, is compared with a scale of τ.

    Balance and share target have a meaning for these alone.
    """

    def __init__(self, settings: Settings) -> None:
        """Take resolved settings; ValueError where α or β is open."""
        super().__init__(settings)
        self.strict = settings.variant == "official"
        self.scale = self.make_scale(settings)

    def make_scale(self, settings: Settings) -> Scale:
        """The scale that ρ is compared with."""
        if settings.alpha is None or settings.beta is None:
            raise ValueError("settings must be resolved before a policy is made of them")
        return Scale(settings.scale, settings.alpha, settings.beta)

    def compared(self, rho: float) -> float:
        """The number that is compared with the scale, for a module whose ratio is ρ."""
        return rho

    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        scale = self.scale(moment.tau)
        return SUBJECT if subject_wins(self.compared(rho), scale, moment.balance, self.strict) else STYLE
