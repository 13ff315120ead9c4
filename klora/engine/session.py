"""One fusion at work on one model: the only object that holds hooks, and it takes all of them off again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType

from klora.engine.bypass import BypassLayer, Operand, Part, Site
from klora.engine.progress import SamplingPass
from klora.errors import MismatchError
from klora.fusion.plan import FusionPlan
from klora.fusion.policies.base import Weights
from klora.lora.deltas import Delta
from klora.lora.file import LoraFile, check_model
from klora.pair import Pair


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
    ) -> None:
        """Bind the pair's modules to `sites` and `text_sites` (by canonical name).

        Raises MismatchError where a file does not fit the model, LoraValueError for NaN or infinity.
        """
        self.pair = pair
        self.plan = plan
        self.tau: float | None = None
        self._depth = 0
        self.sampling: SamplingPass | None = None
        self._layers: dict[int, BypassLayer] = {}
        self._parts: dict[str, Part] = {}
        shapes = {name: site.shape for name, site in sites.items()}
        for file in (pair.subject, pair.style):
            check_model(file, shapes, model)
        self._bind(sites, pair.subject.modules, pair.style.modules, self._parts)
        self._bind_text(text_sites or {})
        self.set_tau(0.0)

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules of either file that the model does not have."""
        files = (self.pair.subject, self.pair.style)
        return tuple(dict.fromkeys(name for file in files for name in file.modules if name not in self._parts))

    def attach(self) -> None:
        """Put the hooks on."""
        for layer in self._layers.values():
            layer.attach()

    def detach(self) -> None:
        """Take every hook off."""
        for layer in self._layers.values():
            layer.detach()

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

    def at_level(self, level: float) -> None:
        """Make what the plan decides for this noise level active; needs `start_pass` first."""
        if self.sampling is None:
            raise RuntimeError("at_level before start_pass")
        self.set_tau(self.sampling.tau(level))

    def set_tau(self, tau: float) -> None:
        """Make what the plan decides for position `tau` active."""
        if tau == self.tau:
            return
        self.tau = tau
        for name, part in self._parts.items():
            part.set(self._strengths(self.plan.decide(name, tau)))

    def _strengths(self, weights: Weights) -> tuple[float, float]:
        settings = self.plan.settings
        return weights.subject * settings.subject_strength, weights.style * settings.style_strength

    def _bind(
        self,
        sites: Mapping[str, Site],
        subject: Mapping[str, Delta],
        style: Mapping[str, Delta],
        parts: dict[str, Part],
    ) -> None:
        for name, site in sites.items():
            operands = (_operand(subject.get(name), site), _operand(style.get(name), site))
            if operands == (None, None):
                continue
            parts[name] = Part(operands)
            layer = self._layers.setdefault(id(site.module), BypassLayer(site.module))
            layer.parts.append(parts[name])

    def _bind_text(self, sites: Mapping[str, Site]) -> None:
        subject, style = self.pair.subject.text_encoder, self.pair.style.text_encoder
        weights = self.pair.text_encoder_weights(self.plan.settings)
        for file in (self.pair.subject, self.pair.style):
            _check_text_encoder(file, sites)
        parts: dict[str, Part] = {}
        self._bind({name: site for name, site in sites.items() if any(weights.get(name, ()))}, subject, style, parts)
        for name, part in parts.items():
            part.set(self._strengths(weights[name]))


def _operand(delta: Delta | None, site: Site) -> Operand | None:
    return None if delta is None else Operand(delta, site)


def _check_text_encoder(file: LoraFile, sites: Mapping[str, Site]) -> None:
    for name, delta in file.text_encoder.items():
        if name in sites and sites[name].shape != delta.shape:
            raise MismatchError(
                f"{file.path}: {delta.key}: its shape {delta.shape} does not fit the text encoder's"
                f" {sites[name].shape}; use a LoRA made for this model"
            )
