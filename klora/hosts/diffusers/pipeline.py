"""The diffusers host: any pipeline with a UNet or a transformer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from klora.engine.compiled import as_written, written_path
from klora.engine.dynamic import BatchRows
from klora.engine.site import Site, module_shape
from klora.errors import KloraError
from klora.hosts.base import Host
from klora.hosts.diffusers.names import translator
from klora.lora.model_index import ModelIndex
from klora.lora.tables import ARCHITECTURE_OF_WIDTH

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISERS = ("unet", "transformer")
TIMES = ("timestep", "timesteps", "t")
CONDITIONS = ("encoder_hidden_states", "cap_feats", "encoder_hidden_states_t5", "text_bth")
# Attention blocks after fuse_qkv_projections(): the fused Linear and the canonical names of its slices.
FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


class DiffusersHost(Host):
    """A diffusers pipeline, seen as a host.

    Reads the pipeline's scheduler at every call of the denoiser, so a scheduler may be exchanged at any time.
    """

    def __init__(self, pipe: Any) -> None:
        """Take a pipeline; KloraError for one whose denoiser is not one UNet or transformer that is told the time."""
        self.pipe = pipe
        name = type(pipe).__name__
        found = [part for part in DENOISERS if getattr(pipe, part, None) is not None]
        if not found:
            raise KloraError(f"{name} has no UNet and no transformer; use a pipeline that denoises with one of these")
        if getattr(pipe, "transformer_2", None) is not None:
            raise KloraError(
                f"{name} denoises with two transformers, and K-LoRA fuses in one; use a pipeline without transformer_2"
            )
        self._part = found[0]
        if not set(TIMES) & set(self.inputs):
            raise KloraError(
                f"{type(self.diffusion_model).__name__} is not told the time as {', '.join(TIMES)}, so that how far"
                " sampling is cannot be told; use another pipeline"
            )

    @property
    def diffusion_model(self) -> nn.Module:
        """The UNet or transformer."""
        return as_written(self.running)

    @property
    def running(self) -> nn.Module:
        """The same, or what torch.compile has made of it."""
        running: nn.Module = getattr(self.pipe, self._part)
        return running

    def check_is(self, model: nn.Module) -> None:
        """KloraError where the pipeline has come to another diffusion model than `model`."""
        if self.diffusion_model is not model:
            raise KloraError(
                f"{type(self.pipe).__name__}: its {self._part} was exchanged after the fusion began; begin it anew"
            )

    def calling(self) -> Any:
        """The pipeline whose call of the denoiser is under way: another may share it, with a scheduler of its own."""
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            shares = getattr(caller, self._part, None) is self.running
            if shares and getattr(caller, "scheduler", None) is not None:
                return caller
            frame = frame.f_back
        return self.pipe

    @property
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """The pipeline's text encoders."""
        found = ((part, getattr(self.pipe, part, None)) for part in TEXT_ENCODERS)
        return {part: encoder for part, encoder in found if isinstance(encoder, nn.Module)}

    @property
    def model_name(self) -> str:
        """How messages call the model."""
        return f"the {self.architecture or ''} model of {type(self.pipe).__name__}".replace("  ", " ")

    @property
    def architecture(self) -> str | None:
        """SD1, SD2, SDXL or FLUX, from the denoiser's class and the width of its text conditioning; None for others."""
        if any(kind.__name__ == "FluxTransformer2DModel" for kind in type(self.diffusion_model).__mro__):
            return "FLUX"
        width = getattr(self.diffusion_model.config, "cross_attention_dim", None)
        unet = getattr(self.pipe, "unet", None) is not None
        return ARCHITECTURE_OF_WIDTH.get(width) if unet and isinstance(width, int) else None

    @property
    def index(self) -> ModelIndex:
        """The names under which files may mean the denoiser's and the text encoders' modules."""
        shapes = {name: site.shape for name, site in self.sites().items()}
        by_table = self.architecture is not None or hasattr(self.pipe, "unet")
        translate = None if by_table else translator(self.pipe, shapes)
        named = [
            *self.diffusion_model.named_parameters(),
            *(
                (f"{component}.{_with_text_model(path)}", parameter)
                for component, encoder in self.text_encoders.items()
                for path, parameter in encoder.named_parameters()
            ),
        ]
        return ModelIndex(
            shapes,
            architecture=self.architecture,
            translate=translate,
            text_encoder={name: site.shape for name, site in self.text_sites().items()},
            parameters={path: tuple(parameter.shape) for path, parameter in named if ".lora_" not in path},
        )

    def sites(self) -> Mapping[str, Site]:
        """The denoiser's Linear and Conv modules by canonical name, which is their path."""
        return dict(_sites(self.diffusion_model))

    def text_sites(self) -> Mapping[str, Site]:
        """The text encoders' Linear modules by canonical name."""
        return {
            f"{component}.{_with_text_model(name)}": site
            for component, encoder in self.text_encoders.items()
            for name, site in _sites(as_written(encoder))
        }

    def conditional_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows | None:
        """The rows that follow the prompt in a call of the denoiser.

        Where guidance takes one call, its batch is the latents twice: tensors [unconditional, conditional], lists
        (Z-Image) the other way round. None, for all, without guidance, and where guidance takes two calls, of which the
        conditional one comes first.
        """
        latents = self.argument(self.inputs[0], args, kwargs)
        batch = len(latents)
        half = batch // 2
        if batch % 2 or not getattr(self.pipe, "do_classifier_free_guidance", True):
            return None
        if isinstance(latents, list):
            twice = all(torch.equal(*both) for both in zip(latents[:half], latents[half:], strict=True))
            return BatchRows(0, half, batch) if twice else None
        return BatchRows(half, batch, batch) if torch.equal(latents[:half], latents[half:]) else None

    def condition(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """What calls of the denoiser with one conditioning have in common; a new object where that is unknown."""
        found = next((value for name in CONDITIONS if (value := self.argument(name, args, kwargs)) is not None), None)
        if isinstance(found, list):
            # The list is made anew for every call, of the same tensors.
            found = found[-1] if found else None
        return object() if found is None else found

    def decode_latents(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents as the denoiser has them; gradients pass.

        `grid` is the number of rows and columns of tokens, for FLUX, whose latents (B, tokens, 4·C) are packed. Raises
        KloraError for latents of a video, packed otherwise, or scaled otherwise than by one number.
        """
        vae = self._decoder
        if latents.ndim == 3 and grid is not None:
            rows, columns = grid
            latents = latents.unflatten(1, (rows, columns)).unflatten(3, (-1, 2, 2))
            latents = latents.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), -1, 2 * rows, 2 * columns)
        scaling, channels = (getattr(vae.config, name, None) for name in ("scaling_factor", "latent_channels"))
        if scaling is None or latents.ndim != 4 or latents.shape[1] != channels:
            raise KloraError(
                f"{type(self.pipe).__name__}: its latents are in a form that reference guidance cannot decode;"
                " leave out the reference pictures"
            )
        latents = latents / scaling + (getattr(vae.config, "shift_factor", None) or 0.0)
        images: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5

    @cached_property
    def _decoder(self) -> Any:
        vae = self.pipe.vae
        if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            # SDXL's decoder overflows in half precision, as its pipelines know too; theirs stays as it is.
            return copy.deepcopy(vae).float()
        return vae

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, also where its parts are offloaded."""
        device = getattr(self.pipe, "_execution_device", None) or next(self.diffusion_model.parameters()).device
        return torch.device(device)

    @cached_property
    def inputs(self) -> list[str]:
        """The names of the denoiser's arguments, in order."""
        return list(inspect.signature(type(self.diffusion_model).forward).parameters)[1:]

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument of a call of the denoiser, however it was passed; None where it was not, or has none."""
        if name in kwargs:
            return kwargs[name]
        if name not in self.inputs:
            return None
        position = self.inputs.index(name)
        return args[position] if position < len(args) else None

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the denoiser is told of the time."""
        name = next(name for name in TIMES if name in self.inputs)
        return torch.as_tensor(self.argument(name, args, kwargs))


def _sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    for path, module in model.named_modules():
        # Under a PEFT wrapper the original module lives on as `base_layer`; the user may add and remove such wrappers.
        name = written_path(path).removesuffix(".base_layer")
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and ".lora_" not in f".{path}":
            parent = model.get_submodule(name.rpartition(".")[0])
            leaf, fused = name.rpartition(".")[2], _is_fused(parent)
            if leaf in FUSED_PROJECTIONS:
                if fused:
                    yield from _slices(name, module)
            elif not (fused and _replaced_by_fused(parent, leaf)):
                yield name, Site(module, weight=partial(_weight, module))


def _slices(name: str, module: nn.Module) -> Iterator[tuple[str, Site]]:
    """Split a fused projection into the sites of its q, k and v rows."""
    prefix, _, leaf = name.rpartition(".")
    names = FUSED_PROJECTIONS[leaf]
    size = module_shape(module)[0] // len(names)
    for index, part in enumerate(names):
        rows = (index * size, (index + 1) * size)
        yield f"{prefix}.{part}", Site(module, rows, weight=partial(_weight, module))


def _is_fused(attention: nn.Module) -> bool:
    """Whether an attention block uses its fused projections."""
    if not getattr(attention, "fused_projections", False):
        return False
    # Older kinds keep them when they are parted again; then it is their processor that tells.
    return hasattr(attention, "unfuse_projections") or "Fused" in type(getattr(attention, "processor", None)).__name__


def _replaced_by_fused(attention: nn.Module, leaf: str) -> bool:
    """Whether a projection stands unused beside the fused one that replaces it."""
    return any(leaf in parts and hasattr(attention, fused) for fused, parts in FUSED_PROJECTIONS.items())


def _weight(module: Any) -> Tensor | None:
    """A module's weight, fetched from accelerate's store where sequential offload keeps it away.

    None where it is on a disk, and here in the module's own forward alone: what stands for it has no values.
    """
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    if getattr(getattr(hooks.get("group_offloading"), "group", None), "offload_to_disk_path", None):
        return None
    weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    weight: Tensor = module.weight
    return weights_map["weight"] if weights_map is not None and weight.is_meta else weight


def _with_text_model(path: str) -> str:
    # Recent transformers drop this level from CLIPTextModel; LoRA files keep it.
    return f"text_model.{path}" if path.startswith(("encoder.layers.", "final_layer_norm.")) else path
