"""What A1111 and the Forge family have in common, seen as a host: LoRA files by name, modules, schedules.

Differences lie in `a1111` and `forge`; `webui_host` chooses by what a loaded model can do, never by a version.
"""

from __future__ import annotations

import copy
import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from klora.engine.bypass import Site, module_shape
from klora.engine.dynamic import Rows
from klora.errors import KloraError, MismatchError
from klora.lora.deltas import Delta
from klora.lora.deltas.dora import DoraDelta
from klora.lora.names import resolve


class WebuiHost(ABC):
    """A WebUI with a loaded model."""

    def __init__(self, sd_model: Any) -> None:
        self.sd_model = sd_model

    @property
    def model_name(self) -> str:
        """How messages call the model."""
        return f"the {self.architecture or ''} checkpoint {self.sd_model.sd_checkpoint_info.name}".replace("  ", " ")

    @property
    def architecture(self) -> str | None:
        """SD1, SD2, SDXL or FLUX, as the host tells them apart; None when unknown."""
        for flag, name in (("is_sdxl", "SDXL"), ("is_sd2", "SD2"), ("is_sd1", "SD1")):
            if getattr(self.sd_model, flag, False):
                return name
        return None

    @property
    @abstractmethod
    def diffusion_model(self) -> nn.Module:
        """The UNet or transformer."""

    def sites(self) -> Mapping[str, Site]:
        """Give the diffusion model's modules by canonical name."""
        return dict(ldm_sites(self.diffusion_model))

    @abstractmethod
    def text_encoder_with(self, parts: list[TextPart]) -> AbstractContextManager[None]:
        """Have the host's own LoRA code apply `parts` to what is encoded inside the block, and to nothing else."""

    @abstractmethod
    def conditional_rows(self, evaluation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows | None:
        """Give the rows that follow the prompt in a call of the diffusion model; None for all of them.

        `evaluation` is what the host's callback was told of the evaluation that the call is part of.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Give images (B, 3, H, W) in [0, 1] of latents as the sampler has them; gradients pass."""


@dataclass(frozen=True)
class TextPart:
    """The text-encoder part of one file: `deltas` by canonical name, applied with `strength`."""

    lora: ListedLora
    deltas: Mapping[str, Delta]
    strength: float
    sha256: str


@dataclass(frozen=True)
class ListedLora:
    """A LoRA that the host lists."""

    name: str
    path: Path
    on_disk: Any

    @property
    def shorthash(self) -> str:
        """The hash that the host and image sites know the file by; reads the file if the host has not yet."""
        self.on_disk.read_hash()
        return self.on_disk.shorthash or ""


class Library:
    """The LoRA files that the host lists, by the names and aliases that `<lora:…>` accepts."""

    def __init__(self) -> None:
        self._networks = importlib.import_module("networks")

    def names(self) -> list[str]:
        """List the names, as the host's own menus do."""
        return sorted(self._networks.available_networks, key=str.casefold)

    def refresh(self) -> None:
        """Have the host look into its folders again."""
        self._networks.list_available_networks()

    def find(self, name: str) -> ListedLora:
        """Give the LoRA of that name or alias; KloraError where there is none."""
        on_disk = self._lookup(name)
        if on_disk is None:
            self.refresh()
            on_disk = self._lookup(name)
        if on_disk is None:
            near = difflib.get_close_matches(name, self.names(), n=1)
            hint = f"did you mean {near[0]}?" if near else "see the Lora tab for the names"
            raise KloraError(f"there is no LoRA named {name!r}; {hint}")
        return ListedLora(on_disk.name, Path(on_disk.filename), on_disk)

    def _lookup(self, name: str) -> Any:
        networks = self._networks
        if name.lower() in networks.forbidden_network_aliases:
            return networks.available_networks.get(name)
        return networks.available_network_aliases.get(name)


def library() -> Library:
    """Give the host's LoRA files."""
    return Library()


def webui_host(sd_model: Any) -> WebuiHost:
    """See a loaded model as a host."""
    if hasattr(sd_model, "forge_objects"):
        from klora.hosts.forge import ForgeHost

        return ForgeHost(sd_model)
    from klora.hosts.a1111 import A1111Host

    return A1111Host(sd_model)


def kohya_text_key(name: str, several: bool) -> str:
    """Spell a text-encoder module as kohya does, for a model with one text encoder or with several."""
    component, _, path = name.partition(".")
    number = {"text_encoder": "1" if several else "", "text_encoder_2": "2"}[component]
    return f"lora_te{number}_{path.replace('.', '_')}"


def host_tensors(delta: Delta) -> dict[str, Tensor]:
    """Give a delta under the key endings that every WebUI reads: as factors where it has them, else as a whole.

    Raises MismatchError for a DoRA of another family than LoRA.
    """
    direction = delta.direction if isinstance(delta, DoraDelta) else delta
    factors = direction.factors()
    if factors is None:
        if delta.needs_base:
            raise MismatchError(
                f"{delta.file}: {delta.key}: this kind of DoRA cannot be applied to a text encoder here;"
                " set the text encoder to none, or use another file"
            )
        return {"diff": delta.matrix()}
    tensors = {
        "lora_up.weight": factors.up.float(),
        "lora_down.weight": factors.down.float(),
        "alpha": torch.tensor(delta.scale * delta.rank),
    }
    if isinstance(delta, DoraDelta):
        shape = (1, -1) if delta.by_column else (-1, 1)
        tensors["dora_scale"] = delta.magnitude.fp32().reshape(shape)
    return tensors


def trainable_copy(vae: nn.Module) -> nn.Module:
    """Copy a VAE whose weights were made in inference mode, through which no gradient passes."""
    with torch.inference_mode(False):
        return copy.deepcopy(vae).requires_grad_(False)


def ldm_sites(diffusion_model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Give the sites of a model with LDM module names, fused weights slice by slice."""
    for path, module in diffusion_model.named_modules():
        shape = weight_shape(module)
        if shape is None:
            continue
        for target in resolve(f"diffusion_model.{path}") or ():
            rows = target.rows(*shape[:2]) if target.fused else None
            yield target.name, Site(module, rows, known_shape=shape)


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Give the shape of a linear or convolution weight, however it is stored; None for any other module."""
    if hasattr(module, "in_features") or hasattr(module, "kernel_size"):
        return module_shape(module)
    weight = getattr(module, "weight", None)
    if "Linear" not in type(module).__name__ or weight is None:
        return None
    # GGUF keeps the real shape beside the packed one, bitsandbytes in the state of the quantisation.
    shape = getattr(weight, "real_shape", None) or getattr(getattr(weight, "quant_state", None), "shape", weight.shape)
    return tuple(shape) if len(shape) == 2 else None


def schedule_of(denoiser: Any) -> list[float]:
    """Give the noise levels of the whole schedule that a sampler's denoiser is in.

    Asks the sampler as its own `sample` and `sample_img2img` do, so that any scheduler and override counts. For
    img2img and hires this is the schedule of which the pass runs the end.
    """
    p, sampler = denoiser.p, denoiser.sampler
    steps = p.steps
    if getattr(p, "is_hr_pass", False):
        steps = _img2img_steps(p, p.hr_second_pass_steps or p.steps)
    elif getattr(p, "init_images", None) is not None:
        steps = _img2img_steps(p, None)
    if hasattr(sampler, "get_timesteps"):
        timesteps = sampler.get_timesteps(p, steps)
        if getattr(denoiser, "classic_ddim_eps_estimation", False):
            # Forge's denoiser turns a timestep into the noise level that it stands for, before it tells anyone.
            products = denoiser.inner_model.inner_model.alphas_cumprod
            levels = ((1 - products) / products) ** 0.5
            timesteps = levels[timesteps.round().long().to(levels.device).clip(0, len(levels) - 1)]
        return [float(level) for level in timesteps]
    # The last σ is where the schedule ends, not a step.
    return [float(level) for level in sampler.get_sigmas(p, steps)[:-1]]


def _img2img_steps(p: Any, steps: int | None) -> int:
    common = importlib.import_module("modules.sd_samplers_common")
    return common.setup_img2img_steps(p, steps)[0]
