"""One fusion at work on one model: the only object that holds hooks, and it takes all of them off again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from klora.engine.bypass import BypassLayer, Operand, Part, Site
from klora.engine.dynamic import Chooser, MeasuredPart, Rows
from klora.engine.joined import SharedInput, shared_inputs
from klora.engine.parameters import HeldParameters
from klora.engine.progress import SamplingPass
from klora.engine.weights import KEPT, Room
from klora.errors import MismatchError
from klora.fusion.plan import ROLES, FusionPlan
from klora.fusion.policies.base import BOTH, Active, Moment
from klora.lora.checks import check_model
from klora.lora.deltas import Delta
from klora.lora.file import LoraFile
from klora.pair import Pair

ConditionalRows = Callable[[tuple[Any, ...], dict[str, Any]], "Rows | None"]
"""From the arguments of a denoiser's forward to the rows of its batch that follow the prompt; None for all."""


class Session:
    """Attach a pair to the modules of a model, follow the noise level, detach.

    `attach` and `detach` may be called any number of times, and a `with` block may be entered again inside itself;
    leaving the outermost one detaches, whatever ended it.
    """

    def __init__(
        self,
        pair: Pair,
        plan: FusionPlan,
        sites: Mapping[str, Site],
        text_sites: Mapping[str, Site] | None = None,
        model: str = "the model",
        denoiser: nn.Module | None = None,
        conditional: ConditionalRows | None = None,
    ) -> None:
        """Bind the pair's modules to `sites` and `text_sites` (by canonical name).

        A policy that measures looks at the rows that `conditional` gives of the batch of `denoiser`, at all of them
        where these are left out. Raises MismatchError where a file does not fit the model, LoraValueError for NaN or
        infinity, SettingsError where the policy can do nothing with this model.
        """
        self.pair = pair
        self.plan = plan
        self.tau: float | None = None
        self._depth = 0
        self.sampling: SamplingPass | None = None
        self._layers: dict[int, BypassLayer] = {}
        self._parts: dict[str, Part] = {}
        self._folded: set[str] = set()
        self._shared: list[SharedInput] = []
        self._room = Room()
        self._chooser = Chooser.of(plan.settings) if plan.policy.measured else None
        self._denoiser = denoiser if self._chooser and conditional else None
        self._conditional = conditional
        self._watch: RemovableHandle | None = None
        shapes = {name: site.shape for name, site in sites.items()}
        for lora in pair.loras:
            check_model(lora, shapes, model)
        for side in (pair.subject, pair.style):
            side.check_finite()
        self._weights = KEPT.of(pair)
        self._combined = self._weights.combined(plan.settings)
        self._bind(sites, self._deltas, self._parts)
        plan.policy.check_model(self._parts)
        self._join()
        self._bind_text(text_sites or {})
        self._sites, self._text_sites = sites.keys(), (text_sites or {}).keys()
        self._parameters = HeldParameters()
        self._hold_parameters(sites, text_sites or {}, denoiser)
        self.set_tau(0.0)

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules of either file that the model does not have."""
        files = (self.pair.subject, self.pair.style)
        return tuple(dict.fromkeys(name for file in files for name in file.modules if name not in self._parts))

    @property
    def left_out(self) -> list[str]:
        """What of each file found no place in the model, one line a file."""
        return [text for lora in self.pair.loras if (text := self._left_out(lora))]

    def _left_out(self, lora: LoraFile) -> str:
        modules = [name for name in lora.modules if name not in self._sites]
        # Where none is known, the host's own LoRA code applies them, or there is no text encoder to encode with.
        text = [name for name in lora.text_encoder if self._text_sites and name not in self._text_sites]
        known = self.pair.model.parameters if self.pair.model else {}
        others = [delta.key for path, delta in lora.parameters.items() if path not in known]
        biases = [name for name in self._parameters.absent if (delta := lora.modules.get(name)) and delta.bias]
        count = len(lora.modules) + len(lora.text_encoder)
        absent = [*modules, *text]
        told = [f"{len(absent)} of its {count} modules (such as {absent[0]})"] if absent else []
        told += [f"{len(others)} changes of other parameters (such as {others[0]})"] if others else []
        told += [f"{len(biases)} biases (such as that of {biases[0]})"] if biases else []
        return f"{lora.label}: {', '.join(told)} found no place in the model and do nothing" if told else ""

    @property
    def decisions(self) -> dict[str, list[tuple[float, str]]]:
        """What was decided while sampling: per measured module (τ, letter), in order; empty for other policies."""
        return self._chooser.decisions if self._chooser else {}

    @property
    def observed(self) -> FusionPlan:
        """The plan with what was decided while sampling in the place of what could not be planned."""
        if not self.decisions:
            return self.plan
        record = {name: selection_of(found, self.plan.steps) for name, found in self.decisions.items()}
        return dataclasses.replace(self.plan, record=record)

    @property
    def moment(self) -> Moment:
        """The point of sampling that was told last."""
        return Moment(self.tau or 0.0, self.plan.steps, self.plan.balance)

    def attach(self) -> None:
        """Put the hooks on."""
        if self._denoiser is not None and self._watch is None:
            self._watch = self._denoiser.register_forward_pre_hook(self._look_at, with_kwargs=True)
        for layer in self._layers.values():
            layer.attach()
        self._parameters.attach()

    def detach(self) -> None:
        """Take every hook off."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self._parameters.detach()
        for layer in self._layers.values():
            layer.detach()
        for shared in self._shared:
            shared.forget()

    def __enter__(self) -> Session:
        self._depth += 1
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self.detach()

    def start_pass(self, levels: Iterable[float]) -> None:
        """Begin a sampling pass whose full schedule is `levels` (noise levels, repeats allowed)."""
        self.follow(SamplingPass(levels, relative=self.plan.settings.progress == "relative"))

    def follow(self, sampling: SamplingPass) -> None:
        """Go on in a pass that may have begun in another session (a refiner has taken over)."""
        self.sampling = sampling
        self.plan = self.plan.with_steps(sampling.progress.steps)
        self.tau = None
        if self._chooser:
            self._chooser.begin()

    def at_level(self, level: float) -> None:
        """Make what the plan decides for this noise level active; needs `start_pass` first."""
        if self.sampling is None:
            raise RuntimeError("at_level before start_pass")
        self.set_tau(self.sampling.tau(level))

    def set_tau(self, tau: float) -> None:
        """Make what the plan decides for position `tau` active."""
        if tau != self.tau:
            self.tau = tau
            if self._chooser:
                self._chooser.at(tau, self.moment.step)
            self.set_active(BOTH)

    def set_active(self, among: Active) -> None:
        """Make what the plan decides for the position told last active, as far as it is `among` these LoRAs."""
        if self.tau is None:
            raise RuntimeError("set_active before set_tau")
        for name, part in self._parts.items():
            active = self.plan.decide(name, self.tau).times(among)
            part.set(active if name in self._folded else self._strengths(active))
            # What a policy makes of two weights has no biases: then both act.
            self._parameters.set(name, self._strengths(among if name in self._combined else active))

    def _strengths(self, active: Active) -> tuple[float, float]:
        settings = self.plan.settings
        return active.subject * settings.subject_strength, active.style * settings.style_strength

    def _look_at(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._chooser and self._conditional:
            self._chooser.rows = self._conditional(args, kwargs)

    def _deltas(self, name: str) -> tuple[Delta | None, Delta | None]:
        """What acts in a module of the diffusion model for each LoRA."""
        subject, style = self.pair.subject.modules.get(name), self.pair.style.modules.get(name)
        if subject is None or style is None or not self.plan.by_name[name].contested:
            return subject, style
        if self.plan.policy.folds_strengths:
            self._folded.add(name)
        if name not in self._combined:
            self._combined[name] = self.plan.policy.combine(name, subject, style)
        return self._combined[name]

    def _part(self, name: str, operands: tuple[Operand | None, Operand | None]) -> Part:
        subject, style = operands
        module = self.plan.by_name.get(name)
        if self._chooser and subject and style and module and module.rho is not None:
            return MeasuredPart(operands, chooser=self._chooser, name=name)
        return Part(operands)

    def _operand(self, delta: Delta | None, site: Site) -> Operand | None:
        return None if delta is None else Operand(delta, site, self._weights.of(delta), self._room)

    def _bind(
        self,
        sites: Mapping[str, Site],
        deltas: Callable[[str], tuple[Delta | None, Delta | None]],
        parts: dict[str, Part],
    ) -> None:
        for name, site in sites.items():
            subject, style = deltas(name)
            if subject is None and style is None:
                continue
            parts[name] = self._part(name, (self._operand(subject, site), self._operand(style, site)))
            layer = self._layers.setdefault(id(site.module), BypassLayer(site.module))
            layer.parts.append(parts[name])

    def _join(self) -> None:
        """Have operands of one LoRA share their input where their modules do, unless it is not known which will act."""
        for names in shared_inputs(tuple(self._parts)) if self._chooser is None else ():
            for side in (0, 1):
                found = [operand for name in names if (operand := self._parts[name].operands[side])]
                operands = [operand for operand in found if operand.weights.joinable and not operand.is_conv]
                if len({operand.delta.columns for operand in operands}) == 1 and len(operands) > 1:
                    shared = SharedInput(self._weights.joined(tuple(operand.delta for operand in operands)))
                    for place, operand in enumerate(operands):
                        operand.share(shared, place)
                    self._shared.append(shared)

    def _hold_parameters(
        self, sites: Mapping[str, Site], text_sites: Mapping[str, Site], model: nn.Module | None
    ) -> None:
        """Take what the files change beside weights; what they change there of both files is a sum all the time."""
        subject, style = self.pair.subject, self.pair.style
        names = {**subject.modules, **style.modules, **subject.text_encoder, **style.text_encoder}
        deltas = {
            name: (
                subject.modules.get(name) or subject.text_encoder.get(name),
                style.modules.get(name) or style.text_encoder.get(name),
            )
            for name in names
        }
        self._parameters.add_biases({**text_sites, **sites}, deltas)
        for name, active in self.pair.text_encoder_active(self.plan.settings).items():
            self._parameters.set(name, self._strengths(active))
        known = self.pair.model.parameters if self.pair.model else {}
        paths = [path for path in {**subject.parameters, **style.parameters} if path in known]
        if model is not None and paths:
            pairs = {path: (subject.parameters.get(path, ()), style.parameters.get(path, ())) for path in paths}
            role = ROLES[self.plan.settings.other_layers]
            self._parameters.add(model, pairs, lambda *both: self._strengths(role if all(both) else BOTH))

    def _bind_text(self, sites: Mapping[str, Site]) -> None:
        subject, style = self.pair.subject.text_encoder, self.pair.style.text_encoder
        active = self.pair.text_encoder_active(self.plan.settings)
        for lora in self.pair.loras:
            _check_text_encoder(lora, sites)
        parts: dict[str, Part] = {}
        used = {name: site for name, site in sites.items() if any(active.get(name, ()))}
        self._bind(used, lambda name: (subject.get(name), style.get(name)), parts)
        for name, part in parts.items():
            part.set(self._strengths(active[name]))


def _check_text_encoder(file: LoraFile, sites: Mapping[str, Site]) -> None:
    for name, delta in file.text_encoder.items():
        if name in sites and sites[name].shape != delta.shape:
            raise MismatchError(
                f"{file.where}: {delta.key}: its shape {delta.shape} does not fit the text encoder's"
                f" {sites[name].shape}; use a LoRA made for this model"
            )


def selection_of(decisions: Iterable[tuple[float, str]], steps: int) -> str:
    """Write decisions (τ, letter) as one letter per step: the last one at or before it, at first the first one."""
    letters = ""
    for tau, letter in sorted(decisions):
        step = Moment(tau, steps, 0.0).step
        # Of calls at one step, the last decides; before the first call, what it found is taken to hold.
        letters = (letters[:step] + (letters[-1] if letters else letter) * (step - len(letters)) + letter)[:steps]
    return letters + letters[-1] * (steps - len(letters))
