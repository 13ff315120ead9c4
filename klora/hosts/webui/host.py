"""A WebUI with a loaded model, seen as a host: what A1111 and the Forge family have in common.

Differences lie in `a1111` and `forge`; `loaded_model` chooses by what a loaded model can do, never by a version.
"""

from __future__ import annotations

import copy
import importlib
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from klora.balance.found import Found
from klora.balance.mixture import Mixture
from klora.engine.site import Site
from klora.errors import MismatchError
from klora.hosts.base import Host
from klora.hosts.sites import NamedSites, is_flux_model, weights_by_host, weights_by_rule
from klora.hosts.webui.checkpoints import made_for, two_models
from klora.hosts.webui.text_encoder import TextPart
from klora.lora.model_index import ModelIndex
from klora.pair import Pair


class WebuiHost(Host):
    """A WebUI with a loaded model."""

    def __init__(self, sd_model: Any) -> None:
        self.sd_model = sd_model
        self.evaluation: Any = None
        """What the host's callback was told of the evaluation of the model that is under way."""

    @property
    def model_name(self) -> str:
        """How messages call the model."""
        return f"the {self.architecture or ''} checkpoint {self.sd_model.sd_checkpoint_info.name}".replace("  ", " ")

    @cached_property
    def architecture(self) -> str | None:
        """SD1, SD2 or SDXL, as the host tells them apart, FLUX by the names of its modules; None for any other."""
        for flag, name in (("is_sdxl", "SDXL"), ("is_sd2", "SD2"), ("is_sd1", "SD1")):
            if getattr(self.sd_model, flag, False):
                return name
        return "FLUX" if is_flux_model(self.diffusion_model) else None

    @property
    def device(self) -> torch.device:
        """Where the diffusion model's weights lie now."""
        return next((weight.device for weight in self.diffusion_model.parameters()), torch.device("cpu"))

    @abstractmethod
    def lora_keys(self) -> Mapping[str, Any]:
        """The host's own map of a LoRA's keys to the weights of the loaded model.

        Its values are the name of a weight, `diffusion_model.….weight`, or (name, (0, start, length)) for rows of it.
        """

    def sites(self) -> Mapping[str, Site]:
        """The diffusion model's modules by canonical name."""
        return self._weights.sites

    @property
    def index(self) -> ModelIndex:
        """The names under which files may mean the diffusion model's modules."""
        shapes = {name: site.shape for name, site in self._weights.sites.items()}
        parameters = {path: tuple(one.shape) for path, one in self.diffusion_model.named_parameters()}
        return ModelIndex(shapes, self._weights.aliases, self.architecture, parameters=parameters)

    def fit(self, pair: Pair) -> Pair:
        """The pair under the names of the model; MismatchError where it is for another, in words if these are known."""
        try:
            return super().fit(pair)
        except MismatchError as error:
            meant = made_for(pair)
            if meant and self.architecture and meant != self.architecture:
                raise MismatchError(f"{two_models(meant, self.architecture)} ({error})") from None
            raise

    @cached_property
    def _weights(self) -> NamedSites:
        if self.architecture is not None:
            return weights_by_rule(self.diffusion_model)
        return weights_by_host(self.diffusion_model, self.lora_keys())

    def found_for(self, pair: Pair) -> Found:
        """What a share is found for, where it is found for a pair with the loaded checkpoint."""
        info = self.sd_model.sd_checkpoint_info
        subject, style = (
            "+".join(sorted(f"{pair.cache.digest(lora)}:{weight:g}" for lora, weight in side.parts if weight))
            for side in (pair.subject, pair.style)
        )
        return Found(subject, style, getattr(info, "sha256", None) or info.name)

    def take_out(self, paths: Collection[Path]) -> list[str]:
        """Unload the LoRAs of these files that the host has loaded for the coming picture; give their names.

        They may have come by a tag of any kind or by a setting. Nothing of them has been merged yet: the hosts do that
        when the text is encoded and when sampling begins. They are gone, not at strength 0, which would be merged too.
        """
        loaded = importlib.import_module("networks").loaded_networks
        found = [net for net in loaded if Path(net.network_on_disk.filename) in paths]
        if found:
            self._unload(found)
            loaded[:] = [net for net in loaded if Path(net.network_on_disk.filename) not in paths]
        return [net.network_on_disk.name for net in found]

    @abstractmethod
    def _unload(self, found: Sequence[Any]) -> None:
        """Take these of the host's loaded networks out of what it will merge."""

    @abstractmethod
    def text_encoder_with(self, parts: list[TextPart]) -> AbstractContextManager[None]:
        """Have the host's own LoRA code apply `parts` to what is encoded inside the block, and to nothing else."""

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents as the sampler has them; gradients pass."""

    @abstractmethod
    def mixture(self, level: float, denoiser: Any) -> Mixture:
        """What the diffusion model is shown at a level as the callback is told it, by that sampler's `denoiser`.

        Raises KloraError for a model whose kind of prediction is not known.
        """


def trainable_copy(vae: nn.Module) -> nn.Module:
    """Copy a VAE whose weights were made in inference mode, through which no gradient passes."""
    with torch.inference_mode(False):
        return copy.deepcopy(vae).requires_grad_(False)
