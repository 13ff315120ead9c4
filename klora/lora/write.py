"""LoRA files are written: canonical names and factors become tensors under the keys that other programs read."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial

import torch
from torch import Tensor

from klora.lora.deltas.computed import FactorDelta
from klora.lora.flux_names import ldm_path
from klora.lora.names import is_flux

_FUSED = ("q", "k", "v", "mlp")


def file_tensors(
    deltas: Mapping[str, FactorDelta],
    spelling: str,
    kernels: Container[str],
    dtype: torch.dtype,
    flux: bool = False,
    prefixes: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file by key: of `deltas` by canonical name, those of text encoders too.

    kohya: `lora_unet_….lora_down.weight`, for FLUX (`flux`, since other models share its names) with q, k and v in one
    tensor as its original code has them;
    diffusers: `unet.….lora_A.weight`, `transformer.…` for FLUX. Those with a key in `kernels` get the four
    dimensions of a convolution. Scales are in the factors and no alpha is written, which means alpha = rank
    everywhere: diffusers loses the alphas of kohya's attention where the modules' ranks differ. `prefixes` are the
    whole keys of modules that no rule names, by name; in kohya's spelling these have an alpha, which is the rank, since
    diffusers loads Wan's not without.
    """
    write = partial(_kohya, flux=flux) if spelling == "kohya" else _diffusers
    found = write(deltas, kernels, prefixes or {})
    tensors: dict[str, Tensor] = {}
    for key, (up, down) in found.items():
        names = ("lora_up", "lora_down") if spelling == "kohya" else ("lora_B", "lora_A")
        for name, tensor in zip(names, (up, down), strict=True):
            tensors[f"{key}.{name}.weight"] = tensor.to(dtype).contiguous()
        if prefixes and spelling == "kohya":
            tensors[f"{key}.alpha"] = torch.tensor(float(len(down)), dtype=torch.float32, device="cpu")
    return tensors


def _diffusers(
    deltas: Mapping[str, FactorDelta], kernels: Container[str], prefixes: Mapping[str, str]
) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        prefixes.get(name) or _rooted(name): _factors(delta, delta.key in kernels) for name, delta in deltas.items()
    }


def _rooted(name: str) -> str:
    return f"{'' if name.startswith('text_encoder') else 'transformer.' if is_flux(name) else 'unet.'}{name}"


def _kohya(
    deltas: Mapping[str, FactorDelta], kernels: Container[str], prefixes: Mapping[str, str], flux: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    fused: dict[str, dict[str, FactorDelta]] = {}
    several = any(is_flux(name) or name.startswith("text_encoder_2") for name in deltas)
    for name, delta in deltas.items():
        path, part = (ldm_path(name) if flux and is_flux(name) else None) or (name, None)
        if part:
            fused.setdefault(path, {})[part] = delta
        else:
            found[prefixes.get(name) or _kohya_key(path, several)] = _factors(delta, delta.key in kernels)
    for path, parts in fused.items():
        found[_kohya_key(path, several)] = _fuse(path, parts)
    return found


def _kohya_key(path: str, several: bool) -> str:
    """The key of a path, for a model with one text encoder or `several`."""
    root, _, rest = path.partition(".")
    if not root.startswith("text_encoder"):
        return f"lora_unet_{path.replace('.', '_')}"
    # T5, FLUX's second, is kohya's third.
    second = "3" if rest.startswith("encoder.block.") else "2"
    number = second if root == "text_encoder_2" else "1" if several else ""
    return f"lora_te{number}_{rest.replace('.', '_')}"


def _factors(delta: FactorDelta, kernel: bool) -> tuple[Tensor, Tensor]:
    """up (out, r) and down (r, in), or with the kernel of a convolution (out, r, 1, 1) and (r, in, *kernel)."""
    up, down = _balanced(delta)
    if not kernel and len(delta.shape) == 2:
        return up, down
    sides = delta.shape[2:] or (1, 1)
    return up.reshape(*up.shape, *(1 for _ in sides)), down.reshape(len(down), delta.shape[1], *sides)


def _balanced(delta: FactorDelta) -> tuple[Tensor, Tensor]:
    """up (out, r) and down (r, in·kh·kw), scale included, of like size, so that neither leaves the range of fp16."""
    up, down = delta.up * delta.scale, delta.down.reshape(delta.rank, -1)
    size_up, size_down = float(up.norm()), float(down.norm())
    share = (size_down / size_up) ** 0.5 if size_up and size_down else 1.0
    return up * share, down / share


def _fuse(path: str, parts: Mapping[str, FactorDelta]) -> tuple[Tensor, Tensor]:
    """One (up, down) of those of q, k, v (and mlp): their rows below one another, each with units of its own."""
    width = next(iter(parts.values())).columns
    # q, k and v are as wide as the input; the mlp of a single block is four times that in every FLUX.
    order = _FUSED if path.endswith("linear1") else _FUSED[:3]
    ups, downs = [], []
    for part in order:
        if part in parts:
            up, down = _balanced(parts[part])
            ups.append(up)
            downs.append(down)
        else:
            ups.append(torch.zeros(4 * width if part == "mlp" else width, 0, dtype=torch.float32, device="cpu"))
    return torch.block_diag(*ups), torch.cat(downs)
