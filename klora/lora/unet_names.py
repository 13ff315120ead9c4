"""The modules of a UNet: where one sits, read from its flattened diffusers or LDM name, and written as either.

All UNets of the family count their blocks the same way (two layers a level), so the map is arithmetic, not a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

NUMBER = "(0|[1-9][0-9]{0,2})"
_LAYERS = 2


def flat_table(names: Iterable[str]) -> dict[str, str]:
    """Flattened name → name."""
    return {name.replace(".", "_"): name for name in names}


_ATTENTION = [f"{attn}.{leaf}" for attn in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
_TRANSFORMER = flat_table([*_ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"])
_RESNET = flat_table(["conv1", "time_emb_proj", "conv2", "conv_shortcut", "norm1", "norm2"])
_ATTENTIONS = flat_table(["proj_in", "proj_out", "norm"])
_TOP = flat_table(
    [
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "time_embedding.cond_proj",
        "add_embedding.linear_1",
        "add_embedding.linear_2",
        "conv_in",
        "conv_norm_out",
        "conv_out",
    ]
)
_TOP_LDM = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET_LDM = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}


class Position(NamedTuple):
    """Where a module sits in a UNet: a level's side ("down", "mid", "up"), what is there, and the leaf inside."""

    side: str
    level: int
    what: str
    number: int
    layer: int | None
    leaf: str

    @property
    def name(self) -> str:
        """The diffusers name."""
        block = "mid_block" if self.side == "mid" else f"{self.side}_blocks.{self.level}"
        layer = "" if self.layer is None else f".transformer_blocks.{self.layer}"
        return f"{block}.{self.what}.{self.number}{layer}.{self.leaf}"


_UNET = re.compile(
    rf"(?:(down|up)_blocks_{NUMBER}|mid_block)_(resnets|attentions|downsamplers|upsamplers)_{NUMBER}_"
    rf"(?:transformer_blocks_{NUMBER}_)?(.+)"
)
_LDM = re.compile(
    rf"(?:(?:(in|out)put_blocks_{NUMBER}_([0-2]))|middle_block_([0-2]))_(?:transformer_blocks_{NUMBER}_)?(.+)"
)
_PROCESSOR = re.compile(r"(attn[12])_processor_to_(q|k|v|out)(?:_lora)?")


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


def position_of(flat: str) -> Position | None:
    """Read a flattened diffusers name inside the blocks; None for any other."""
    match = _UNET.fullmatch(flat)
    if match is None:
        return None
    side, level, what, index, layer, rest = match.groups()
    leaf = _leaf(what, _number(layer), rest)
    return Position(side or "mid", int(level or 0), what, int(index), _number(layer), leaf) if leaf else None


def _from_ldm(flat: str) -> Position | None:
    match = _LDM.fullmatch(flat)
    if match is None:
        return None
    side, number, beside, middle, layer_text, rest = match.groups()
    layer = _number(layer_text)
    if side is None:
        found = (("resnets", 0), ("attentions", 0), ("resnets", 1))[int(middle)]
        return _ldm_position("mid", 0, *found, layer, rest)
    if side == "in":
        return _down_position(int(number), int(beside), layer, rest)
    return _up_position(int(number), int(beside), layer, rest)


def _down_position(number: int, beside: int, layer: int | None, rest: str) -> Position | None:
    # input_blocks.0 is conv_in; every level then takes its layers and one downsampler.
    level, index = divmod(number - 1, _LAYERS + 1)
    if number == 0 or beside > 1:
        return None
    if index == _LAYERS:
        return Position("down", level, "downsamplers", 0, None, "conv") if (beside, rest) == (0, "op") else None
    return _ldm_position("down", level, "attentions" if beside else "resnets", index, layer, rest)


def _up_position(number: int, beside: int, layer: int | None, rest: str) -> Position | None:
    # The way up has one layer more than the way down; the upsampler sits behind the last, after its attention if any.
    level, index = divmod(number, _LAYERS + 1)
    if beside and rest == "conv" and layer is None:
        return Position("up", level, "upsamplers", 0, None, "conv") if index == _LAYERS else None
    if beside > 1:
        return None
    return _ldm_position("up", level, "attentions" if beside else "resnets", index, layer, rest)


def _ldm_position(side: str, level: int, what: str, index: int, layer: int | None, rest: str) -> Position | None:
    leaf = _leaf(what, layer, _RESNET_FROM_LDM.get(rest, "") if what == "resnets" else rest)
    return Position(side, level, what, index, layer, leaf) if leaf else None


_RESNET_FROM_LDM = {ldm.replace(".", "_"): name for name, ldm in _RESNET_LDM.items()}
_TOP_FROM_LDM = {ldm.replace(".", "_"): name for name, ldm in _TOP_LDM.items()}


def find(flat: str) -> str | None:
    """The diffusers name of a flattened diffusers or LDM name, or None."""
    if position := position_of(flat) or _from_ldm(flat):
        return position.name
    return _TOP.get(flat) or _TOP_FROM_LDM.get(flat)


def ldm_paths(name: str) -> tuple[str, ...]:
    """The LDM path(s) of a diffusers name; two for the first upsampler, none where LDM has no such module."""
    if position := position_of(name.replace(".", "_")):
        return _ldm_paths(position)
    return (_TOP_LDM[name],) if name in _TOP_LDM else ()


def _ldm_paths(position: Position) -> tuple[str, ...]:
    if position.what in ("downsamplers", "upsamplers"):
        return _ldm_sampler(position)
    per_level = _LAYERS + 1
    container = {
        "down": f"input_blocks.{position.level * per_level + position.number + 1}",
        "mid": "middle_block",
        "up": f"output_blocks.{position.level * per_level + position.number}",
    }[position.side]
    attentions = position.what == "attentions"
    if position.number >= {"down": _LAYERS, "mid": 1 if attentions else 2, "up": per_level}[position.side]:
        return ()
    beside = 1 if attentions else 0 if position.side != "mid" else 2 * position.number
    layer = "" if position.layer is None else f".transformer_blocks.{position.layer}"
    leaf = position.leaf if attentions else _RESNET_LDM[position.leaf]
    return (f"{container}.{beside}{layer}.{leaf}",)


def _ldm_sampler(position: Position) -> tuple[str, ...]:
    last = position.level * (_LAYERS + 1) + _LAYERS
    if position.side == "down":
        return (f"input_blocks.{last + 1}.0.op",)
    if position.side == "up":
        # SD1 and SD2 have no attention in their first up block; SDXL has.
        return tuple(f"output_blocks.{last}.{beside}.conv" for beside in ((1, 2) if position.level == 0 else (2,)))
    return ()


_LEAVES = [*_RESNET.values(), "norm", "proj_in", *_TRANSFORMER.values(), "proj_out", "conv"]
_ORDER = {leaf: place for place, leaf in enumerate(_LEAVES)}
_BEFORE_ALL, _AFTER_ALL = -1, 1000


def order(position: Position) -> tuple[int, int, int, int]:
    """Sorts positions on one side in the order in which the network runs them.

    A resnet runs before the attention of its number, whose leaves come after its own; the samplers come last.
    """
    number = _AFTER_ALL if position.leaf == "conv" else position.number
    layer = _BEFORE_ALL if position.layer is None else position.layer
    return (position.level, number, _AFTER_ALL if position.leaf == "proj_out" else layer, _ORDER[position.leaf])
