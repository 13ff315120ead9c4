"""Forge and its family (Forge Neo, Forge Classic, reForge), whose models carry `forge_objects`."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from inspect import signature
from typing import Any

from torch import Tensor, nn

from klora.balance.mixture import Mixture, Prediction
from klora.engine.dynamic import BatchRows
from klora.engine.site import Site
from klora.errors import KloraError, MismatchError
from klora.hosts.text_tensors import host_tensors, text_keys
from klora.hosts.webui.forge_weights import with_plain_weight
from klora.hosts.webui.host import WebuiHost, trainable_copy
from klora.hosts.webui.text_encoder import TextPart

_PREDICTIONS: Mapping[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "const": "flow",
    # V_PREDICTION is a kind of EPS there.
    "V_PREDICTION": "v_prediction",
    "CONST": "flow",
    "EPS": "epsilon",
}
"""What the family calls the kinds of predictions."""


class ForgeHost(WebuiHost):
    """A model loaded in Forge or one of its family.

    Of what Forge remembers about its own LoRAs, online patches and backups are never touched.
    """

    @property
    def diffusion_model(self) -> nn.Module:
        """The UNet or transformer."""
        model: nn.Module = self.sd_model.forge_objects.unet.model.diffusion_model
        return model

    def lora_keys(self) -> Mapping[str, Any]:
        """Forge's map, or reForge's and Classic's, which lies elsewhere."""
        keys: Mapping[str, Any] = _lora_code().model_lora_keys_unet(
            # A dictionary of our own: the host's default argument is shared between calls.
            self.sd_model.forge_objects.unet.model,
            {},
        )
        return keys

    def sites(self) -> Mapping[str, Site]:
        """The diffusion model's modules by canonical name."""
        return {name: with_plain_weight(site) for name, site in super().sites().items()}

    def _unload(self, found: Sequence[Any]) -> None:
        """Forge keeps patches by file: those of others may have been changed, and stay. Its kin loads the others again.

        What the host remembers of loaded files is made to fit, or it would not load them for the next prompt.
        """
        files = {net.network_on_disk.filename for net in found}
        objects = self.sd_model.forge_objects
        if not hasattr(objects.unet, "lora_patches"):
            self._load_without(files)
            return
        for patcher in (objects.unet, objects.clip.patcher):
            for key in [key for key in patcher.lora_patches if key[0] in files]:
                del patcher.lora_patches[key]
        self.sd_model.current_lora_hash = ""

    def _load_without(self, files: set[str]) -> None:
        networks = importlib.import_module("networks")
        names = {net.network_on_disk.filename: net.mentioned_name for net in networks.loaded_networks}
        # The one place where strengths are kept: a list of [file, of the UNet, of the text encoder, …].
        kept = [one for one in ast.literal_eval(self.sd_model.current_lora_hash) if one[0] in names.keys() - files]
        networks.load_networks([names[one[0]] for one in kept], [one[2] for one in kept], [one[1] for one in kept])

    @contextmanager
    def text_encoder_with(self, parts: list[TextPart]) -> Iterator[None]:
        """Put a patched clone of the CLIP object in place while the text is encoded; Forge merges and unmerges it.

        Raises MismatchError for a DoRA where the host's code does not know them.
        """
        objects = self.sd_model.forge_objects
        before = clip = objects.clip
        for part in parts:
            clip = _patched(clip, part)
        objects.clip = clip
        try:
            yield
        finally:
            if objects.clip is clip:
                objects.clip = before

    def conditional_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows | None:
        """The host says of each equal part of the batch whether it is conditional (0) or not (1), in its own order.

        A call that is unconditional alone may come first.
        """
        parts = list(kwargs.get("transformer_options", {}).get("cond_or_uncond", ()))
        if not parts or len(args[0]) % len(parts):
            return None
        size, conditional = len(args[0]) // len(parts), [i for i, part in enumerate(parts) if part == 0]
        if not conditional:
            return BatchRows(0, 0, len(args[0]))
        return BatchRows(conditional[0] * size, (conditional[-1] + 1) * size, len(args[0]))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode with a copy of the host's VAE, whose weights are made in inference mode, where they lie."""
        weight = next(self._vae.parameters())
        latents = self._vae.process_out(latents).to(weight.device, weight.dtype)
        images: Tensor = self._vae.decode(latents)
        return images.float() / 2 + 0.5

    def mixture(self, level: float, denoiser: Any) -> Mixture:
        """By Forge's predictor, or by the classes of reForge's and Classic's `model_sampling`."""
        model = self.sd_model.forge_objects.unet.model
        if (predictor := getattr(model, "predictor", None)) is not None:
            named = {predictor.prediction_type}
        else:
            named = {kind.__name__ for kind in type(model.model_sampling).__mro__}
        kind = next((ours for theirs, ours in _PREDICTIONS.items() if theirs in named), None)
        if kind is None:
            raise KloraError(f"{self.model_name} predicts {', '.join(named)}, which is not known here")
        return Mixture(1 - level, level, kind) if kind == "flow" else Mixture.at_level(level, kind)

    @cached_property
    def _vae(self) -> Any:
        return trainable_copy(self.sd_model.forge_objects.vae.first_stage_model)


def _patched(clip: Any, part: TextPart) -> Any:
    """A clone of a CLIP object in which a LoRA acts."""
    lora = _lora_code()
    # A dictionary of our own: the host's default argument is shared between calls.
    known = lora.model_lora_keys_clip(clip.cond_stage_model, {})
    tensors = {
        f"{key}.{ending}": tensor
        for name, delta in part.deltas.items()
        for key in text_keys(name, known)
        for ending, tensor in host_tensors(delta).items()
    }
    found = lora.load_lora(tensors, known)
    # reForge gives the patches alone, the others also what they have not used.
    patches, unused = found if isinstance(found, tuple) else (found, ())
    if any(key.endswith(".dora_scale") for key in unused):
        raise MismatchError(
            f"{part.lora.path.name}: this WebUI applies no DoRA to a text encoder;"
            " set the text encoder to none, or use another file"
        )
    clip = clip.clone()
    # Forge tells patches apart by the names of files; reForge and Classic know no names.
    named = "filename" in signature(clip.patcher.add_patches).parameters
    name = {"filename": f"klora:{part.sha256}"} if named else {}
    clip.add_patches(patches=patches, strength_patch=part.strength, **name)
    return clip


def _lora_code() -> Any:
    """The host's module of LoRA code."""
    for name in ("backend.patcher.lora", "ldm_patched.modules.lora"):
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise KloraError("this WebUI keeps its LoRA code where K-LoRA does not look; tell K-LoRA's authors which it is")
