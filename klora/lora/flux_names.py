"""The modules of the FLUX transformer in diffusers, in its original code (LDM) and in XLabs' processors.

What the original code stores fused (q, k, v; in single blocks also the MLP's first layer) is several modules here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from klora.lora.unet_names import NUMBER, flat_table

_TOP_LDM = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
_TOP_FROM_LDM = {ldm.replace(".", "_"): name for name, ldm in _TOP_LDM.items()}
_TOP = flat_table([*_TOP_LDM, "norm_out.linear"])
# LDM leaf → diffusers leaves; several where the weight is fused, in the order of its rows.
_DOUBLE_LDM = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE_LDM = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_DOUBLE_XLABS = {
    "qkv_lora1": _DOUBLE_LDM["img_attn.qkv"],
    "qkv_lora2": _DOUBLE_LDM["txt_attn.qkv"],
    "proj_lora1": _DOUBLE_LDM["img_attn.proj"],
    "proj_lora2": _DOUBLE_LDM["txt_attn.proj"],
}
_SINGLE_XLABS = {"qkv_lora": _SINGLE_LDM["linear1"][:3], "proj_lora": _SINGLE_LDM["linear2"]}
_SLICES = ("q", "k", "v", "mlp")


class _Stack(NamedTuple):
    """One of FLUX's two stacks of blocks: its names in diffusers and in LDM."""

    stack: str
    ldm_stack: str
    leaves: dict[str, str]
    from_ldm: dict[str, tuple[str, ...]]
    to_ldm: dict[str, tuple[str, str | None]]


def _stack(stack: str, ldm_stack: str, ldm: dict[str, tuple[str, ...]], xlabs: dict[str, tuple[str, ...]]) -> _Stack:
    flat_ldm = {key.replace(".", "_"): leaves for key, leaves in ldm.items()}
    flat_ldm |= {f"processor_{key}": leaves for key, leaves in xlabs.items()}
    to_ldm = {
        leaf: (path, part if len(leaves) > 1 else None)
        for path, leaves in ldm.items()
        for leaf, part in zip(leaves, _SLICES, strict=False)
    }
    return _Stack(stack, ldm_stack, flat_table(to_ldm), flat_ldm, to_ldm)


_DOUBLE = _stack("transformer_blocks", "double_blocks", _DOUBLE_LDM, _DOUBLE_XLABS)
_SINGLE = _stack("single_transformer_blocks", "single_blocks", _SINGLE_LDM, _SINGLE_XLABS)


_BLOCK = re.compile(rf"(?:(single_)?transformer|(single|double))_blocks_{NUMBER}_(.+)")
_NAME = re.compile(rf"(single_)?transformer_blocks\.{NUMBER}\.(.+)")
_ORDER = {leaf: place for place, leaf in enumerate(dict.fromkeys(["norm.linear", *_DOUBLE.to_ldm, *_SINGLE.to_ldm]))}


def find(flat: str) -> list[tuple[str, str | None]]:
    """(diffusers name, slice or None) of a flattened name in any spelling; several where it names a fused weight."""
    if flat in _TOP or flat in _TOP_FROM_LDM:
        return [(_TOP.get(flat) or _TOP_FROM_LDM[flat], None)]
    match = _BLOCK.fullmatch(flat)
    if match is None:
        return []
    diffusers_single, ldm, number, rest = match.groups()
    names = _SINGLE if diffusers_single or ldm == "single" else _DOUBLE
    leaves: tuple[str, ...] = names.from_ldm.get(rest, ()) if ldm else ()
    if not ldm and (leaf := names.leaves.get(rest) or names.leaves.get(f"{rest}_0")):
        leaves = (leaf,)
    return [(f"{names.stack}.{number}.{leaf}", names.to_ldm[leaf][1]) for leaf in leaves]


def is_flux(name: str) -> bool:
    """True for canonical names of the FLUX transformer, False for those of a UNet or a text encoder."""
    return _NAME.fullmatch(name) is not None or name in _TOP.values()


def ldm_path(name: str) -> tuple[str, str | None] | None:
    """(path in the original code, slice or None) of a diffusers name, or None where it has no such module."""
    if match := _NAME.fullmatch(name):
        names = _SINGLE if match[1] else _DOUBLE
        found = names.to_ldm.get(match[3])
        return (f"{names.ldm_stack}.{match[2]}.{found[0]}", found[1]) if found else None
    return (_TOP_LDM[name], None) if name in _TOP_LDM else None


def order(name: str) -> tuple[int, ...]:
    """(block, place in it) of a name inside the blocks, in the order in which the network runs them; else nothing."""
    match = _NAME.fullmatch(name)
    return (int(match[2]), _ORDER.get(match[3], 0)) if match else ()
