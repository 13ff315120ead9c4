"""The names of modules of SD, SDXL and FLUX by rule: every spelling brought to one, the path in diffusers.

A name is flattened first ('.' becomes '_'), because kohya's keys are flat already; a small grammar of containers and
a table of leaves then reads it: `unet_names`, `flux_names`, `text_names`. LDM is the original code, whose names the
WebUIs keep. Of any other model nothing is known here but what a name says by itself: its kind, its block.

FLUX weights that its original code stores fused are split: `double_blocks.0.img_attn.qkv` is three modules here.
`final_layer.adaLN_modulation` is left unmatched: diffusers stores its rows in another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from klora.lora import flux_names, text_names, unet_names
from klora.lora.flux_names import is_flux

__all__ = [
    "Kind",
    "Target",
    "bare",
    "block_of",
    "is_flux",
    "is_input",
    "is_text",
    "kernel_of",
    "kind_of",
    "ldm_name",
    "ldm_names",
    "resolve",
    "slice_of",
    "slice_rows",
    "sort_key",
    "spellings",
]

_LONGEST = 300
_DIGITS = 8

Kind = Literal["attention", "linear", "conv"]


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

    @property
    def component(self) -> str:
        """The part of a pipeline that it is in: "unet" (also FLUX's transformer), "text_encoder", "text_encoder_2"."""
        return self.name.split(".")[0] if self.text_encoder else "unet"

    @property
    def path(self) -> str:
        """Its path in that component."""
        return self.name.partition(".")[2] if self.text_encoder else self.name

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


_WRAPPERS = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "lora_unet_",
    "lora_prior_unet_",
    "lora_transformer_",
    "lycoris_",
    "unet.",
    "transformer.",
    "module.",
)
# What torch.compile, and ai-toolkit in the place of dots, leave in names; and what old attention processors add.
_COMPILED, _DOTS = re.compile(r"(?<![^._])_orig_mod[._]"), "$$"
_PROCESSOR = re.compile(r"([._])processor[._](to_(?:q|k|v|out|add_out)|add_[qkv]_proj)_lora$")
_FLAT_WRAPPERS = tuple(wrapper.replace(".", "_") for wrapper in _WRAPPERS)
# A wrapper may stand before another ("base_model.model.unet.…", "unet.unet.…"), seldom more than two.
_DEEPEST = 4


def spellings(prefix: str) -> Iterator[str]:
    """A file's own key prefix, flattened, then again without each wrapper and prefix that it begins with."""
    if len(prefix) > _LONGEST:
        return
    flat = _plain(prefix).replace(".", "_").strip("_")
    for _ in range(_DEEPEST):
        yield flat
        wrapper = next((wrapper for wrapper in _FLAT_WRAPPERS if flat.startswith(wrapper)), None)
        if wrapper is None:
            return
        flat = flat[len(wrapper) :].lstrip("_")


def _plain(prefix: str) -> str:
    """A prefix without what is no part of a module's name."""
    return _PROCESSOR.sub(r"\1\2", _COMPILED.sub("", prefix.replace(_DOTS, ".")))


def bare(prefix: str) -> str:
    """A file's own key prefix without wrappers, dots left in: what files of one unknown model can be compared by.

    A wrapper is taken as it is written, since "transformer_blocks" does not begin with "transformer.".
    """
    prefix = _plain(prefix).strip("_")
    for _ in range(_DEEPEST):
        wrapper = next((wrapper for wrapper in _WRAPPERS if prefix.startswith(wrapper)), "")
        prefix = prefix[len(wrapper) :].lstrip("_")
    return prefix


def is_text(prefix: str) -> bool:
    """Whether a file's own key prefix names a module of a text encoder, known or not."""
    return any(text_names.is_text(flat) for flat in spellings(prefix))


def resolve(prefix: str) -> tuple[Target, ...] | None:
    """Canonical target(s) of a file's own key prefix, in any spelling; None when it is not understood.

    Several targets mean that the file's weight is fused; each then has its `slice`.
    """
    return next((targets for flat in spellings(prefix) if (targets := _resolve_flat(flat))), None)


def _resolve_flat(flat: str) -> tuple[Target, ...]:
    if name := unet_names.find(flat):
        return (Target(name),)
    if found := flux_names.find(flat):
        return tuple(Target(name, part, fused=len(found) != 1) for name, part in found)
    text = text_names.find(flat)
    return (Target(text, text_encoder=True),) if text else ()


def slice_of(name: str) -> str | None:
    """Which part ("q", "k", "v", "mlp") of a weight that LDM stores fused the canonical module is; None if whole."""
    found = ldm_name(name)
    return found[1] if found else None


_ATTENTION = re.compile(r"(?:^|[._])(?:attn[0-9]?|attention|SelfAttention)[._]\w")
_CONVOLUTION = re.compile(r"(?:^|[._])conv(?:[0-9]|_\w+)?$")


def kind_of(name: str, shape: tuple[int, ...] = ()) -> Kind:
    """What a module is, for the scope of the selection, by its name and the shape of its weight.

    "attention": q, k, v and output projections of attention (FLUX: both streams; q, k, v of single blocks); "conv":
    the convolutions of resnets, samplers, input and output; "linear": everything else, also a projection that SD1
    stores as a 1×1 convolution.
    """
    if _ATTENTION.search(name):
        return "attention"
    return "conv" if len(shape) > 2 or _CONVOLUTION.search(name) else "linear"


_INPUT = re.compile(
    r"(?:conv_in|x_embedder(?:[._]proj)?|img_in(?:[._]proj)?|patch_embedding|(?:patch|pos)_embed[._]proj|patchify_proj"
    r"|all_x_embedder[._][\w-]+|init_x_linear|input_blocks[._]0[._]0|proj_in)"
)


def is_input(name: str) -> bool:
    """Whether a module takes the latents, to which variants of a model add channels (inpainting, control)."""
    return _INPUT.fullmatch(name) is not None


def kernel_of(name: str) -> int:
    """Side of the kernel of a canonical module: 3 for the large convolutions of a UNet, 1 for all else."""
    return 3 if kind_of(name) == "conv" and not name.endswith(".conv_shortcut") else 1


def ldm_names(name: str) -> tuple[tuple[str, str | None], ...]:
    """(path under `diffusion_model` in LDM, slice or None) of a canonical module: the A1111 and Forge module names.

    More than one where models differ (the first upsampler); empty where LDM has no such module.
    """
    if is_flux(name):
        found = flux_names.ldm_path(name)
        return (found,) if found else ()
    return tuple((path, None) for path in unet_names.ldm_paths(name))


def ldm_name(name: str) -> tuple[str, str | None] | None:
    """The first of `ldm_names`, or None."""
    return next(iter(ldm_names(name)), None)


def block_of(name: str) -> str:
    """The part of the network that a module belongs to, for reports: "down_blocks.1", "mid_block", "conv_in" …

    Of a flattened name, what stands before its first number.
    """
    first, *rest = name.split(".")
    if not rest:
        return re.split(r"_[0-9]+(?:_|$)", name)[0]
    return f"{first}.{rest[0]}" if first in ("down_blocks", "up_blocks") else first


def block_label(block: str) -> str:
    """A block's name as maps show it, short enough for a narrow column: "down_blocks.1" is "down 1"."""
    known = {
        "mid_block": "mid",
        "transformer_blocks": "double-stream blocks",
        "single_transformer_blocks": "single-stream blocks",
        "time_embedding": "time",
        "time_text_embed": "time",
        "add_embedding": "added",
        "context_embedder": "context",
    }
    return known.get(block, block.replace("_blocks.", " "))


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
    "text_encoder_3",
)


def sort_key(name: str) -> tuple[int, tuple[int, ...], str]:
    """Sorts names in the order in which the network runs them; unknown names go last, numbers in them as numbers."""
    first = name.split(".")[0]
    top = _TOP_ORDER.index(first) if first in _TOP_ORDER else len(_TOP_ORDER)
    if position := unet_names.position_of(name.replace(".", "_")):
        return (top, unet_names.order(position), name)
    if is_flux(name):
        return (top, flux_names.order(name), name)
    if top == len(_TOP_ORDER):
        return (top, (), re.sub(r"[0-9]+", lambda number: number[0].zfill(_DIGITS), name))
    return (top, tuple(int(number) for number in re.findall(r"\.([0-9]{1,3})\.", name)), name)
