"""A stand-in for ComfyUI 0.3.64, as far as the nodes touch it, which does what the real one was seen to do.

A model goes from node to node in a patcher, whose clones share the model and have options of their own; a sampler calls
the wrappers of one pass around it and those of one call around each call; weights of LoRA loaders are patched in place
while the model is loaded. Modules that ComfyUI has of its own are put into `sys.modules`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CONTEXT = 16, 768
BLOCKS = ("input_blocks.1.1", "output_blocks.3.1")
DIFFUSERS = {"input_blocks.1.1": "down_blocks.0.attentions.0", "output_blocks.3.1": "up_blocks.1.attentions.0"}
LEAVES = tuple(f"{block}.{leaf}" for block in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0"))


class InterruptedByUserError(Exception):
    """What ComfyUI raises where the user ends a job."""


class Linear(nn.Linear):
    """ComfyUI's layers are of classes of its own, whose weights it moves, casts and patches."""


class Attention(nn.Module):
    """q, k, v and out, as modules."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = Linear(WIDTH, WIDTH), Linear(context, WIDTH), Linear(context, WIDTH)
        self.to_out = nn.Sequential(Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        weights = (self.to_q(x) @ self.to_k(context).mT / WIDTH).softmax(-1)
        return x + self.to_out(weights @ self.to_v(context))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(WIDTH), Attention(CONTEXT)


class Unet(nn.Module):
    """Two transformer blocks under the paths that SD 1's have."""

    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleDict({"1": nn.ModuleDict({"1": _transformer()})})
        self.output_blocks = nn.ModuleDict({"3": nn.ModuleDict({"1": _transformer()})})
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        self.calls += 1
        for path in BLOCKS:
            block = self.get_submodule(path).get_submodule("transformer_blocks.0")
            x = block.attn2(block.attn1(x, x), context)
        return x


def _transformer() -> nn.Module:
    return nn.ModuleDict({"transformer_blocks": nn.ModuleList([Block()])})


class Sampling:
    """Noise levels of a model of SD 1's kind."""

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        products = torch.cumprod(1 - betas, 0)
        self.sigmas = ((1 - products) / products) ** 0.5
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0:
            return 999999999.9
        return 0.0 if percent >= 1 else float(self.sigmas[round((1 - percent) * 999)])


class BaseModel(nn.Module):
    """What a patcher holds."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = Unet()
        self.model_config = SimpleNamespace(unet_config={"num_res_blocks": [2], "context_dim": CONTEXT})
        self.model_sampling = Sampling()

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        wrappers = _wrappers("apply_model", transformer_options)
        return _executor(self._apply_model, wrappers)(x, t, c_crossattn, transformer_options=transformer_options)

    def _apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        sigma = t[:, None, None]
        scaled = x / (sigma**2 + 1) ** 0.5
        noise = self.diffusion_model(scaled, t, context=c_crossattn, transformer_options=transformer_options)
        return x - sigma * noise


class Patcher:
    """A ModelPatcher: a shared model, with options and patches of its own."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.object_patches: dict[str, Any] = {}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}
        self.patches: dict[str, list[Tensor]] = {}
        self.load_device = torch.device("cpu")

    def clone(self) -> Patcher:
        other = Patcher(self.model)
        other.model_options = copy_nested(self.model_options)
        other.object_patches = dict(self.object_patches)
        other.wrappers = copy_nested(self.wrappers)
        other.patches = {key: list(found) for key, found in self.patches.items()}
        return other

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, getattr(self.model, name))

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def lora(self, path: Path, strength: float = 1.0) -> Patcher:
        """The host's own LoRA loader."""
        from safetensors.torch import load_file

        other, tensors = self.clone(), load_file(path)
        known = _lora_keys(self.model, {})
        for key in known.keys() & {name.rpartition(".lora_down")[0] for name in tensors}:
            delta = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
            rank = len(tensors[f"{key}.lora_down.weight"])
            scale = float(tensors.get(f"{key}.alpha", rank)) / rank
            other.patches.setdefault(known[key], []).append(strength * scale * delta)
        return other


class Guider:
    """CFGGuider with one prompt and one negative."""

    def __init__(self, patcher: Patcher, cfg: float = 3.0) -> None:
        self.model_patcher, self.inner_model, self.cfg = patcher, patcher.model, cfg
        generator = torch.Generator().manual_seed(3)
        self.contexts = torch.randn(2, 5, CONTEXT, generator=generator)
        self.conds = {"positive": [{"uuid": "p"}], "negative": [{"uuid": "n"}]}

    def sample(
        self, sigmas: list[float], at_call: Callable[[int], None] = lambda n: None, latents: Tensor | None = None
    ) -> Tensor:
        """Euler over `sigmas`, from noise or `latents`; `at_call` hears of each call before it is made."""
        patcher = self.model_patcher
        options = copy_nested(patcher.model_options)
        options["transformer_options"]["wrappers"] = copy_nested(patcher.wrappers)
        with _loaded(patcher), torch.inference_mode():
            passes = _executor(self._euler, _wrappers("sampler_sample", options["transformer_options"]))
            return passes(self, torch.tensor(sigmas), {"model_options": options}, at_call, latents)

    def _euler(
        self,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        at_call: Callable[[int], None],
        latents: Tensor | None,
    ) -> Tensor:
        options = extra_args["model_options"]["transformer_options"]
        noise = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(4)) * sigmas[0]
        x = noise if latents is None else latents
        for i, (sigma, following) in enumerate(pairwise(sigmas)):
            at_call(i)
            told = {**options, "cond_or_uncond": [1, 0], "uuids": ["n", "p"], "sigmas": sigma[None]}
            out = self.inner_model.apply_model(torch.cat([x, x]), sigma.repeat(2), self.contexts.flip(0), told)
            negative, positive = out.chunk(2)
            denoised = negative + self.cfg * (positive - negative)
            x = x + (x - denoised) / sigma * (following - sigma)
        return x


class Clip:
    """A CLIP: what is added to it, and to which of its clones."""

    def __init__(self) -> None:
        self.cond_stage_model = object()
        self.added: list[tuple[dict[str, Any], float]] = []

    def clone(self) -> Clip:
        other = Clip()
        other.added = list(self.added)
        return other

    def add_patches(self, patches: dict[str, Any], strength: float = 1.0) -> None:
        self.added.append((patches, strength))


class Server:
    """Where a node's text is sent to be shown."""

    def __init__(self) -> None:
        self.shown: dict[str, str] = {}

    def send_progress_text(self, text: str, node: str) -> None:
        self.shown[node] = text


def sigmas_of(steps: int, scheduler: str = "karras") -> list[float]:
    """A whole schedule, to 0."""
    return [float(sigma) for sigma in _calculate_sigmas(Sampling(), scheduler, steps)]


def install(monkeypatch: Any, folder: Path) -> Server:
    """Have ComfyUI's modules found; its LoRAs are in `folder`."""
    server = Server()
    modules: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.lora": {
            "model_lora_keys_unet": _lora_keys,
            "model_lora_keys_clip": lambda model, keys: {
                f"lora_te1_text_model_encoder_layers_0_self_attn_{leaf}_proj": leaf for leaf in "qkv"
            },
            "load_lora": lambda tensors, keys: {
                keys[key]: tensors for key in {name.partition(".")[0] for name in tensors} if key in keys
            },
        },
        "comfy.utils": {"unet_to_diffusers": _unet_to_diffusers, "ProgressBar": _Bar},
        "comfy.samplers": {
            "SCHEDULER_NAMES": ["broken", "exponential", "karras"],
            "calculate_sigmas": _calculate_sigmas,
        },
        "server": {"PromptServer": SimpleNamespace(instance=server)},
        "folder_paths": {
            "get_filename_list": lambda kind: sorted(path.name for path in folder.glob("*.safetensors")),
            "get_full_path": lambda kind, name: str(folder / name) if (folder / name).exists() else None,
            "get_user_directory": lambda: str(folder.parent / "user"),
            "get_output_directory": lambda: str(folder.parent / "output"),
            "get_save_image_path": _save_image_path,
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return server


class _Bar:
    def __init__(self, total: int) -> None:
        self.total = total

    def update_absolute(self, value: int, total: int) -> None:
        assert value <= total


def _save_image_path(prefix: str, folder: str) -> tuple[str, str, int, str, str]:
    place = Path(folder) / prefix
    place.parent.mkdir(parents=True, exist_ok=True)
    return str(place.parent), place.name, 1, str(Path(prefix).parent), prefix


def _calculate_sigmas(sampling: Sampling, scheduler: str, steps: int) -> Tensor:
    top, bottom = float(sampling.sigma_max), float(sampling.sigma_min)
    ramp = torch.linspace(0, 1, steps)
    if scheduler == "broken":
        raise ZeroDivisionError("this scheduler of another extension does not do this number of steps")
    if scheduler == "exponential":
        made = top * (bottom / top) ** ramp
    else:
        made = (top ** (1 / 7) + ramp * (bottom ** (1 / 7) - top ** (1 / 7))) ** 7
    return torch.cat([made, torch.zeros(1)])


def _unet_to_diffusers(config: Mapping[str, Any]) -> dict[str, str]:
    if "num_res_blocks" not in config:
        return {}
    return {
        f"{DIFFUSERS[path]}.transformer_blocks.0.{leaf}.weight": f"{path}.transformer_blocks.0.{leaf}.weight"
        for path in BLOCKS
        for leaf in LEAVES
    }


def _lora_keys(model: BaseModel, keys: dict[str, Any]) -> dict[str, Any]:
    for name in model.state_dict():
        if name.startswith("diffusion_model.") and name.endswith(".weight"):
            path = name.removeprefix("diffusion_model.").removesuffix(".weight")
            keys[f"lora_unet_{path.replace('.', '_')}"] = keys[f"diffusion_model.{path}"] = name
    for name, path in _unet_to_diffusers(model.model_config.unet_config).items():
        flat = name.removesuffix(".weight").replace(".", "_")
        keys[f"lora_unet_{flat}"] = f"diffusion_model.{path}"
    return keys


def copy_nested(found: dict[str, Any]) -> dict[str, Any]:
    """Copy dictionaries and lists, and nothing inside these."""
    return {
        key: copy_nested(value) if isinstance(value, dict) else copy.copy(value) if isinstance(value, list) else value
        for key, value in found.items()
    }


def _wrappers(kind: str, transformer_options: dict[str, Any]) -> list[Callable[..., Any]]:
    found = transformer_options.get("wrappers", {}).get(kind, {})
    return [wrapper for of_key in found.values() for wrapper in of_key]


def _executor(original: Callable[..., Any], wrappers: list[Callable[..., Any]]) -> Callable[..., Any]:
    if not wrappers:
        return original
    return lambda *args, **kwargs: wrappers[0](_executor(original, wrappers[1:]), *args, **kwargs)


@contextmanager
def _loaded(patcher: Patcher) -> Iterator[None]:
    weights = dict(patcher.model.named_parameters())
    kept = {key: weights[key].detach().clone() for key in patcher.patches}
    objects = {name: getattr(patcher.model, name) for name in patcher.object_patches}
    try:
        with torch.no_grad():
            for key, deltas in patcher.patches.items():
                weights[key] += sum(deltas)
        for name, value in patcher.object_patches.items():
            setattr(patcher.model, name, value)
        yield
    finally:
        for name, value in objects.items():
            setattr(patcher.model, name, value)
        with torch.no_grad():
            for key, weight in kept.items():
                weights[key].copy_(weight)
