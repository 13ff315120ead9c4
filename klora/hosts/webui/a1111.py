"""The Automatic1111 host."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from klora.balance.mixture import Mixture, Prediction
from klora.engine.dynamic import BatchRows
from klora.engine.layers import Say
from klora.engine.session import Session, logger
from klora.fusion.plan import FusionPlan
from klora.hosts.sites import third_of, weight_shape
from klora.hosts.text_tensors import host_tensors, kohya_text_key
from klora.hosts.webui.host import WebuiHost
from klora.hosts.webui.text_encoder import TextPart
from klora.pair import Pair

_PROJECTION = re.compile(r"_[qkv]_proj$")


class A1111Host(WebuiHost):
    """A model loaded in A1111."""

    @property
    def diffusion_model(self) -> nn.Module:
        """The UNet."""
        model: nn.Module = self.sd_model.model.diffusion_model
        return model

    def lora_keys(self) -> Mapping[str, Any]:
        """The modules that A1111 has named for its own LoRA code; of SD3 also by their names in diffusers."""
        keys: dict[str, Any] = {}
        heights: dict[str, int] = {}
        for path, module in self.diffusion_model.named_modules():
            named, shape = getattr(module, "network_layer_name", None), weight_shape(module)
            if named and shape:
                keys[named], heights[named] = f"diffusion_model.{path}.weight", shape[0]
        for key, name in getattr(self.sd_model, "diffusers_weight_mapping", dict)():
            flat = name.replace(".", "_")
            if third := third_of(flat, heights):
                keys[key] = (keys[third[0]], third[1])
            elif flat in keys:
                keys[key] = keys[flat]
        return keys

    def session(self, pair: Pair, plan: FusionPlan, say: Say = logger.warning) -> Session:
        """A session of a pair that fits, not yet attached; `say` hears what a user should know."""
        if pair.subject.parameters or pair.style.parameters:
            self._merge_into_norms()
        return super().session(pair, plan, say)

    def _merge_into_norms(self) -> None:
        """Have the host merge its own LoRAs into norms now.

        It would in their forwards, where other values stand in the place of the model's own: what it backs up there,
        and puts back later, would be these.
        """
        networks = importlib.import_module("networks")
        for module in self.diffusion_model.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and hasattr(module, "network_layer_name"):
                networks.network_apply_weights(module)

    def _unload(self, found: Sequence[Any]) -> None:
        """The list of loaded networks is what each layer merges by."""

    @contextmanager
    def text_encoder_with(self, parts: list[TextPart]) -> Iterator[None]:
        """Add a Network for each part while the text is encoded.

        Outside the block the host does not see them, so its UNet is neither backed up nor merged on their account;
        the text encoder's own layers notice the difference at their next forward.
        """
        networks = importlib.import_module("networks")
        added = [self._network(networks, part) for part in parts]
        networks.loaded_networks.extend(added)
        try:
            yield
        finally:
            networks.loaded_networks[:] = [net for net in networks.loaded_networks if net not in added]

    def conditional_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows | None:
        """The host batches [conditional …, unconditional]; where it makes several calls, a conditional one comes first.

        None where the call is not the whole evaluation: then the first call decides.
        """
        whole, batch = self.evaluation.x.shape[0], args[0].shape[0]
        unconditional = getattr(self.evaluation, "text_uncond", ())
        if isinstance(unconditional, Mapping):
            unconditional = unconditional["crossattn"]
        conditional = whole - len(unconditional)
        return BatchRows(0, conditional, whole) if batch == whole and conditional > 0 else None

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode with the host's VAE; its own way to decode lets no gradient pass."""
        vae = self.sd_model.first_stage_model
        weight = next(vae.parameters())
        images: Tensor = vae.decode((latents / self.sd_model.scale_factor).to(weight.dtype))
        return images.float() / 2 + 0.5

    def mixture(self, level: float, denoiser: Any) -> Mixture:
        """Samplers of k-diffusion are told σ, those of CompVis (DDIM and its kin) a timestep; SD3 is a flow."""
        if getattr(self.sd_model, "is_sd3", False):
            return Mixture(1 - level, level, "flow")
        kind: Prediction = "v_prediction" if getattr(self.sd_model, "parameterization", "eps") == "v" else "epsilon"
        if not hasattr(denoiser, "alphas"):
            return Mixture.at_level(level, kind)
        alpha = float(denoiser.alphas[round(level)])
        return Mixture(alpha**0.5, (1 - alpha) ** 0.5, kind)

    def _network(self, networks: Any, part: TextPart) -> Any:
        network = importlib.import_module("network")
        # The host knows a network by its name and strengths alone.
        net = network.Network(f"klora:{part.sha256}", part.lora.on_disk)
        net.te_multiplier = net.unet_multiplier = part.strength
        net.dyn_dim = None
        for name, delta in part.deltas.items():
            key = kohya_text_key(name, several=bool(getattr(self.sd_model, "is_sdxl", False)))
            found = self._module(networks, key)
            if found is not None:
                weights = network.NetworkWeights(key, found[0], host_tensors(delta), found[1])
                module = next(filter(None, (kind.create_module(net, weights) for kind in networks.module_types)), None)
                if module is not None:
                    net.modules[found[0]] = module
        return net

    def _module(self, networks: Any, key: str) -> tuple[str, nn.Module] | None:
        """The host's name of a text-encoder module and the module; attention in one piece lacks q, k and v."""
        mapping = self.sd_model.network_layer_mapping
        is_sd2 = "model_transformer_resblocks" in mapping
        for name in (
            networks.convert_diffusers_name_to_compvis(key, is_sd2),
            key.replace("lora_te1_", "0_transformer_"),
        ):
            whole = _PROJECTION.sub("", name)
            if name in mapping or isinstance(mapping.get(whole), nn.MultiheadAttention):
                return name, mapping.get(name, mapping.get(whole))
        return None
