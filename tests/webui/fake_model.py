"""The loaded model of the WebUI in small: its layers, its CLIP, its checkpoint."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.lora_files import unet_ldm
from tests.support.pairs import ATTENTION, FEED_FORWARD

SIZE = 32
TEXT_LAYER = "text_model_encoder_layers_0_self_attn_q_proj"


class HostLinear(nn.Linear):
    """A layer of a host: A1111 looks at every forward whether it has to merge other LoRAs than last time."""

    def forward(self, x: Tensor) -> Tensor:
        networks = sys.modules["networks"]
        if hasattr(networks, "apply_weights"):
            networks.apply_weights(self)
        return super().forward(x)


class DiffusionModel(nn.Module):
    """A UNet with LDM names: a few layers, one after another."""

    def __init__(self, names: list[str], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers: dict[str, HostLinear] = {}
        for name in names:
            *path, leaf = unet_ldm(name, 4).split(".")
            parent: nn.Module = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            layer = HostLinear(SIZE, SIZE, bias=False)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5)
            parent.add_module(leaf, layer)
            self.layers[name] = layer

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Predict the noise."""
        for layer in self.layers.values():
            x = x + 0.1 * layer(x + condition)
        return x


class Patcher:
    """What is to act in one of Forge's models, by the file, its strength and two more that tell LoRAs apart."""

    def __init__(self) -> None:
        self.lora_patches: dict[tuple[Any, ...], Any] = {}

    def clone(self) -> Patcher:
        """A copy to which more can be added."""
        made = type(self)()
        made.lora_patches = dict(self.lora_patches)
        return made

    def add_patches(self, *, filename: str, patches: Any, strength_patch: float = 1.0) -> None:
        """Have a LoRA act."""
        self.lora_patches[filename, strength_patch, 1.0, False] = patches

    def acting(self) -> list[tuple[Any, float]]:
        """What acts, each with its strength."""
        return [(patches, key[1]) for key, patches in self.lora_patches.items()]


class LdmPatcher:
    """The same of reForge, Classic and Neo: a heap of patches that know no files."""

    def __init__(self) -> None:
        self.patches: list[tuple[Any, float]] = []

    def clone(self) -> LdmPatcher:
        """A copy to which more can be added."""
        made = type(self)()
        made.patches = list(self.patches)
        return made

    def add_patches(self, patches: Any, strength_patch: float = 1.0) -> None:
        """Have a LoRA act."""
        self.patches.append((patches, strength_patch))

    def acting(self) -> list[tuple[Any, float]]:
        """What acts, each with its strength."""
        return self.patches


AnyPatcher = Patcher | LdmPatcher


class Clip:
    """The text encoder of the Forge family with the patches that are to act when it encodes."""

    def __init__(self, layer: nn.Linear, patcher: AnyPatcher) -> None:
        self.cond_stage_model = layer
        self.patcher = patcher

    def clone(self) -> Clip:
        """A copy that shares the weights."""
        return Clip(self.cond_stage_model, self.patcher.clone())

    def add_patches(self, *args: Any, **kwargs: Any) -> None:
        """Have a LoRA act, told as the patcher wants it."""
        self.patcher.add_patches(*args, **kwargs)

    def encode(self, x: Tensor) -> Tensor:
        """Encode with what is patched in."""
        weight = self.cond_stage_model.weight
        for patches, strength in self.patcher.acting():
            for delta in patches.values():
                weight = weight + strength * delta
        return x @ weight.T


# The hosts with Forge's way of patching, and their text encoders' patchers.
FORGES: dict[str, type[AnyPatcher]] = {"forge": Patcher, "reforge": LdmPatcher, "classic": LdmPatcher}


class Checkpoint:
    """A loaded model."""

    def __init__(self, family: str, name: str, seed: int, architecture: str = "SD1", names: list[str] | None = None):
        self.diffusion = DiffusionModel(names or [*ATTENTION, *FEED_FORWARD], seed)
        self.text = HostLinear(SIZE, SIZE, bias=False)
        self.is_sd1, self.is_sd2, self.is_sdxl = (architecture == one for one in ("SD1", "SD2", "SDXL"))
        self.sd_checkpoint_info = types.SimpleNamespace(name=name)
        with torch.no_grad():
            self.text.weight.copy_(torch.eye(SIZE))
        if family in FORGES:
            self.clip = Clip(self.text, FORGES[family]())
            self.patch_unet(FORGES[family]())
            self.current_lora_hash = str([])
            self.merged: list[tuple[Any, float]] = []
        else:
            self.model = types.SimpleNamespace(diffusion_model=self.diffusion)
            self.network_layer_mapping = {f"transformer_{TEXT_LAYER}": self.text}
            for name, layer in self.diffusion.layers.items():
                self.network_layer_mapping[f"diffusion_model_{unet_ldm(name, 4).replace('.', '_')}"] = layer
            for name, layer in self.network_layer_mapping.items():
                layer.network_layer_name = name  # type: ignore[assignment]

    def patch_unet(self, patcher: AnyPatcher, clip: Clip | None = None) -> None:
        """Have a patcher's LoRAs merged at the next sampling; Forge's family alone."""
        patcher.model = types.SimpleNamespace(diffusion_model=self.diffusion)  # type: ignore[union-attr]
        self.forge_objects = types.SimpleNamespace(unet=patcher, clip=clip or self.clip)

    def encode(self, prompt: str) -> Tensor:
        """Encode a prompt without its tags."""
        generator = torch.Generator().manual_seed(sum(map(ord, prompt.strip())))
        x = torch.randn(1, SIZE, generator=generator)
        return self.forge_objects.clip.encode(x) if hasattr(self, "forge_objects") else self.text(x)

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights."""
        return {name: layer.weight.detach().clone() for name, layer in self.diffusion.layers.items()} | {
            "text": self.text.weight.detach().clone()
        }

    def hooks(self) -> int:
        """How many hooks there are."""
        modules = [*self.diffusion.modules(), self.text]
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def merge(layer: nn.Module, delta: Tensor) -> None:
    if not hasattr(layer, "backup"):
        layer.backup = layer.weight.detach().clone()  # type: ignore[assignment, operator]
    layer.weight.add_(delta)  # type: ignore[operator]


def restore(layer: nn.Module) -> None:
    if hasattr(layer, "backup"):
        layer.weight.copy_(layer.backup)  # type: ignore[operator, arg-type]
        del layer.backup
