"""One fusion at work on one model: the only object that holds hooks, and it takes all of them off again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from klora.engine.bypass import Biases, Part
from klora.engine.compiled import Calls
from klora.engine.dynamic import BatchRows, Chooser, MeasuredPart
from klora.engine.exchanges import Exchanges
from klora.engine.held import Held
from klora.engine.joined import SharedInput, shared_inputs
from klora.engine.layers import Layers, Say
from klora.engine.left_out import left_out, packed
from klora.engine.parameters import Models, Sum, held_parameters, unheld
from klora.engine.products import LinearProduct, Product, product_of
from klora.engine.progress import SamplingPass
from klora.engine.site import Site
from klora.engine.state import SessionState
from klora.engine.ways import AUTO, BYPASS
from klora.engine.weights import KEPT, Room, preparing
from klora.errors import KloraError
from klora.fusion.plan import ROLES, FusionPlan
from klora.fusion.policies.base import BOTH, NEITHER, Active, Moment
from klora.lora.checks import check_model, check_text_encoder
from klora.lora.deltas import Delta
from klora.pair import Pair

logger = logging.getLogger("klora")

ALONE_MARK = " (alone)"
"""Ends the name of a part in which a LoRA acts alone, where a policy makes something else of both."""
ConditionalRows = Callable[[tuple[Any, ...], dict[str, Any]], "BatchRows | None"]
"""From the arguments of a denoiser's forward to the rows of its batch that follow the prompt; None for all."""


class Session(SessionState):
    """Attach a pair to the modules of a model, follow the noise level, detach.

    What it tells a user of it is in `SessionState`; the rest is for the host that leads it.
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
        text_encoders: Mapping[str, nn.Module] | None = None,
        say: Say = logger.warning,
        sites_now: Callable[[], Mapping[str, Site]] | None = None,
    ) -> None:
        """Bind the pair's modules to `sites` and `text_sites` (by canonical name).

        The modules are those of `denoiser` and `text_encoders`, by the names that those of their sites begin with:
        where these are given, weights may be held and parts of them be compiled. A policy that measures looks at the
        rows that `conditional` gives of the batch of `denoiser`, at all of them where these are left out. `say` hears
        what a user should know. `sites_now` gives the sites as they have become, where the host can tell. Raises
        MismatchError where a file does not fit the model, LoraValueError for NaN or infinity, SettingsError where the
        policy can do nothing with this model.
        """
        self.pair = pair
        self.plan = plan
        self.tau = None
        self._depth = 0
        self.sampling: SamplingPass | None = None
        self._say = say
        self._exchanges = Exchanges(denoiser, sites_now)
        self.acted = True
        self._awaited = False
        """Whether the first evaluation of a pass is not over yet."""
        self._parts: dict[str, Part] = {}
        self._folded: set[str] = set()
        self._mixed: set[str] = set()
        self._apart: dict[str, Part] = {}
        self._shared: list[SharedInput] = []
        self._room = Room.on(_device_of(denoiser))
        self._chooser = Chooser.of(plan.settings) if plan.policy.measured else None
        self._conditional = conditional
        looks = denoiser is not None and self._chooser and conditional
        self._watch = Calls(denoiser, self._look_at) if denoiser is not None and looks else None
        models = {} if denoiser is None else {"": denoiser, **(text_encoders or {})}
        self.left_out = left_out(pair, sites, text_sites or {}, models)
        shapes = {name: site.shape for name, site in sites.items()}
        text_shapes = {name: site.shape for name, site in (text_sites or {}).items()}
        for lora in pair.loras:
            check_model(lora, shapes, model)
            check_text_encoder(lora, text_shapes)
        for side in (pair.subject, pair.style):
            side.check_finite()
        self._weights = KEPT.of(pair)
        self._combined = self._weights.combined(plan.settings)
        with preparing():
            self._parts = self._bind(sites, self._deltas, self._own_deltas)
            plan.policy.check_model(self._parts)
            if not plan.windows.always:
                made = {name: site for name, site in sites.items() if name in self._mixed}
                self._apart = self._bind(made, self._own_deltas)
            self._join()
            text = self._bind_text(text_sites or {})
            self._held = held = held_parameters(models, self._other_changes(models)) if models else {}
        self._models = models
        apart = {f"{name}{ALONE_MARK}": part for name, part in self._apart.items()}
        in_text = {path for path in held if path.partition(".")[0] in models}
        own = [one for path, one in held.items() if path not in in_text]
        self._layers = Layers({**self._parts, **apart}, denoiser, self._engine, self._room, say, own)
        others = [held[path] for path in in_text]
        self._text_layers = [*self._of_text_encoders(text, (text_encoders or {}).values(), say, others)]
        self.set_tau(0.0)

    @property
    def _engine(self) -> str:
        """How decisions are applied: what acts by turns within a step is not worth holding."""
        engine = self.plan.settings.engine
        return BYPASS if engine == AUTO and self.plan.policy.forwards > 1 else engine

    @property
    def moment(self) -> Moment:
        """The point of sampling that was told last."""
        return Moment(self.tau or 0.0, self.plan.steps, self.plan.balance)

    def attach(self) -> None:
        """Put everything on; nothing, where that fails half-way."""
        try:
            if self._watch is not None:
                self._watch.attach()
            for layers in (self._layers, *self._text_layers):
                layers.attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take everything off, once more from the beginning where that is interrupted."""
        try:
            self._take_off()
        except BaseException:
            self._take_off()
            raise

    def _take_off(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        for layers in (self._layers, *self._text_layers):
            layers.detach()
        for shared in self._shared:
            shared.forget()

    def __enter__(self) -> Session:
        before = self._depth
        try:
            self._depth = before + 1
            self.attach()
            return self
        except BaseException:
            self._depth = before
            if not before:
                self.detach()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._depth -= 1
            if not self._depth:
                self.detach()
                if error is None:
                    # A picture of one evaluation is over before another could tell.
                    self.evaluated()
        except BaseException:
            self._depth = 0
            self.detach()
            raise

    def start_pass(self, levels: Iterable[float], running: nn.Module | None = None) -> None:
        """Begin a sampling pass whose full schedule is `levels` (noise levels, repeats allowed).

        `running` is what is called, where torch.compile has made something else of the denoiser since.
        """
        self.follow(SamplingPass(levels, relative=self.plan.settings.progress == "relative"), running)

    def follow(self, sampling: SamplingPass, running: nn.Module | None = None) -> None:
        """Go on in a pass that may have begun in another session (a refiner has taken over)."""
        self.evaluated()
        self.sampling = sampling
        self.plan = self.plan.with_steps(sampling.progress.steps)
        self.tau = None
        self._let_go_of_moved()
        self._layers.expect(running)
        self._exchanges.look(self._layers.model, self._parts)
        if self.plan.of_one_step:
            self._say(self.plan.of_one_step)
        if self._chooser:
            self._chooser.begin()

    def at_level(self, level: float) -> None:
        """Make what the plan decides for this noise level active; needs `start_pass` first."""
        if self.sampling is None:
            raise RuntimeError("at_level before start_pass")
        tau = self.sampling.tau(level)
        if self.tau is None:
            self._awaited = True
        elif tau != self.tau:
            self.evaluated()
        self.set_tau(tau)

    def evaluated(self) -> None:
        """Look, once in each pass, at what its first evaluation has really called.

        What was not called is said. KloraError, with the cause, where nothing was.
        """
        if not self._awaited:
            return
        self._awaited = False
        uncalled = [name for name in self._layers.uncalled() if name in self._parts]
        if uncalled and len(uncalled) == len(self._parts):
            self.acted = False
            raise KloraError(
                f"none of the {len(self._parts)} modules of the LoRAs was called in the first evaluation, so that"
                f" nothing acted: {self._layers.cause()}"
            )
        if uncalled:
            self._exchanges.check(self._parts)
            self._say(
                f"{len(uncalled)} of the LoRAs' {len(self._parts)} modules, such as {uncalled[0]}, were not called in"
                " the first evaluation; they do nothing"
            )

    def set_tau(self, tau: float) -> None:
        """Make what the plan decides for position `tau` active."""
        if tau != self.tau:
            self.tau = tau
            if self._chooser:
                self._chooser.at(tau, self.moment.step, self.plan.alone(tau))
            self.set_active(BOTH)

    def set_active(self, among: Active) -> None:
        """Make what the plan decides for the position told last active, as far as it is `among` these LoRAs."""
        if self.tau is None:
            raise RuntimeError("set_active before set_tau")
        changed = []
        alone = self.plan.alone(self.tau)
        for name, part in self._parts.items():
            active = acting = self.plan.decide(name, self.tau).times(among)
            if name in self._apart:
                # What a policy has made of both is neither of them.
                if self._apart[name].set(self._strengths(active) if alone else NEITHER):
                    changed.append(f"{name}{ALONE_MARK}")
                acting = NEITHER if alone else active
            # What a policy makes of two weights has no biases: then both act.
            biases = part.set_biases(self._strengths(among if name in self._mixed and not alone else active))
            if part.set(acting if name in self._folded else self._strengths(acting)) or biases:
                changed.append(name)
        self._layers.changed(changed)

    def _strengths(self, active: Active) -> tuple[float, float]:
        settings = self.plan.settings
        return active.subject * settings.subject_strength, active.style * settings.style_strength

    def _look_at(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._chooser and self._conditional:
            self._chooser.rows = self._conditional(args, kwargs)

    def _deltas(self, name: str) -> tuple[Delta | None, Delta | None]:
        """What acts in a module of the diffusion model for each LoRA."""
        subject, style = self._own_deltas(name)
        if subject is None or style is None or not self.plan.by_name[name].contested:
            return subject, style
        if self.plan.policy.folds_strengths:
            self._folded.add(name)
        if name not in self._combined:
            self._combined[name] = self.plan.policy.combine(name, subject, style, self.plan.by_name[name].weights)
        if self._combined[name] != (subject, style):
            self._mixed.add(name)
        return self._combined[name]

    def _own_deltas(self, name: str) -> tuple[Delta | None, Delta | None]:
        return self.pair.subject.modules.get(name), self.pair.style.modules.get(name)

    def _part(self, name: str, operands: tuple[Product | None, Product | None], biases: Biases) -> Part:
        subject, style = operands
        module = self.plan.by_name.get(name)
        if self._chooser and subject and style and module and module.rho is not None:
            return MeasuredPart(operands, biases=biases, chooser=self._chooser, name=name)
        return Part(operands, biases=biases)

    def _operand(self, delta: Delta | None, site: Site) -> Product | None:
        return None if delta is None else product_of(delta, site, self._weights.of(delta), self._room)

    def _bind(
        self,
        sites: Mapping[str, Site],
        deltas: Callable[[str], tuple[Delta | None, Delta | None]],
        biased: Callable[[str], tuple[Delta | None, Delta | None]] = lambda name: (None, None),
    ) -> dict[str, Part]:
        """The parts of sites in which the `deltas` act, with the biases of the `biased`."""
        parts = {}
        for name, site in sites.items():
            subject, style = deltas(name)
            if subject is not None or style is not None:
                ours, theirs = (_bias(delta) if site.has_bias else None for delta in biased(name))
                operands = self._operand(subject, site), self._operand(style, site)
                parts[name] = self._part(name, operands, (ours, theirs))
        return parts

    def _join(self) -> None:
        """Have operands of one LoRA share their input where their modules do, unless it is not known which will act."""
        for names in shared_inputs(tuple(self._parts)) if self._chooser is None else ():
            for side in (0, 1):
                found = [self._parts[name].operands[side] for name in names]
                products = [product for product in found if isinstance(product, LinearProduct)]
                weights = [(product, self._weights.of(product.delta)) for product in products]
                joinable = [product for product, prepared in weights if prepared.joinable]
                if len({product.delta.columns for product in joinable}) == 1 and len(joinable) > 1:
                    shared = SharedInput(self._weights.joined(tuple(product.delta for product in joinable)))
                    for place, product in enumerate(joinable):
                        product.share(shared, place)
                    self._shared.append(shared)

    def _other_changes(self, models: Models) -> dict[str, Sum]:
        """What the files change beside modules, by path; of both files it is a sum, as other layers are."""
        subject, style = self.pair.subject.parameters, self.pair.style.parameters
        known = self.pair.model.parameters if self.pair.model else {}
        paths = [path for path in {**subject, **style} if path in known]
        in_text = self.pair.text_role(self.plan.settings)
        sums: dict[str, Sum] = {}
        for path in sorted({*paths} - unheld(models, paths)):
            both = subject.get(path, ()), style.get(path, ())
            if path.partition(".")[0] in models:
                strengths = self._strengths(in_text(path))
            else:
                strengths = self._strengths(ROLES[self.plan.settings.other_layers] if all(both) else BOTH)
            terms = [
                (delta, weight * strength)
                for side, strength in zip(both, strengths, strict=True)
                for delta, weight in side
                if strength
            ]
            if terms:
                sums[path] = terms
        return sums

    def _let_go_of_moved(self) -> None:
        """Leave parameters to the model that others have begun to move or to pack: a W′ would stay as it is."""
        moved = {path: self._held.pop(path) for path in sorted(unheld(self._models, self._held))}
        for layers in (self._layers, *self._text_layers):
            layers.leave_out(moved.values())
        if moved:
            self._say(f"from now on {packed(next(iter(moved)), len(moved))}")

    def _bind_text(self, sites: Mapping[str, Site]) -> dict[str, Part]:
        subject, style = self.pair.subject.text_encoder, self.pair.style.text_encoder
        active = self.pair.text_encoder_active(self.plan.settings)
        used = {name: site for name, site in sites.items() if any(active.get(name, ()))}

        def deltas(name: str) -> tuple[Delta | None, Delta | None]:
            return subject.get(name), style.get(name)

        parts = self._bind(used, deltas, deltas)
        for name, part in parts.items():
            part.set(self._strengths(active[name]))
            part.set_biases(self._strengths(active[name]))
        return parts

    def _of_text_encoders(
        self, parts: Mapping[str, Part], encoders: Iterable[nn.Module], say: Say, parameters: Sequence[Held]
    ) -> Iterator[Layers]:
        """The layers of each text encoder, and of modules of which it is not known whose they are."""
        rest = dict(parts)
        for encoder in encoders:
            inside = {id(module) for module in encoder.modules()}
            found = {name: part for name, part in rest.items() if id(part.module) in inside}
            rest = {name: part for name, part in rest.items() if name not in found}
            if found:
                yield Layers(found, encoder, self._engine, self._room, say, brief=True)
        if rest or parameters:
            yield Layers(rest, None, self._engine, self._room, say, parameters)


def _bias(delta: Delta | None) -> Tensor | None:
    """What a delta adds to its module's bias, fp32."""
    return delta.bias.change() if delta and delta.bias else None


def _device_of(model: nn.Module | None) -> torch.device:
    """Where a model's weights lie."""
    weights = iter(()) if model is None else model.parameters()
    return next((weight.device for weight in weights), torch.device("cpu"))
