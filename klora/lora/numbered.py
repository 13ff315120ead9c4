"""The files of the first LoRA trainer for SD 1, cloneofsimo/lora: `unet:12:up`, a layer's place in an order, no name.

The order is that of diffusers' modules: down, up, middle; in a block all attentions, then (trained "extended") all
resnets. diffusers of 2022, with which these files were made, had a transformer block's feed-forward between its two
attentions, later ones behind them. The shapes tell which it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from klora.lora.unet_names import Position, position_of

Shape = tuple[int, ...]

_UNET, _TEXT = re.compile(r"unet:([0-9]+)"), re.compile(r"text_encoder:([0-9]+)")
_ATTENTIONS = [[f"attn{number}.to_{leaf}" for leaf in ("q", "k", "v", "out.0")] for number in (1, 2)]
_FEED = ["ff.net.0.proj"]
_ORDERS = (
    [*_ATTENTIONS[0], *_FEED, *_ATTENTIONS[1]],
    [*_ATTENTIONS[0], *_ATTENTIONS[1], *_FEED],
    [*_ATTENTIONS[0], *_ATTENTIONS[1]],
)
_RESNET = ["conv1", "time_emb_proj", "conv2", "conv_shortcut"]
_SIDES = ("down", "up", "mid")
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")
_HEIGHT_OF_FEED = 8
_SD1 = [
    *(f"down_blocks.{level}.attentions.{number}.transformer_blocks.0" for level in range(3) for number in range(2)),
    *(f"up_blocks.{level}.attentions.{number}.transformer_blocks.0" for level in range(1, 4) for number in range(3)),
    "mid_block.attentions.0.transformer_blocks.0",
]


def is_numbered(prefix: str) -> bool:
    """Whether a prefix tells its layer by nothing but its place in an order."""
    return bool(_UNET.fullmatch(prefix) or _TEXT.fullmatch(prefix))


def text_name(prefix: str) -> str | None:
    """The module of CLIP that a prefix stands for, whose attentions alone were trained."""
    match = _TEXT.fullmatch(prefix)
    if match is None:
        return None
    layer, place = divmod(int(match[1]), len(_CLIP))
    return f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{_CLIP[place]}"


def unet_names(file: Mapping[str, Shape], model: Mapping[str, Shape] | None = None) -> dict[str, str]:
    """What the numbered prefixes among those of a file, with their weights' shapes, are called in a UNet.

    `model` has the shapes of the UNet at hand by name, in any order; without it, it is that of SD 1 and 2. Empty where
    the number of layers or their shapes fit no order.
    """
    places = sorted((int(match[1]), prefix) for prefix in file if (match := _UNET.fullmatch(prefix)))
    numbers = [number for number, _ in places]
    if not places or numbers != list(range(len(places))):
        return {}
    shapes = [file[prefix] for _, prefix in places]
    for names in _candidates(model):
        fits = len(names) == len(shapes) and all(
            _plausible(name, shape) if model is None else model[name] == shape
            for name, shape in zip(names, shapes, strict=True)
        )
        if fits:
            return {prefix: name for (_, prefix), name in zip(places, names, strict=True)}
    return {}


def _candidates(model: Mapping[str, Shape] | None) -> Iterator[list[str]]:
    if model is None:
        for order in _ORDERS:
            yield [f"{block}.{leaf}" for block in _SD1 for leaf in order]
        return
    found = [position for name in model if (position := position_of(name.replace(".", "_")))]
    for order in _ORDERS:
        attentions = _sorted((one for one in found if one.what == "attentions" and one.leaf in order), order)
        yield [one.name for one in attentions]
        resnets = _sorted((one for one in found if one.what == "resnets"), _RESNET)
        # The sort is stable: in each block the attentions stay first.
        both = sorted([*attentions, *resnets], key=lambda one: (_SIDES.index(one.side), one.level))
        yield [one.name for one in both]


def _sorted(positions: Iterable[Position], leaves: Sequence[str]) -> list[Position]:
    def order(one: Position) -> tuple[int, int, int, int, int]:
        return (_SIDES.index(one.side), one.level, one.number, one.layer or 0, leaves.index(one.leaf))

    return sorted(positions, key=order)


def _plausible(name: str, shape: Shape) -> bool:
    """Whether a module of a UNet, known by name alone, can have a weight of that shape."""
    if len(shape) != 2:
        return False
    out, columns = shape
    if name.endswith(_FEED[0]):
        return out == _HEIGHT_OF_FEED * columns
    return out == columns or name.endswith(("attn2.to_k", "attn2.to_v"))
