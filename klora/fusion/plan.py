"""The plan of a fusion: for every module and every τ, which LoRA acts.

Made once from the scores of both files; nothing is measured while sampling (K-LoRA, Eq. 1–10).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from klora.fusion.policies import make_policy
from klora.fusion.policies.base import BOTH, NEITHER, STYLE, SUBJECT, Active, Forward, Moment, Policy, ScaledPolicy
from klora.fusion.scale import Scale, switch_steps
from klora.fusion.scores import ModuleScore
from klora.fusion.windows import Windows
from klora.settings import Settings

ROLES = {"both": BOTH, "subject": SUBJECT, "style": STYLE, "none": NEITHER}


@dataclass(frozen=True)
class FileModule:
    """One diffusion-model module of either file, before anything is decided.

    `subject_name` and `style_name` are the key prefixes in the files, None where a file lacks the module;
    `in_scope` tells whether the module follows the policy if both files have it. `weights` multiply what acts of each;
    where one is 0, the module is the other's.
    """

    name: str
    slice: str | None
    in_scope: bool
    subject_name: str | None = None
    style_name: str | None = None
    subject: ModuleScore | None = None
    style: ModuleScore | None = None
    weights: Active = BOTH


@dataclass(frozen=True)
class SharedModule:
    """One module that both files touch, with its scores; `k` is how many of the largest entries are compared."""

    subject: ModuleScore
    style: ModuleScore
    k: int


@dataclass(frozen=True)
class PlanModule:
    """One module of the plan.

    A module with a `rho` follows the policy; in any other `fixed` is active, as far as the policy has it act.
    `contested`: both files have it and it is in scope. `rho` is inf where S_s = 0 < S_c. `weights`: of each side in
    this block.
    """

    name: str
    slice: str | None
    subject_name: str | None
    style_name: str | None
    contested: bool
    k: int | None = None
    subject_sum: float | None = None
    style_sum: float | None = None
    rho: float | None = None
    fixed: Active = NEITHER
    weights: Active = BOTH

    @property
    def present(self) -> Active:
        """The sides that have the module, with their weights."""
        subject, style = self.subject_name is not None, self.style_name is not None
        return self.weights.times(Active(float(subject), float(style)))


@dataclass(frozen=True)
class FusionPlan:
    """What acts where and when.

    `settings` are resolved; `steps` is the N of the reports (τ = i/N); `balance` is the b in force, found from the
    share target if there is one; `gamma` is None where it is undefined. `record` holds the selections of modules that
    were decided while sampling, once they are known. `made`: the steps of the schedule that a pass makes (img2img
    begins late, an interrupt ends early), None for all; the share is theirs.
    """

    settings: Settings
    modules: tuple[PlanModule, ...]
    gamma: float | None
    steps: int
    warnings: tuple[str, ...] = ()
    record: Mapping[str, str] | None = None
    made: range | None = None

    @cached_property
    def policy(self) -> Policy:
        """The rule in force."""
        return make_policy(self.settings)

    @cached_property
    def windows(self) -> Windows:
        """When each side may act."""
        return Windows.of(self.settings)

    @cached_property
    def balance(self) -> float:
        """The balance b in force."""
        if self.settings.share is None or not isinstance(self.policy, ScaledPolicy):
            return self.settings.balance
        compared = [self.policy.compared(m.rho) for m in self.contested if m.rho is not None]
        states = [self.windows.open_at(i / self.steps) for i in range(self.steps)]
        scales = [self.policy.scale(i / self.steps) for i, both in enumerate(states) if all(both)]
        # Where a window is closed nothing is compared: what the subject has there counts towards its share.
        given = sum(subject and not style for subject, style in states)
        wished = (self.settings.share * self.steps - given) / len(scales) if scales else 0.0
        return balance_for_share(compared, scales, min(1.0, max(0.0, wished)))

    @cached_property
    def by_name(self) -> dict[str, PlanModule]:
        """The modules by canonical name."""
        return {module.name: module for module in self.modules}

    @cached_property
    def contested(self) -> tuple[PlanModule, ...]:
        """The modules that both files have and that are in scope."""
        return tuple(module for module in self.modules if module.contested)

    @property
    def of_one_step(self) -> str | None:
        """What to know of a single step (Turbo), where the policy looks at its scale: once, where it begins."""
        if self.steps > 1 or not isinstance(self.policy, ScaledPolicy) or self.share is None:
            return None
        return (
            f"with one step the scale {self.settings.scale} is looked at once, where it begins: the subject has"
            f" {self.share:.0%} of all choices; for another mix set the share or the balance, or take more steps"
        )

    @property
    def notices(self) -> tuple[str, ...]:
        """The warnings, and what there is to know of this number of steps."""
        return (*self.warnings, *filter(None, (self.of_one_step,)))

    @property
    def undecided(self) -> bool:
        """Whether contested modules are decided while sampling, and nothing of it is known yet."""
        return self.policy.measured and not self.record

    @property
    def chooses(self) -> bool:
        """Whether a contested module ever has one LoRA without the other, so that a share means something."""
        return any({"c", "s"} & set(self.selections[module.name]) for module in self.contested)

    def with_steps(self, steps: int) -> FusionPlan:
        """The same plan for a schedule of `steps` steps."""
        return self if steps == self.steps else dataclasses.replace(self, steps=steps, record=None, made=None)

    def decide(self, name: str, tau: float) -> Active:
        """Say what acts on module `name` at position `tau` of the schedule; KeyError for a module of neither file."""
        return self._decide(self.by_name[name], tau)

    def alone(self, tau: float) -> bool:
        """Whether the window of one side is closed at position `tau`, so that the other acts as if it were alone."""
        return not all(self.windows.open_at(tau))

    def predictions(self, tau: float) -> tuple[Forward, ...]:
        """The forwards whose weighted mean is the prediction at position `tau`; empty where one as decided does."""
        return () if self.alone(tau) else self.policy.predictions(Moment(tau, self.steps, self.balance))

    def _decide(self, module: PlanModule, tau: float) -> Active:
        subject, style = self.windows.open_at(tau)
        if not (subject and style):
            return module.present.times(Active(float(subject), float(style)))
        moment = Moment(tau, self.steps, self.balance)
        if module.rho is None:
            active = self.policy.decide_other(module.name, module.fixed, moment)
        else:
            active = self.policy.decide(module.name, module.rho, moment)
        # What a merge has made of both holds their weights.
        return active if module.contested and self.policy.folds_strengths else active.times(module.weights)

    def selection(self, name: str) -> str:
        """Write one letter per step i at τ = i/N: c subject, s style, b both, - neither."""
        if self.record and name in self.record:
            return self.record[name]
        module = self.by_name[name]
        if module.rho is not None and isinstance(self.policy, ScaledPolicy) and self.windows.always:
            return self._selection_by_switches(module, self.policy.scale)
        return "".join(self._decide(module, i / self.steps).letter for i in range(self.steps))

    def _selection_by_switches(self, module: PlanModule, scale: Scale) -> str:
        """The same from the few steps at which the module switches, found without looking at every step."""
        switches = switch_steps(lambda tau: bool(self._decide(module, tau).subject), scale, self.steps)
        starts = (0, *switches, self.steps)
        return "".join(
            self._decide(module, start / self.steps).letter * (stop - start)
            for start, stop in itertools.pairwise(starts)
        )

    @cached_property
    def selections(self) -> dict[str, str]:
        """The selection of every module, by name."""
        return {module.name: self.selection(module.name) for module in self.modules}

    def subject_share(self) -> list[float | None]:
        """Per step, the fraction of contested modules where the subject acts.

        None where none is contested, and where that is only decided while sampling.
        """
        letters = [self.selections[module.name] for module in self.contested]
        if not letters or self.undecided:
            return [None] * self.steps
        return [sum(row[i] == "c" for row in letters) / len(letters) for i in range(self.steps)]

    @cached_property
    def share(self) -> float | None:
        """The fraction of (contested module, step) decisions that go to the subject, over the steps made."""
        shares = self.subject_share()
        per_step = [share for i in self.made or range(self.steps) if (share := shares[i]) is not None]
        return math.fsum(per_step) / len(per_step) if per_step else None


def wanted_k(settings: Settings, subject_rank: int, style_rank: int, shape: Sequence[int]) -> int:
    """K = r_c·r_s (paper, Eq. 5) or the fixed K asked for, at most the number of entries of ΔW."""
    return min(settings.k or subject_rank * style_rank, math.prod(shape))


def make_plan(modules: Iterable[FileModule], settings: Settings) -> FusionPlan:
    """Decide the role of every module and compare the contested ones with each other.

    `settings` are resolved; the modules' scores hold the top-K sums that `wanted_k` asks for.
    """
    policy = make_policy(settings)
    modules = list(modules)
    shared = {module.name: found for module in modules if (found := _shared(module, settings))}
    gamma = policy.gamma([m.subject.l1 for m in shared.values()], [m.style.l1 for m in shared.values()])
    planned = tuple(_plan_module(module, shared.get(module.name), policy, gamma, settings) for module in modules)
    subject = [module.name for module in modules if module.subject_name is not None]
    style = [module.name for module in modules if module.style_name is not None]
    warnings = (*_warnings(shared, gamma), *policy.notices(subject, style))
    return FusionPlan(settings, planned, gamma, settings.steps, warnings)


def _shared(module: FileModule, settings: Settings) -> SharedModule | None:
    subject, style = module.subject, module.style
    if not module.in_scope or subject is None or style is None or not all(module.weights):
        return None
    return SharedModule(subject, style, wanted_k(settings, subject.rank, style.rank, subject.shape))


def _plan_module(
    module: FileModule, shared: SharedModule | None, policy: Policy, gamma: float | None, settings: Settings
) -> PlanModule:
    planned = PlanModule(
        module.name,
        module.slice,
        module.subject_name,
        module.style_name,
        contested=shared is not None,
        weights=module.weights,
    )
    if shared is None:
        return dataclasses.replace(planned, fixed=_uncontested(module, settings))
    s_c, s_s = policy.importance(shared.subject, shared.k), policy.importance(shared.style, shared.k)
    planned = dataclasses.replace(planned, k=shared.k, subject_sum=s_c, style_sum=s_s)
    if not s_c and not s_s:
        return planned
    if gamma is None:
        return dataclasses.replace(planned, fixed=SUBJECT if s_c else STYLE)
    return dataclasses.replace(planned, rho=s_c / (gamma * s_s) if s_s else math.inf)


def _uncontested(module: FileModule, settings: Settings) -> Active:
    if module.subject_name is not None and module.style_name is not None:
        if not all(module.weights):
            return BOTH
        return ROLES[settings.other_layers]
    if settings.unpaired == "drop":
        return NEITHER
    return SUBJECT if module.subject_name is not None else STYLE


def _warnings(shared: Mapping[str, SharedModule], gamma: float | None) -> Iterable[str]:
    if not shared:
        yield "no module of the scope is in both files, so nothing is selected: each acts in modules that it alone has"
    elif gamma is None:
        zero = [
            side
            for side, l1 in (
                ("subject", math.fsum(module.subject.l1 for module in shared.values())),
                ("style", math.fsum(module.style.l1 for module in shared.values())),
            )
            if not l1
        ]
        if zero:
            which = "both LoRAs are" if len(zero) > 1 else f"the {zero[0]} LoRA is"
            yield f"{which} zero on every contested module, so γ is undefined"
        else:
            yield (
                "the subject LoRA is zero on most contested modules, and the trimmed mean leaves out the others, so γ"
                " is undefined and the subject acts wherever it is not zero; give γ, or use the paper variant"
            )


def balance_for_share(compared: Sequence[float], scales: Sequence[float], share: float) -> float:
    """Find the b at which the subject takes the reachable fraction nearest to `share`.

    The subject wins where ρ_l / scale(i/N) ≥ 2^b, so 2^b is a quantile of these ratios; a value between two
    neighbouring ratios is taken, which ≥ and > tell apart alike.
    """
    ascending = sorted(_log_ratio(rho, scale) for rho in compared for scale in scales)
    finite = [log for log, _ in itertools.groupby(reversed(ascending)) if math.isfinite(log)]
    if not finite:
        return 0.0
    # To choose from: above the largest ratio, between neighbours, below the smallest.
    edges = [finite[0] + 1, *((a + b) / 2 for a, b in itertools.pairwise(finite)), finite[-1] - 1]

    def reached(b: float) -> float:
        return (len(ascending) - bisect.bisect_left(ascending, b)) / len(ascending)

    # With each edge more is reached than with the one before.
    enough = bisect.bisect_left(edges, share, key=reached)
    return min(edges[max(0, enough - 1) : enough + 1], key=lambda b: (abs(reached(b) - share), abs(b)))


def _log_ratio(rho: float, scale: float) -> float:
    """log₂ of ρ / scale, −∞ for a ratio of 0."""
    ratio = rho / scale if scale else math.inf
    return math.log2(ratio) if 0 < ratio < math.inf else math.copysign(math.inf, ratio - 1)
