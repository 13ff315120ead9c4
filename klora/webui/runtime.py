"""A fusion at work in a WebUI: from the tag at activation to the last evaluation of the model.

Everything hangs on the processing object `p` and on what the host calls for every `p`, also those that run no
scripts of ours (ADetailer's inner passes): the extra network's activation, and the callback before each evaluation.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.errors import KloraError
from klora.fusion.plan import FusionPlan
from klora.fusion.policies import make_policy
from klora.fusion.policies.base import WEBUI
from klora.hosts.references import make_refiner
from klora.hosts.webui import Library, ListedLora, TextPart, WebuiHost, library, schedule_of, webui_host
from klora.hosts.webui_refine import DenoiserRefinement
from klora.lora.file import check_model
from klora.pair import Pair
from klora.settings import Settings
from klora.webui.infotext import to_infotext
from klora.webui.injection import PLANS
from klora.webui.options import reference_folder, score_cache
from klora.webui.prompt_tag import NAME, Tag
from klora.webui.references import with_references

logger = logging.getLogger("klora")

# Where a processing object keeps its Generation.
STATE = "klora_generation"


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A tag with its two files opened."""

    tag: Tag
    subject: ListedLora
    style: ListedLora
    pair: Pair
    settings: Settings
    """Those of the tag, with the files that its names of references stand for."""

    def text_parts(self) -> list[TextPart]:
        """Give the text-encoder parts that act, with the strengths they act with."""
        settings = self.settings
        weights = self.pair.text_encoder_weights(settings)
        parts = []
        for lora, file, side, strength in (
            (self.subject, self.pair.subject, 0, settings.subject_strength),
            (self.style, self.pair.style, 1, settings.style_strength),
        ):
            deltas = {name: delta for name, delta in file.text_encoder.items() if weights[name][side]}
            if deltas and strength:
                parts.append(TextPart(lora, deltas, strength, file.sha256))
        return parts

    def plan(self, host: WebuiHost, hires: bool = False) -> FusionPlan:
        """Decide for one pass; the pass that `passes` leaves out applies the pair as two plain LoRAs."""
        settings = self.settings
        if settings.passes not in ("both", "hires" if hires else "first"):
            settings = dataclasses.replace(settings, policy="direct", preset="1,1", share=None)
        return self.pair.plan(settings, host.architecture)


class Pairs:
    """The pairs opened last; a file that has changed on disk is opened anew."""

    def __init__(self, limit: int = 2) -> None:
        self._limit = limit
        self._pairs: dict[tuple[Any, ...], Pair] = {}

    def open(self, subject: Path, style: Path, cache: ScoreCache) -> Pair:
        """Open two files, or give them as they were opened before."""
        key = (*_identity(subject), *_identity(style), cache.folder)
        pair = self._pairs.pop(key, None) or Pair.open(subject, style, cache)
        self._pairs[key] = pair
        while len(self._pairs) > self._limit:
            del self._pairs[next(iter(self._pairs))]
        return pair


def _identity(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), status.st_mtime_ns, status.st_size


class Attached:
    """The sessions whose hooks are on: at most one, unless a host ends a picture in a way that is not known here."""

    def __init__(self) -> None:
        self._sessions: list[Session] = []

    def attach(self, session: Session) -> None:
        """Put a session's hooks on; does nothing when they are on."""
        if session not in self._sessions:
            self._sessions.append(session)
            session.attach()

    def detach(self, session: Session) -> None:
        """Take a session's hooks off; does nothing when they are off."""
        session.detach()
        if session in self._sessions:
            self._sessions.remove(session)

    def detach_all(self) -> None:
        """Take every hook off."""
        for session in list(self._sessions):
            self.detach(session)


class Generation:
    """What one processing object has of K-LoRA: the fusion its prompt asks for, and the session of the current pass.

    Wraps three methods on the instance: `setup_conds` and `calculate_hr_conds`, for the text encoder, and `sample`,
    whose end, however it comes, takes every hook off and the wrappers too.
    """

    def __init__(self, p: Any, attached: Attached) -> None:
        self.p = p
        self._attached = attached
        self.fusion: Fusion | None = None
        self.evaluation: Any = None
        """What the host's callback was told of the evaluation that is under way."""
        self._session: Session | None = None
        self._refinement: DenoiserRefinement | None = None
        self._bound_to: tuple[Any, ...] | None = None
        self._wrapped: list[tuple[str, Any, bool]] = []
        self._encoder = ExitStack()

    def begin(self, fusion: Fusion | None) -> None:
        """Take what the prompt of the coming pass asks for."""
        self.fusion = fusion
        if not self._wrapped:
            self._wrap("setup_conds", self._encoding)
            self._wrap("calculate_hr_conds", self._encoding)
            self._wrap("sample", self._sampling)

    def evaluate(self, denoiser: Any, level: float) -> None:
        """Make what the plan decides at this noise level active, in the model that is about to be evaluated."""
        fusion = self.fusion
        if fusion is None:
            self._release()
            return
        shared = importlib.import_module("modules.shared")
        host = webui_host(shared.sd_model)
        hires = bool(getattr(self.p, "is_hr_pass", False))
        # Compared by identity: the objects are kept, so none can take another's place.
        bound_to = (fusion, denoiser, host.diffusion_model)
        if self._bound_to is None or any(a is not b for a, b in zip(self._bound_to, bound_to, strict=True)):
            self._bind(fusion, denoiser, host, hires)
            self._bound_to = bound_to
        if self._session is not None:
            # A picture made inside this one (by another extension) may have taken the hooks off.
            self._attached.attach(self._session)
            self._session.at_level(level)

    def stop(self, reason: str) -> None:
        """Go on without K-LoRA and say why."""
        self.fusion = None
        self._release()
        fail(self.p, reason, "stopped")

    def _bind(self, fusion: Fusion, denoiser: Any, host: WebuiHost, hires: bool) -> None:
        same_pass = self._bound_to is not None and self._bound_to[1] is denoiser and self._session is not None
        sampling = self._session.sampling if same_pass and self._session else None
        self._release()
        with _named_by(fusion.subject, fusion.style):
            plan = fusion.plan(host, hires)
            session = Session(
                fusion.pair,
                plan,
                host.sites(),
                model=host.model_name,
                denoiser=host.diffusion_model,
                conditional=lambda args, kwargs: host.conditional_rows(self.evaluation, args, kwargs),
            )
        with _named_by(folder=reference_folder()):
            refiner = make_refiner(plan.settings, self.evaluation.x.device if self.evaluation else "cpu")
        if sampling is None:
            session.start_pass(schedule_of(denoiser))
        else:
            # The model has changed within a pass: a refiner.
            session.follow(sampling)
        self._session = session
        if refiner is not None:
            self._refinement = DenoiserRefinement(host, session, refiner, denoiser)
        self._report(session)

    def _report(self, session: Session) -> None:
        plans = getattr(self.p, PLANS, None)
        if plans is None:
            plans = []
            setattr(self.p, PLANS, plans)
        plans.append(session.plan)
        coverage = session.pair.coverage
        share = "–" if session.plan.share is None else f"{session.plan.share:.0%}"
        logger.info(
            "K-LoRA: %s × %s: %d modules contested, %d subject only, %d style only, %d unmatched keys; subject %s",
            session.pair.subject.name,
            session.pair.style.name,
            len(coverage.contested),
            len(coverage.subject_only),
            len(coverage.style_only),
            len(coverage.unmatched),
            share,
        )
        for warning in session.plan.warnings:
            comment(self.p, warning)
        for left_out, what in (
            (session.missing, "modules are not in the model"),
            (coverage.unmatched, "keys are unknown"),
        ):
            if left_out:
                comment(self.p, f"{len(left_out)} of the LoRAs' {what}, such as {left_out[0]}; they do nothing")

    def _note_decisions(self, session: Session) -> None:
        """Put what was decided while sampling in the place of the plan that could not know it."""
        plans = getattr(self.p, PLANS, [])
        if session.decisions:
            plans[:] = [session.observed if plan is session.plan else plan for plan in plans]

    def _release(self) -> None:
        if self._session is not None:
            self._attached.detach(self._session)
            self._note_decisions(self._session)
        if self._refinement is not None:
            self._refinement.remove()
        self._session = self._refinement = None
        self._bound_to = None

    def _wrap(self, name: str, around: Callable[[], AbstractContextManager[None]]) -> None:
        original = getattr(self.p, name, None)
        if original is None:
            return

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with around():
                return original(*args, **kwargs)

        self._wrapped.append((name, original, name in vars(self.p)))
        setattr(self.p, name, wrapper)

    def _unwrap(self) -> None:
        for name, original, own in reversed(self._wrapped):
            if own:
                setattr(self.p, name, original)
            else:
                vars(self.p).pop(name, None)
        self._wrapped = []

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._release()
            self._unwrap()

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        # A host may encode the hires prompt inside the encoding of the first: then what acted so far has ended.
        self._encoder.close()
        self._encoder.enter_context(self._text_encoder())
        try:
            yield
        finally:
            self._encoder.close()

    def _text_encoder(self) -> AbstractContextManager[None]:
        if self.fusion is None:
            return nullcontext()
        add_hashes(self.p, self.fusion)
        parts = self.fusion.text_parts()
        if not parts:
            return nullcontext()
        shared = importlib.import_module("modules.shared")
        return webui_host(shared.sd_model).text_encoder_with(parts)


def make_extra_network() -> Any:
    """Make the host's handler of `<klora:…>` tags."""
    extra_networks: Any = importlib.import_module("modules.extra_networks")

    class ExtraNetworkKlora(extra_networks.ExtraNetwork):
        """Starts a fusion for every processing object whose prompt holds the tag."""

        def __init__(self) -> None:
            super().__init__(NAME)
            self.pairs = Pairs()
            self.attached = Attached()

        def activate(self, p: Any, params_list: list[Any]) -> None:
            """Take the tags of a prompt; called for every prompt, mostly with none."""
            # Whatever the end of an earlier picture has left on; a pass that is under way puts its own on again.
            self.attached.detach_all()
            generation = getattr(p, STATE, None)
            if generation is None:
                if not params_list and not _in_hires_prompt(p):
                    return
                generation = Generation(p, self.attached)
                setattr(p, STATE, generation)
            try:
                generation.begin(self._fusion(p, params_list) if params_list else None)
            except KloraError as error:
                generation.begin(None)
                fail(p, str(error))
            except Exception as error:
                # The host would show it in the console alone.
                logger.exception("K-LoRA failed")
                generation.begin(None)
                fail(p, f"an unexpected {type(error).__name__}: {error}")

        def deactivate(self, p: Any) -> None:
            """Nothing is left to do: the end of sampling has taken everything off."""

        def _fusion(self, p: Any, params_list: list[Any]) -> Fusion:
            tag = Tag.parse([str(item) for item in params_list[0].items])
            make_policy(tag.settings.resolve(None), WEBUI)
            if len(params_list) > 1:
                comment(p, f"the prompt holds {len(params_list)} <{NAME}:…> tags; only the first, {tag}, counts")
            names = library()
            subject, style = names.find(tag.subject), names.find(tag.style)
            with _named_by(subject, style):
                pair = self.pairs.open(subject.path, style.path, score_cache())
            fusion = Fusion(tag, subject, style, pair, with_references(tag.settings))
            with _named_by(subject, style):
                self._check(p, fusion)
            yield_to(p, params_list, fusion, names)
            return fusion

        def _check(self, p: Any, fusion: Fusion) -> None:
            shared = importlib.import_module("modules.shared")
            host = webui_host(shared.sd_model)
            # Here, and not at the first evaluation, so that the text encoder is left alone too.
            shapes = {name: site.shape for name, site in host.sites().items()}
            for file in (fusion.pair.subject, fusion.pair.style):
                check_model(file, shapes, host.model_name)
            plan = fusion.plan(host).with_steps(p.steps)
            p.extra_generation_params.update(to_infotext(plan.settings, fusion.tag.settings, plan.share))

    return ExtraNetworkKlora()


def _in_hires_prompt(p: Any) -> bool:
    # Activated inside p.sample, where it is too late to wrap that.
    return bool((getattr(p, "hr_extra_network_data", None) or {}).get(NAME))


@contextmanager
def _named_by(*loras: ListedLora, folder: Path | None = None) -> Iterator[None]:
    """Let errors about files say their names alone: an image's text must not tell where they lie on this machine."""
    try:
        yield
    except KloraError as error:
        text = str(error)
        for lora in loras:
            text = text.replace(str(lora.path), lora.path.name)
        if folder is not None:
            text = text.replace(f"{folder.resolve()}/", "").replace(str(folder.resolve()), folder.name)
        raise KloraError(text) from error


def on_evaluation(params: Any) -> None:
    """Follow a sampler: called by the host before each evaluation of the model, for every processing object."""
    denoiser = params.denoiser
    generation = getattr(getattr(denoiser, "p", None), STATE, None)
    if generation is None:
        return
    generation.evaluation = params
    try:
        generation.evaluate(denoiser, float(params.sigma.flatten()[0]))
    except KloraError as error:
        generation.stop(str(error))
    except Exception as error:
        # The host swallows what a callback raises; a picture must not be made by half a fusion in silence.
        logger.exception("K-LoRA stopped")
        generation.stop(f"an unexpected {type(error).__name__}: {error}")


def yield_to(p: Any, params_list: list[Any], fusion: Fusion, names: Library) -> None:
    """Silence `<lora:…>` tags of the same files: K-LoRA governs all of their modules."""
    ours = {fusion.subject.path, fusion.style.path}
    data: dict[str, list[Any]] = next(
        (
            data
            for data in (getattr(p, "extra_network_data", None), getattr(p, "hr_extra_network_data", None))
            if data and any(params is params_list[0] for params in data.get(NAME, ()))
        ),
        {},
    )
    plain = data.get("lora", [])
    silenced = []
    for params in plain:
        try:
            found = names.find(params.positional[0]) if params.positional else None
        except KloraError:
            continue
        if found is not None and found.path in ours:
            # With both its strengths at 0; `items`, by which conditioning is cached, stays as it is.
            params.positional = [params.positional[0], "0", "0"]
            params.named = {key: value for key, value in params.named.items() if key not in ("te", "unet")}
            silenced.append(found.name)
    if silenced:
        comment(p, f"{', '.join(silenced)} is in a <lora:…> tag too; K-LoRA alone applies it")
        # The host may have activated its tags before this one.
        registry = importlib.import_module("modules.extra_networks").extra_network_registry
        registry["lora"].activate(p, plain)


def add_hashes(p: Any, fusion: Fusion) -> None:
    """Name both files in "Lora hashes", by which image sites and a later paste recognise them."""
    shared = importlib.import_module("modules.shared")
    if not shared.opts.lora_add_hashes_to_infotext:
        return
    hashes = dict(getattr(p, "lora_hashes", None) or {})
    for name, lora in ((fusion.tag.subject, fusion.subject), (fusion.tag.style, fusion.style)):
        if lora.shorthash:
            hashes[name.replace(":", "").replace(",", "")] = lora.shorthash
    p.lora_hashes = hashes
    if hashes:
        p.extra_generation_params["Lora hashes"] = ", ".join(f"{name}: {value}" for name, value in hashes.items())


def comment(p: Any, text: str) -> None:
    """Say something under the image and in the console."""
    text = f"K-LoRA: {text}"
    logger.warning(text)
    p.comment(text)


def fail(p: Any, reason: str, outcome: str = "not applied") -> None:
    """Say under the image, in the console and in the image's text why K-LoRA did not run, or not to the end."""
    comment(p, f"{outcome}: {reason}")
    p.extra_generation_params["K-LoRA error"] = reason.replace("\n", " ")
