"""A fusion that acts whenever a sampler samples with a model, and in the calls of that model alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from klora.engine.ensemble import Ensemble
from klora.engine.session import Session
from klora.errors import KloraError, named_by
from klora.fusion.plan import FusionPlan
from klora.hosts.comfyui.compiled import check_not_compiled
from klora.hosts.comfyui.model import ComfyHost
from klora.hosts.comfyui.schedule import whole_schedule
from klora.pair import Pair

KEY = "K-LoRA"
"""What ComfyUI knows our wrappers by."""
SAMPLER_SAMPLE, APPLY_MODEL = "sampler_sample", "apply_model"
"""ComfyUI's names of what is wrapped (`comfy.patcher_extension.WrappersMP`): one pass of a sampler, one call."""
ESTIMATED = (
    "this sampler makes a part of a schedule that is none of ComfyUI's; the steps that are missing are taken to be"
    " evenly spaced, so that when LoRAs switch may be off a little (set progress to relative to count this part alone)"
)


class Running(NamedTuple):
    """One pass of a sampler."""

    session: Session
    ensemble: Ensemble | None


class SampledFusion:
    """A pair and its plan, with the passes of samplers that are under way; clones of a model share it."""

    def __init__(self, pair: Pair, plan: FusionPlan, say: Callable[[str], None]) -> None:
        """Take a pair under the names of the model; `say` tells the user what came of a pass."""
        self.pair = pair
        self.plan = plan
        self._say = say
        self._running: list[Running] = []
        self._calling = 0

    def on(self, patcher: Any) -> Any:
        """A clone of a ModelPatcher in which the fusion acts; KloraError where ComfyUI cannot be told of it."""
        clone = patcher.clone()
        if not hasattr(clone, "add_wrapper_with_key"):
            raise KloraError("this ComfyUI is of before 2025 and does not let nodes follow a sampler; update it")
        clone.add_wrapper_with_key(SAMPLER_SAMPLE, KEY, self._sample)
        clone.add_wrapper_with_key(APPLY_MODEL, KEY, self._call)
        return clone

    def _sample(self, executor: Any, guider: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
        positive = frozenset(part.get("uuid") for part in getattr(guider, "conds", {}).get("positive") or ())
        host = ComfyHost(guider.model_patcher, positive)
        check_not_compiled(host.patcher)
        with named_by(*(lora.path for lora in self.pair.loras if lora.path)):
            session = host.session(self.pair, self.plan, self._say)
        schedule = whole_schedule(host.patcher.get_model_object("model_sampling"), sigmas.tolist())
        session.start_pass(schedule.levels)
        if not schedule.known and session.plan.settings.progress == "absolute":
            self._say(ESTIMATED)
        ensemble = Ensemble(session, _Conditionings()) if session.plan.policy.forwards > 1 else None
        self._running.append(Running(session, ensemble))
        try:
            with session, self._watched(host.diffusion_model, ensemble):
                return executor(guider, sigmas, *args, **kwargs)
        finally:
            self._running.pop()

    @contextmanager
    def _watched(self, model: nn.Module, ensemble: Ensemble | None) -> Iterator[None]:
        """See every forward of the model inside the block."""
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(self._before_a_forward, with_kwargs=True).remove)
            if ensemble is not None:
                hook = model.register_forward_hook(self._after_a_forward, with_kwargs=True, prepend=True)
                stack.callback(hook.remove)
            yield

    def _call(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._running:
            raise KloraError(
                "the model is called by something that is no sampler of ComfyUI's form, which does not say how far"
                " sampling is; connect it to the model before K-LoRA"
            )
        session = self._running[-1].session
        session.attach()
        session.at_level(float(t.max()))
        self._calling += 1
        try:
            output = executor(x, t, *args, **kwargs)
        finally:
            self._calling -= 1
        # As soon as it can be known, so that no picture is made for nothing.
        session.evaluated()
        return output

    def _before_a_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let go where another branch's clone of the same model is called in the midst of a pass."""
        session, ensemble = self._running[-1]
        if not self._calling:
            session.detach()
        elif ensemble is not None:
            ensemble.begin(args, kwargs)

    def _after_a_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ensemble = self._running[-1].ensemble
        return ensemble.finish(model, args, kwargs, output) if self._calling and ensemble is not None else None


class _Conditionings:
    """Gives, for the arguments of a forward, an object that stands for the conditionings that it is for."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], object] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        ids = tuple(kwargs.get("transformer_options", {}).get("uuids") or ())
        return self._known.setdefault(ids, object()) if ids else object()
