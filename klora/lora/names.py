"""Every spelling of a module's name, brought to one: its path in diffusers.

A name is flattened first ('.' becomes '_'), because kohya's keys are flat already; a small grammar of containers and
a table of leaves then reads it. A UNet's blocks are counted the same way in all models (two layers a level), so the
map between diffusers and LDM (the original code, which the WebUIs keep) is arithmetic, not a list.

FLUX weights that its original code stores fused are split: `double_blocks.0.img_attn.qkv` is three modules here.
`final_layer.adaLN_modulation` is left unmatched: diffusers stores its rows in another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["attention", "linear", "conv"]

_N = "(0|[1-9][0-9]{0,2})"
_LONGEST = 300
_LAYERS = 2


@dataclass(frozen=True)
class Target:
    """One module that a file's prefix stands for.

    `name` is canonical; `slice` is "q", "k", "v" or "mlp" where the module is part of a weight that LDM stores fused;
    `fused` is True when the prefix itself names that fused weight, so that only the rows of `slice` are meant.
    """

    name: str
    slice: str | None = None
    fused: bool = False
    text_encoder: bool = False

    def rows(self, out: int, width: int) -> tuple[int, int]:
        """Rows [start, stop) of this target in the file's own (out, width) matrix."""
        return slice_rows(self.slice, out, width) if self.fused and self.slice else (0, out)


def slice_rows(part: str, out: int, width: int) -> tuple[int, int]:
    """Rows [start, stop) of q, k, v or mlp in a fused (out, width) weight.

    q, k and v are `width` rows each, mlp is the rest. Raises ValueError when the weight is too small for that.
    """
    first = "qkv".find(part)
    start, stop = (first * width, (first + 1) * width) if first >= 0 else (3 * width, out)
    if not 0 < stop - start <= out - start:
        raise ValueError(f"no {part} in a fused weight of {out} rows and {width} columns")
    return start, stop


# --- leaves ----------------------------------------------------------------------------------------------------------


def _flat(names: Iterable[str]) -> dict[str, str]:
    return {name.replace(".", "_"): name for name in names}


_ATTENTION = [f"{attn}.{leaf}" for attn in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
_TRANSFORMER = _flat([*_ATTENTION, "ff.net.0.proj", "ff.net.2"])
_RESNET = _flat(["conv1", "time_emb_proj", "conv2", "conv_shortcut"])
_ATTENTIONS = _flat(["proj_in", "proj_out"])
_UNET_TOP = _flat(
    [
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "time_embedding.cond_proj",
        "add_embedding.linear_1",
        "add_embedding.linear_2",
        "conv_in",
        "conv_out",
    ]
)
_UNET_TOP_LDM = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
_RESNET_LDM = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_FLUX_TOP_LDM = {
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
_FLUX_TOP = _flat([*_FLUX_TOP_LDM, "norm_out.linear"])
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

_CLIP = _flat([*(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"])
_CLIP |= {f"self_attn_to_{p}_lora": f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")}
_T5_FF = [f"DenseReluDense.{leaf}" for leaf in ("wi", "wi_0", "wi_1", "wo")]
_T5 = _flat([*(f"SelfAttention.{leaf}" for leaf in "qkvo"), *_T5_FF])


class _FluxNames(NamedTuple):
    """One of FLUX's two stacks of blocks: its names in diffusers and in LDM."""

    stack: str
    ldm_stack: str
    leaves: dict[str, str]
    from_ldm: dict[str, tuple[str, ...]]
    to_ldm: dict[str, tuple[str, str | None]]


def _flux_names(
    stack: str, ldm_stack: str, ldm: dict[str, tuple[str, ...]], xlabs: dict[str, tuple[str, ...]]
) -> _FluxNames:
    flat_ldm = {key.replace(".", "_"): leaves for key, leaves in ldm.items()}
    flat_ldm |= {f"processor_{key}": leaves for key, leaves in xlabs.items()}
    to_ldm = {
        leaf: (path, part if len(leaves) > 1 else None)
        for path, leaves in ldm.items()
        for leaf, part in zip(leaves, _SLICES, strict=False)
    }
    return _FluxNames(stack, ldm_stack, _flat(to_ldm), flat_ldm, to_ldm)


_DOUBLE = _flux_names("transformer_blocks", "double_blocks", _DOUBLE_LDM, _DOUBLE_XLABS)
_SINGLE = _flux_names("single_transformer_blocks", "single_blocks", _SINGLE_LDM, _SINGLE_XLABS)


# --- the UNet --------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a module sits in a UNet: a level's side ("down", "mid", "up"), what is there, and the leaf inside."""

    side: str
    level: int
    what: str
    number: int
    layer: int | None
    leaf: str

    @property
    def name(self) -> str:
        block = "mid_block" if self.side == "mid" else f"{self.side}_blocks.{self.level}"
        layer = "" if self.layer is None else f".transformer_blocks.{self.layer}"
        return f"{block}.{self.what}.{self.number}{layer}.{self.leaf}"


_UNET = re.compile(
    rf"(?:(down|up)_blocks_{_N}|mid_block)_(resnets|attentions|downsamplers|upsamplers)_{_N}_"
    rf"(?:transformer_blocks_{_N}_)?(.+)"
)
_UNET_LDM = re.compile(
    rf"(?:(?:(in|out)put_blocks_{_N}_([0-2]))|middle_block_([0-2]))_(?:transformer_blocks_{_N}_)?(.+)"
)
_PROCESSOR = re.compile(r"(attn[12])_processor_to_(q|k|v|out)_lora")


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _leaf(what: str, layer: int | None, flat: str) -> str | None:
    """The leaf as diffusers writes it, or None where such a container has no such leaf."""
    if what in ("downsamplers", "upsamplers"):
        return "conv" if flat == "conv" and layer is None else None
    if what == "resnets":
        return _RESNET.get(flat) if layer is None else None
    if layer is None:
        return _ATTENTIONS.get(flat)
    flat = _PROCESSOR.sub(r"\1_to_\2", flat)
    return _TRANSFORMER.get(flat) or _TRANSFORMER.get(f"{flat}_0")


def _unet_place(flat: str) -> _Place | None:
    match = _UNET.fullmatch(flat)
    if match is None:
        return None
    side, level, what, index, layer, rest = match.groups()
    leaf = _leaf(what, _number(layer), rest)
    return _Place(side or "mid", int(level or 0), what, int(index), _number(layer), leaf) if leaf else None


def _unet_place_from_ldm(flat: str) -> _Place | None:
    match = _UNET_LDM.fullmatch(flat)
    if match is None:
        return None
    side, number, beside, middle, layer_text, rest = match.groups()
    layer = _number(layer_text)
    if side is None:
        found = (("resnets", 0), ("attentions", 0), ("resnets", 1))[int(middle)]
        return _ldm_place("mid", 0, *found, layer, rest)
    if side == "in":
        return _down_place(int(number), int(beside), layer, rest)
    return _up_place(int(number), int(beside), layer, rest)


def _down_place(number: int, beside: int, layer: int | None, rest: str) -> _Place | None:
    # input_blocks.0 is conv_in; every level then takes its layers and one downsampler.
    level, index = divmod(number - 1, _LAYERS + 1)
    if number == 0 or beside > 1:
        return None
    if index == _LAYERS:
        return _Place("down", level, "downsamplers", 0, None, "conv") if (beside, rest) == (0, "op") else None
    return _ldm_place("down", level, "attentions" if beside else "resnets", index, layer, rest)


def _up_place(number: int, beside: int, layer: int | None, rest: str) -> _Place | None:
    # The way up has one layer more than the way down; the upsampler sits behind the last, after its attention if any.
    level, index = divmod(number, _LAYERS + 1)
    if beside and rest == "conv" and layer is None:
        return _Place("up", level, "upsamplers", 0, None, "conv") if index == _LAYERS else None
    if beside > 1:
        return None
    return _ldm_place("up", level, "attentions" if beside else "resnets", index, layer, rest)


def _ldm_place(side: str, level: int, what: str, index: int, layer: int | None, rest: str) -> _Place | None:
    leaf = _leaf(what, layer, _RESNET_FROM_LDM.get(rest, "") if what == "resnets" else rest)
    return _Place(side, level, what, index, layer, leaf) if leaf else None


_RESNET_FROM_LDM = {ldm.replace(".", "_"): name for name, ldm in _RESNET_LDM.items()}
_UNET_TOP_FROM_LDM = {ldm.replace(".", "_"): name for name, ldm in _UNET_TOP_LDM.items()}
_FLUX_TOP_FROM_LDM = {ldm.replace(".", "_"): name for name, ldm in _FLUX_TOP_LDM.items()}


def _ldm_paths(place: _Place) -> tuple[str, ...]:
    if place.what in ("downsamplers", "upsamplers"):
        return _ldm_sampler(place)
    per_level = _LAYERS + 1
    container = {
        "down": f"input_blocks.{place.level * per_level + place.number + 1}",
        "mid": "middle_block",
        "up": f"output_blocks.{place.level * per_level + place.number}",
    }[place.side]
    attentions = place.what == "attentions"
    if place.number >= (2 if place.side != "up" else per_level) or (
        place.side == "mid" and attentions and place.number
    ):
        return ()
    beside = 1 if attentions else 0 if place.side != "mid" else 2 * place.number
    layer = "" if place.layer is None else f".transformer_blocks.{place.layer}"
    leaf = place.leaf if attentions else _RESNET_LDM[place.leaf]
    return (f"{container}.{beside}{layer}.{leaf}",)


def _ldm_sampler(place: _Place) -> tuple[str, ...]:
    last = place.level * (_LAYERS + 1) + _LAYERS
    if place.side == "down":
        return (f"input_blocks.{last + 1}.0.op",)
    if place.side == "up":
        # SD1 and SD2 have no attention in their first up block; SDXL has.
        return tuple(f"output_blocks.{last}.{beside}.conv" for beside in ((1, 2) if place.level == 0 else (2,)))
    return ()


# --- FLUX and text encoders ------------------------------------------------------------------------------------------

_FLUX_BLOCK = re.compile(rf"(single_)?(?:(transformer)_|double_)?blocks_{_N}_(.+)")


def _flux(flat: str) -> tuple[Target, ...] | None:
    match = _FLUX_BLOCK.fullmatch(flat)
    if match is None:
        return None
    single, diffusers, number, rest = match.groups()
    names = _SINGLE if single else _DOUBLE
    if diffusers:
        leaf = names.leaves.get(rest) or names.leaves.get(f"{rest}_0")
        leaves: tuple[str, ...] = (leaf,) if leaf else ()
    else:
        leaves = names.from_ldm.get(rest, ())
    fused = len(leaves) > 1
    paths = ((f"{names.stack}.{number}.{leaf}", names.to_ldm[leaf][1]) for leaf in leaves)
    return tuple(Target(path, part, fused) for path, part in paths) or None


_TEXT_PREFIX = re.compile(
    r"(?:lora_te([123]?)|text_encoder(_[23])?|text_encoders_(clip_l|clip_g|t5xxl)(?:_transformer)?)_(?:text_model_)?(.+)"
)
_CLIP_LAYER = re.compile(rf"encoder_layers_{_N}_(.+)")
_T5_LAYER = re.compile(rf"encoder_block_{_N}_layer_{_N}_(.+)")


def _text(flat: str) -> Target | None:
    match = _TEXT_PREFIX.fullmatch(flat)
    if match is None:
        return None
    kohya, diffusers, comfy, rest = match.groups()
    number = kohya or (diffusers or "").strip("_") or {"clip_g": "2", "t5xxl": "2"}.get(comfy or "", "1")
    if layer := _CLIP_LAYER.fullmatch(rest):
        leaf = _CLIP.get(layer[2])
        path = leaf and number != "3" and f"text_model.encoder.layers.{layer[1]}.{leaf}"
    elif layer := _T5_LAYER.fullmatch(rest):
        # Only FLUX's second encoder is a T5; kohya numbers it 3, as in SD3.
        leaf, number = _T5.get(layer[3]), "2"
        path = leaf and f"encoder.block.{layer[1]}.layer.{layer[2]}.{leaf}"
    else:
        path = "text_projection" if (rest, number) == ("text_projection", "2") else None
    root = "text_encoder_2" if number == "2" else "text_encoder"
    return Target(f"{root}.{path}", text_encoder=True) if path else None


# --- the public functions --------------------------------------------------------------------------------------------

_PREFIXES = (
    "base_model_model_",
    "model_diffusion_model_",
    "diffusion_model_",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "unet_",
    "transformer_",
)


def resolve(prefix: str) -> tuple[Target, ...] | None:
    """Canonical target(s) of a file's own key prefix, in any spelling; None when it is not understood.

    Several targets mean that the file's weight is fused; each then has its `slice`.
    """
    flat = prefix.replace(".", "_")
    if len(flat) > _LONGEST:
        return None
    # A wrapper may stand before another ("base_model.model.unet.…", "unet.unet.…"), seldom more than two.
    for _ in range(4):
        if targets := _resolve_flat(flat):
            return targets
        stripped = next((flat[len(p) :] for p in _PREFIXES if flat.startswith(p)), None)
        if stripped is None:
            return None
        flat = stripped
    return None


def _resolve_flat(flat: str) -> tuple[Target, ...] | None:
    if place := _unet_place(flat) or _unet_place_from_ldm(flat):
        return (Target(place.name),)
    if targets := _flux(flat):
        return targets
    for table in (_UNET_TOP, _UNET_TOP_FROM_LDM, _FLUX_TOP, _FLUX_TOP_FROM_LDM):
        if flat in table:
            return (Target(table[flat]),)
    text = _text(flat)
    return (text,) if text else None


def is_flux(name: str) -> bool:
    """True for canonical names of the FLUX transformer, False for those of a UNet or a text encoder."""
    return name.startswith(("transformer_blocks.", "single_transformer_blocks.")) or name in _FLUX_TOP.values()


def slice_of(name: str) -> str | None:
    """Which part ("q", "k", "v", "mlp") of a weight that LDM stores fused the canonical module is; None if whole."""
    names = ldm_name(name) if is_flux(name) else None
    return names[1] if names else None


def kind_of(name: str) -> Kind:
    """What a canonical module is, for the scope of the selection.

    "attention": q, k, v and output projections of attention (FLUX: both streams; q, k, v of single blocks); "conv":
    the convolutions of resnets, samplers, input and output; "linear": everything else, also a projection that SD1
    stores as a 1×1 convolution.
    """
    if re.search(r"(?:^|\.)(?:attn[12]?|self_attn|SelfAttention)\.\w+", name):
        return "attention"
    last = name.rsplit(".", 1)[-1]
    return "conv" if last in ("conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out") else "linear"


def kernel_of(name: str) -> int:
    """Side of the kernel of a canonical module: 3 for the large convolutions of a UNet, 1 for all else."""
    return 3 if kind_of(name) == "conv" and not name.endswith(".conv_shortcut") else 1


def ldm_names(name: str) -> tuple[tuple[str, str | None], ...]:
    """(path under `diffusion_model` in LDM, slice or None) of a canonical module: the A1111 and Forge module names.

    More than one where models differ (the first upsampler); empty where LDM has no such module.
    """
    flat = name.replace(".", "_")
    if place := _unet_place(flat):
        return tuple((path, None) for path in _ldm_paths(place))
    if match := re.fullmatch(rf"(single_)?transformer_blocks\.{_N}\.(.+)", name):
        names = _SINGLE if match[1] else _DOUBLE
        found = names.to_ldm.get(match[3])
        return ((f"{names.ldm_stack}.{match[2]}.{found[0]}", found[1]),) if found else ()
    path = _UNET_TOP_LDM.get(name) or _FLUX_TOP_LDM.get(name)
    return ((path, None),) if path else ()


def ldm_name(name: str) -> tuple[str, str | None] | None:
    """The first of `ldm_names`, or None."""
    return next(iter(ldm_names(name)), None)


def block_of(name: str) -> str:
    """The part of the network that a module belongs to, for reports: "down_blocks.1", "mid_block", "conv_in" …"""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first in ("down_blocks", "up_blocks") and rest else first


_TOP_ORDER = (
    "time_embedding",
    "add_embedding",
    "conv_in",
    "time_text_embed",
    "context_embedder",
    "x_embedder",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "norm_out",
    "proj_out",
    "conv_out",
    "text_encoder",
    "text_encoder_2",
)
_UNET_ORDER = {leaf: place for place, leaf in enumerate([*_RESNET.values(), "proj_in", *_TRANSFORMER.values()])}
_FLUX_ORDER = {
    leaf: place for place, leaf in enumerate(dict.fromkeys(["norm.linear", *_DOUBLE.to_ldm, *_SINGLE.to_ldm]))
}


def sort_key(name: str) -> tuple[int, int, int, int, int, int, str]:
    """Sorts names in the order in which the network runs them, numbers as numbers; unknown names go last."""
    first, _, rest = name.partition(".")
    top = _TOP_ORDER.index(first) if first in _TOP_ORDER else len(_TOP_ORDER)
    if place := _unet_place(name.replace(".", "_")):
        # A resnet runs before the attention of its index; the resnet after the attention in the middle is number 1.
        samplers = place.what in ("downsamplers", "upsamplers")
        index, beside = (99, 0) if samplers else (place.number, int(place.what == "attentions"))
        layer = 99 if place.leaf == "proj_out" else -1 if place.layer is None else place.layer
        return (top, place.level, index, beside, layer, _UNET_ORDER.get(place.leaf, 0), name)
    number, _, leaf = rest.partition(".")
    if number.isdecimal() and len(number) < 4:
        return (top, int(number), 0, 0, 0, _FLUX_ORDER.get(leaf, 0), name)
    layers = re.findall(r"\.([0-9]{1,3})\.", name) if first.startswith("text_encoder") else []
    return (top, int(layers[0]) if layers else 0, int(layers[1]) if len(layers) > 1 else 0, 0, 0, 0, name)
