"""Small random LoRA files in every spelling and family, written without any help from klora.

    shapes = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (32, 32)}
    path = write_lora(tmp_path / "cat.safetensors", shapes, spelling="peft", rank=4, alpha=2.0)

`shapes` maps canonical names (diffusers module paths, text encoders as `text_encoder.…`) to weight shapes
(out, in) or (out, in, kh, kw). Where a spelling stores q, k, v (and mlp) as one tensor, `shapes` must have all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

UNET_SPELLINGS = (
    "kohya",
    "ldm",
    "diffusers",
    "diffusers-linear-layer",
    "peft",
    "peft-adapter",
    "unet.unet",
    "wrapper",
    "bare",
    "processor",
    "generic",
    "generic-diffusers",
)
FLUX_SPELLINGS = (
    "flux-kohya",
    "flux-kohya-diffusers",
    "diffusers",
    "peft",
    "peft-adapter",
    "wrapper",
    "bare",
    "generic",
    "xlabs",
)
FAMILIES = (
    "lora",
    "lora-cp",
    "dora",
    "dora-in",
    "loha",
    "loha-cp",
    "lokr",
    "lokr-ab",
    "lokr-full",
    "lokr-cp",
    "full",
)

_FLUX_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
}
_XLABS_DOUBLE = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
}
_PARTS = {"to_q": 0, "add_q_proj": 0, "to_k": 1, "add_k_proj": 1, "to_v": 2, "add_v_proj": 2, "proj_mlp": 3}


def is_flux(name: str) -> bool:
    """True for the module names of FluxTransformer2DModel."""
    return name in _FLUX_TOP or name == "norm_out.linear" or "transformer_blocks" in name.split(".")[0]


def flux_ldm(name: str) -> str | None:
    """The name in Black Forest Labs' own code; one name for the parts of a fused weight."""
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name):
        return f"double_blocks.{match[1]}.{_FLUX_DOUBLE[match[2]]}"
    if match := re.fullmatch(r"single_transformer_blocks\.(\d+)\.(.+)", name):
        return f"single_blocks.{match[1]}.{_FLUX_SINGLE[match[2]]}"
    return _FLUX_TOP.get(name)


def unet_ldm_table(levels: int) -> dict[str, str]:
    """LDM path of every diffusers container of a UNet with `levels` levels of two layers each (SD1: 4, SDXL: 3)."""
    table = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    place = 1
    for level in range(levels):
        for layer in range(2):
            table[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{place}.0"
            table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += 1
    place = 0
    for level in range(levels):
        for layer in range(3):
            table[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{place}.0"
            table[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{place}.1"
            place += 1
        # SD1 and SD2 have no attention in their first up block, so its upsampler moves up one place.
        beside = 1 if levels == 4 and level == 0 else 2
        table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{beside}.conv"
    return table


_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_ldm(name: str, levels: int) -> str:
    """LDM path of one diffusers UNet module."""
    table = unet_ldm_table(levels)
    if name in table:
        return table[name]
    match = re.fullmatch(r"(\w+(?:\.\d)?\.(?:resnets|attentions)\.\d)\.(.+)", name)
    if match is None or match[1] not in table:
        raise ValueError(f"LDM has no {name}")
    leaf = _RESNET[match[2]] if "resnets" in match[1] else match[2]
    return f"{table[match[1]]}.{leaf}"


def fused_prefix(name: str, spelling: str, levels: int = 3) -> str:
    """The file's own key prefix of `name`; the parts of a fused weight share one."""
    flat = name.replace(".", "_")
    if name.startswith("text_encoder"):
        return _text_prefix(name, spelling)
    flux = is_flux(name)
    ldm = flux_ldm(name) if flux else None
    if flux and spelling in ("flux-kohya", "kohya", "generic", "xlabs") and ldm is None:
        raise ValueError(f"no {spelling} spelling of {name}")
    if spelling == "xlabs":
        return _xlabs(str(ldm))
    if flux and spelling in ("flux-kohya", "kohya"):
        return "lora_unet_" + str(ldm).replace(".", "_")
    root = "transformer" if flux else "unet"
    if spelling == "processor" and re.search(r"\.attn\d\.to_", name):
        stem, leaf = name.split(".to_")
        return f"unet.{stem}.processor.to_{leaf.removesuffix('.0')}_lora"
    if spelling == "ldm":
        return "lora_unet_" + unet_ldm(name, levels).replace(".", "_")
    if spelling == "generic":
        return "diffusion_model." + (str(ldm) if flux else unet_ldm(name, levels))
    return {
        "kohya": "lora_unet_" + flat,
        "flux-kohya-diffusers": "lora_transformer_" + flat,
        "unet.unet": f"unet.unet.{name}",
        "wrapper": f"base_model.model.{name}",
        "bare": name,
        "generic-diffusers": f"diffusion_model.{name}",
    }.get(spelling, f"{root}.{name}")


def _xlabs(ldm: str) -> str:
    block, number, leaf = [*ldm.split(".", 2), "", ""][:3]
    if block == "double_blocks" and leaf in _XLABS_DOUBLE:
        return f"{block}.{number}.{_XLABS_DOUBLE[leaf]}"
    if block == "single_blocks" and leaf in ("linear1", "linear2"):
        return f"{block}.{number}.processor.{'qkv' if leaf == 'linear1' else 'proj'}_lora"
    raise ValueError(f"no xlabs spelling of {ldm}")


def _text_prefix(name: str, spelling: str) -> str:
    encoder, path = name.split(".", 1)
    if spelling in ("kohya", "ldm", "flux-kohya", "flux-kohya-diffusers"):
        return ("lora_te2_" if encoder.endswith("_2") else "lora_te1_") + path.replace(".", "_")
    if spelling == "processor" and "self_attn" in path:
        legacy = re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1_lora", path)
        return f"{encoder}.{legacy}"
    return name


def slots(spelling: str) -> tuple[str, str]:
    """Endings of the down and up tensors of one spelling, with their leading dot."""
    if spelling in ("kohya", "ldm", "flux-kohya", "flux-kohya-diffusers"):
        return ".lora_down.weight", ".lora_up.weight"
    if spelling == "diffusers":
        return ".lora.down.weight", ".lora.up.weight"
    if spelling == "diffusers-linear-layer":
        return ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
    if spelling in ("processor", "xlabs"):
        return ".down.weight", ".up.weight"
    if spelling in ("peft-adapter", "wrapper"):
        return ".lora_A.default.weight", ".lora_B.default.weight"
    return ".lora_A.weight", ".lora_B.weight"


def write_lora(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    spelling: str = "kohya",
    family: str = "lora",
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    alpha: float | None = None,
    strength: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a random file and return its path; `strength` is the standard deviation of the entries of the up side."""
    tensors = lora_tensors(shapes, spelling, family, rank, seed, alpha, strength)
    stored = {key: t if key.endswith(".alpha") else t.to(dtype) for key, t in tensors.items()}
    save_file({key: t.contiguous() for key, t in stored.items()}, str(path), metadata=dict(metadata or {}))
    return Path(path)


def lora_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    spelling: str = "kohya",
    family: str = "lora",
    rank: int = 4,
    seed: int = 0,
    alpha: float | None = None,
    strength: float = 1.0,
) -> dict[str, torch.Tensor]:
    """The fp32 tensors of `write_lora`, by full key."""
    if spelling not in {*UNET_SPELLINGS, *FLUX_SPELLINGS}:
        raise ValueError(f"unknown spelling {spelling}")
    levels = 4 if any(name.startswith(("down_blocks.3", "up_blocks.3")) for name in shapes) else 3
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for prefix, shape in _fuse(shapes, spelling, levels).items():
        module = _module(family, shape, rank, generator, strength)
        down, up = slots(spelling)
        for slot, tensor in module.items():
            ending = {"down": down, "up": up, "mid": ".lora_mid.weight"}.get(slot, f".{slot}")
            if slot == "dora_scale" and ".lora_A" in down:
                ending, tensor = (
                    down.replace("lora_A", "lora_magnitude_vector").removesuffix(".weight"),
                    tensor.flatten(),
                )
            tensors[prefix + ending] = tensor
        if alpha is not None and family != "full":
            tensors[f"{prefix}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _fuse(shapes: Mapping[str, tuple[int, ...]], spelling: str, levels: int) -> dict[str, tuple[int, ...]]:
    parts: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        prefix = fused_prefix(name, spelling, levels)
        part = _PARTS.get(name.split(".")[-1], 0) if re.search(r"qkv|linear1$", prefix) else 0
        if prefix.endswith("processor.qkv_lora") and part == 3:
            continue  # XLabs trains q, k and v of a single block's linear1 only
        parts.setdefault(prefix, {})[part] = shape
    fused: dict[str, tuple[int, ...]] = {}
    for prefix, found in parts.items():
        need = 4 if prefix.endswith("linear1") else 3 if "qkv" in prefix else 1
        if sorted(found) != list(range(need)):
            raise ValueError(f"{prefix} needs all {need} parts, has {sorted(found)}")
        fused[prefix] = (sum(shape[0] for shape in found.values()), *found[0][1:])
    return fused


def _module(
    family: str, shape: tuple[int, ...], rank: int, generator: torch.Generator, strength: float
) -> dict[str, torch.Tensor]:
    def draw(*size: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * std

    out, inner, *kernel = shape
    ones = [1] * len(kernel)
    flat = inner * int(torch.tensor(kernel or [1]).prod())
    if family in ("lora", "dora", "dora-in") or (family == "lora-cp" and not kernel):
        factors = {"down": draw(rank, inner, *kernel, std=flat**-0.5), "up": draw(out, rank, *ones, std=strength)}
        if family == "dora":
            factors["dora_scale"] = draw(out, 1, *ones).abs() + 0.5
        if family == "dora-in":
            factors["dora_scale"] = draw(1, inner, *ones).abs() + 0.5
        return factors
    if family == "lora-cp":
        down, mid = draw(rank, inner, *ones, std=inner**-0.5), draw(rank, rank, *kernel, std=0.5)
        return {"down": down, "mid": mid, "up": draw(out, rank, *ones, std=strength)}
    if family.startswith("loha"):
        return _loha(family, out, inner, flat, kernel, rank, draw, strength)
    if family.startswith("lokr"):
        return _lokr(family, out, inner, kernel, rank, draw, strength)
    if family == "full":
        return {"diff": draw(*shape, std=strength * flat**-0.5)}
    raise ValueError(f"unknown family {family}")


def _loha(family, out, inner, flat, kernel, rank, draw, strength):  # type: ignore[no-untyped-def]
    if family == "loha-cp" and kernel:
        return {
            "hada_t1": draw(rank, rank, *kernel, std=0.5),
            "hada_w1_a": draw(rank, out, std=strength),
            "hada_w1_b": draw(rank, inner, std=inner**-0.5),
            "hada_t2": draw(rank, rank, *kernel, std=0.5),
            "hada_w2_a": draw(rank, out),
            "hada_w2_b": draw(rank, inner, std=inner**-0.5),
        }
    return {
        "hada_w1_a": draw(out, rank, std=strength),
        "hada_w1_b": draw(rank, flat, std=flat**-0.5),
        "hada_w2_a": draw(out, rank),
        "hada_w2_b": draw(rank, flat, std=flat**-0.5),
    }


def _lokr(family, out, inner, kernel, rank, draw, strength):  # type: ignore[no-untyped-def]
    # The largest small factor of both sides makes the first Kronecker factor; the second takes the kernel.
    a, b = (next(f for f in (4, 3, 2, 1) if size % f == 0) for size in (out, inner))
    c, d = out // a, inner // b
    flat = d * int(torch.tensor(kernel or [1]).prod())
    first = {"lokr_w1": draw(a, b, std=strength)}
    if family == "lokr-ab":
        first = {"lokr_w1_a": draw(a, rank, std=strength), "lokr_w1_b": draw(rank, b)}
    if family == "lokr-full":
        return {**first, "lokr_w2": draw(c, d, *kernel, std=flat**-0.5)}
    if family == "lokr-cp" and kernel:
        cores = {"lokr_t2": draw(rank, rank, *kernel, std=0.5)}
        return {**first, **cores, "lokr_w2_a": draw(rank, c), "lokr_w2_b": draw(rank, d, std=d**-0.5)}
    return {**first, "lokr_w2_a": draw(c, rank), "lokr_w2_b": draw(rank, flat, std=flat**-0.5)}
