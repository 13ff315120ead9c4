"""A model that ComfyUI has loaded, seen as a host: which modules it has, and under which names files may mean them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from klora.engine.dynamic import BatchRows
from klora.engine.site import Site
from klora.hosts.base import Host
from klora.hosts.comfyui.plain_weights import with_plain_weight
from klora.hosts.sites import NamedSites, is_flux_model, weights_by_host, weights_by_rule, weights_by_table
from klora.lora.model_index import ModelIndex
from klora.lora.tables import ARCHITECTURE_OF_WIDTH


class ComfyHost(Host):
    """What a `ModelPatcher` holds."""

    def __init__(self, patcher: Any, positive: frozenset[Any] = frozenset()) -> None:
        """Take a ModelPatcher, loaded or not; `positive` are the ids of the prompt's conditionings, if known."""
        self.patcher = patcher
        self._positive = positive

    @property
    def model_name(self) -> str:
        """How messages call the model."""
        return f"the {self.architecture or type(self.patcher.model).__name__} model"

    @property
    def diffusion_model(self) -> nn.Module:
        """The UNet or transformer."""
        model: nn.Module = self.patcher.model.diffusion_model
        return model

    @cached_property
    def architecture(self) -> str | None:
        """SD1, SD2 or SDXL by the width of a UNet's text conditioning, FLUX by its modules' names; None for others."""
        if self._unet_names:
            width = self._unet_config.get("context_dim")
            return ARCHITECTURE_OF_WIDTH.get(width) if isinstance(width, int) else None
        return "FLUX" if is_flux_model(self.diffusion_model) else None

    @property
    def device(self) -> torch.device:
        """Where ComfyUI computes with the model."""
        return torch.device(self.patcher.load_device)

    def lora_keys(self) -> Mapping[str, Any]:
        """ComfyUI's own map of a LoRA's keys to the model's weights."""
        # A dictionary of our own: the host's default argument is shared between calls.
        keys: Mapping[str, Any] = importlib.import_module("comfy.lora").model_lora_keys_unet(self.patcher.model, {})
        return keys

    def sites(self) -> Mapping[str, Site]:
        """The diffusion model's modules by canonical name."""
        return {name: with_plain_weight(site) for name, site in self._weights.sites.items()}

    @property
    def index(self) -> ModelIndex:
        """The names under which files may mean the diffusion model's modules."""
        shapes = {name: site.shape for name, site in self._weights.sites.items()}
        parameters = {path: tuple(one.shape) for path, one in self.diffusion_model.named_parameters()}
        return ModelIndex(shapes, self._weights.aliases, self.architecture, parameters=parameters)

    def conditional_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows | None:
        """The rows of a call's batch that follow the prompt; None for all of them.

        ComfyUI says of each equal part of the batch which conditioning it is for, by its id, and which of the guider's
        lists that is in, the first of which is the prompt's in most guiders.
        """
        options, batch = kwargs.get("transformer_options", {}), len(args[0])
        lists, ids = options.get("cond_or_uncond") or (), options.get("uuids") or ()
        count = len(lists)
        if not count or batch % count:
            return None
        by_id = bool(self._positive) and len(ids) == count
        found = [i for i in range(count) if (ids[i] in self._positive if by_id else lists[i] == 0)]
        size = batch // count
        return BatchRows(found[0] * size, (found[-1] + 1) * size, batch) if found else BatchRows(0, 0, batch)

    @property
    def _unet_config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = getattr(self.patcher.model.model_config, "unet_config", {})
        return config

    @cached_property
    def _unet_names(self) -> Mapping[str, str]:
        """The paths of a UNet's weights by their names in diffusers, as ComfyUI counts its blocks; empty for others."""
        names = importlib.import_module("comfy.utils").unet_to_diffusers(self._unet_config)
        return {
            path.removesuffix(".weight"): name.removesuffix(".weight")
            for name, path in names.items()
            if name.endswith(".weight")
        }

    @cached_property
    def _weights(self) -> NamedSites:
        if self._unet_names:
            return weights_by_table(self.diffusion_model, self._unet_names)
        if self.architecture is not None:
            return weights_by_rule(self.diffusion_model)
        return weights_by_host(self.diffusion_model, self.lora_keys())
