"""SD.Next in small, for tests: a real, tiny diffusers pipeline that is led through a picture in the host's own order.

    with installed(tmp_path) as host:
        picture = host.process("a dog <klora:dog:ink>")

What is told here of the host was observed on a running one. Left out is all that no extension of this kind can notice.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.pipelines import scheduler, sd_pipeline

_TAG = re.compile(r"<(\w+):([^>]+)>")
STEPS = 4


class ExtraNetworkParams:
    """One tag, in pieces."""

    def __init__(self, items: list[str]) -> None:
        self.items = items
        self.positional = [item for item in items if "=" not in item]
        self.named = dict(item.split("=", 1) for item in items if "=" in item)


Data = dict[str, list[ExtraNetworkParams]]


class ExtraNetwork:
    """The base of a handler of tags."""

    def __init__(self, name: str) -> None:
        self.name = name


class ExtraNetworkLora(ExtraNetwork):
    """The host's own: remembers what it was told to load."""

    def __init__(self) -> None:
        super().__init__("lora")
        self.loaded: list[str] = []
        self.told: dict[str, Any] = {}

    def activate(self, p: Any, params_list: list[Any], step: int = 0, include: Any = None, exclude: Any = None) -> None:
        """Load what the tags ask for; one of strength 0 is skipped."""
        self.loaded = [params.positional[0] for params in params_list if params.positional[1:2] != ["0"]]
        self.told = {"include": include, "exclude": exclude}

    def deactivate(self, p: Any, force: bool = False) -> None:
        """Nothing."""


class StoppedError(AssertionError):
    """How a callback ends the sampling when a user asks for it."""


class Processing:
    """A job of one picture; `refiner_prompt` is what a second pass is made with, if it is not empty."""

    def __init__(self, prompt: str, **values: Any) -> None:
        self.all_prompts = [prompt]
        self.prompts: list[str] = []
        self.network_data: Data = {}
        self.refiner_prompt = ""
        self.steps, self.hr_second_pass_steps = STEPS, STEPS
        self.enable_hr = self.is_hr_pass = False
        self.init_images: Tensor | None = None
        self.denoising_strength = 0.5
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: dict[str, int] = {}
        vars(self).update(values)

    def comment(self, text: str) -> None:
        """Keep a text that nobody will see."""
        self.comments[text] = 1

    def init_hr(self, *_: Any, **__: Any) -> None:
        """Called where the second pass begins, after `is_hr_pass` has been set."""


class FakeSdnext:
    """One running SD.Next with the LoRA files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pipe = sd_pipeline(folder / "tokenizer", levels=1)
        self.pipe.sd_checkpoint_info = types.SimpleNamespace(name="tiny")
        self.sd_model = self.pipe
        self.lora = ExtraNetworkLora()
        self.registry: dict[str, Any] = {"lora": self.lora}
        self.callbacks = types.ModuleType("modules.script_callbacks")
        self.known: dict[str, list[Callable[..., None]]] = {}
        for event in ("before_ui", "app_started", "infotext_pasted", "cfg_denoiser", "model_loaded", "ui_settings"):
            setattr(self.callbacks, f"on_{event}", self.known.setdefault(event, []).append)
        for event in ("script_unloaded", "after_process"):
            setattr(self.callbacks, f"on_{event}", self.known.setdefault(event, []).append)
        self.opts = types.SimpleNamespace(lora_add_hashes_to_infotext=True, lora_apply_te=False)
        self.swallowed: list[Exception] = []
        self.encoded: dict[str, tuple[Tensor, Tensor]] = {}
        self.has_refiner = False
        self.at_step: Callable[[int], None] = lambda step: None

    def process(self, prompt: str, **values: Any) -> Tensor:
        """Make a picture's latents; None of them where the job is interrupted."""
        return self.run(Processing(prompt, **values))

    def run(self, p: Processing) -> Tensor:
        """Run a job."""
        try:
            p.prompts, p.network_data = _parse(p.all_prompts)
            task = "Img2Img" if p.init_images is not None else ""
            latents = self._pass(p, p.prompts, task, p.init_images, p.steps)
            if p.enable_hr and latents is not None:
                p.is_hr_pass = True
                p.init_hr()
                prompts = p.prompts
                if p.refiner_prompt:
                    prompts, p.network_data = _parse([p.refiner_prompt])
                again = bool(p.refiner_prompt)
                latents = self._pass(p, prompts, "Img2Img", latents, p.hr_second_pass_steps, activate=again)
                p.is_hr_pass = False
            if latents is None:
                # Interrupted: nobody is told to let go.
                return torch.zeros(0)
            for network in self._handlers(p.network_data):
                self._call(network.deactivate, p, force=False)
            return latents
        finally:
            self.sd_model = self.pipe
            for callback in self.known["after_process"]:
                callback(p)

    def _pass(
        self, p: Processing, prompts: list[str], task: str, image: Tensor | None, steps: int, activate: bool = True
    ) -> Tensor | None:
        self.sd_model = self._pipeline(task)
        if activate:
            self.activate(p)
        prompt, negative = self._encode(p, prompts)
        options: dict[str, Any] = {"image": image, "strength": p.denoising_strength} if task else {}
        if not task:
            options = {"width": 32, "height": 32}
        try:
            return self.sd_model(
                prompt_embeds=prompt,
                negative_prompt_embeds=negative,
                num_inference_steps=steps,
                output_type="latent",
                generator=torch.Generator().manual_seed(1),
                callback_on_step_end=self._callback,
                **options,
            ).images
        except StoppedError:
            return None

    def activate(self, p: Processing, step: int = 0) -> None:
        """Tell the handlers: first those that are named, then all others, of no tags."""
        exclude = [] if self.opts.lora_apply_te else ["text_encoder"]
        for network in self._handlers(p.network_data):
            params = p.network_data.get(network.name, [])
            self._call(network.activate, p, params, step=step, include=[], exclude=exclude)

    def _handlers(self, data: Data) -> list[Any]:
        named = [self.registry[name] for name in data if name in self.registry]
        return [*named, *(network for network in self.registry.values() if network not in named)]

    def _call(self, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            self.swallowed.append(error)

    def _pipeline(self, task: str) -> Any:
        """Another pipeline of the same parts for another task, with a scheduler of its own."""
        import diffusers

        pipe = getattr(diffusers, f"StableDiffusion{task}Pipeline")(
            **self.pipe.components, requires_safety_checker=False
        )
        pipe.scheduler = scheduler("EulerDiscreteScheduler")
        pipe.sd_checkpoint_info = self.pipe.sd_checkpoint_info
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _encode(self, p: Processing, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode, or give what was encoded for the same prompt beside the same tags."""
        tags = [params.items for found in p.network_data.values() for params in found]
        key = str([prompts, tags])
        if key not in self.encoded:
            prompt, negative = self.sd_model.encode_prompt(prompts[0], "cpu", 1, True)
            self.encoded[key] = (prompt.detach(), negative.detach())
        return self.encoded[key]

    def _callback(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        self.at_step(step)
        return values

    def hooks(self) -> int:
        """How many hooks there are on the parts of the pipeline."""
        return sum(
            len(getattr(module, kind))
            for part in (self.pipe.unet, self.pipe.text_encoder)
            for module in part.modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks")
        )


def _parse(prompts: list[str]) -> tuple[list[str], Data]:
    data: Data = {}
    for kind, pieces in _TAG.findall(prompts[-1]):
        data.setdefault(kind, []).append(ExtraNetworkParams(pieces.split(":")))
    return [_TAG.sub("", prompt) for prompt in prompts], data


@contextmanager
def installed(folder: Path) -> Iterator[FakeSdnext]:
    """Put the host's modules in place; `folder` holds its LoRA files."""
    host = FakeSdnext(folder)
    fakes = {module.__name__: module for module in _modules(host)}
    before = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    try:
        yield host
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _modules(host: FakeSdnext) -> Iterator[types.ModuleType]:
    def module(name: str, **contents: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(contents)
        return made

    files = {path.stem: path for path in sorted(host.folder.rglob("*.safetensors"))}
    listed = {name: types.SimpleNamespace(name=name, filename=str(path)) for name, path in files.items()}
    shared = module(
        "modules.shared",
        opts=host.opts,
        state=types.SimpleNamespace(textinfo=None),
        cmd_opts=types.SimpleNamespace(no_hashing=False, api_auth=None, auth=None, auth_file=None),
    )
    shared.__class__ = type("Shared", (types.ModuleType,), {"sd_model": property(lambda _: host.sd_model)})
    data = type("ModelData", (), {"sd_model": property(lambda _: host.sd_model)})()
    yield module("modules", __path__=[])
    yield shared
    yield host.callbacks
    yield module("modules.paths", data_path=str(host.folder))
    yield module("modules.sd_models", model_data=data)
    yield module("modules.processing_helpers", is_refiner_enabled=lambda p: host.has_refiner and p.enable_hr)
    yield module(
        "modules.extra_networks",
        ExtraNetwork=ExtraNetwork,
        extra_network_registry=host.registry,
        register_extra_network=lambda network: host.registry.__setitem__(network.name, network),
    )
    yield module("modules.lora", __path__=[])
    yield module("modules.lora.extra_networks_lora", ExtraNetworkLora=ExtraNetworkLora)
    yield module(
        "modules.lora.lora_load",
        available_networks=listed,
        available_network_aliases=listed,
        forbidden_network_aliases={},
        list_available_networks=lambda: None,
    )
