"""LoRA files in the making: tensors and metadata that mutations change, and then the bytes of the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

import torch

from tests.support.lora_files import FAMILIES, FLUX_SPELLINGS, UNET_SPELLINGS, lora_tensors, slots

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET = {
    f"{BLOCK}.attn1.to_q": (16, 16),
    f"{BLOCK}.attn2.to_k": (16, 24),
    f"{BLOCK}.ff.net.0.proj": (32, 16),
    "down_blocks.1.attentions.0.proj_in": (16, 16, 1, 1),
    "mid_block.resnets.0.conv1": (16, 8, 3, 3),
}
TEXT = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (16, 16),
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc1": (32, 16),
}
FLUX = {f"transformer_blocks.0.attn.to_{part}": (12, 12) for part in ("q", "k", "v", "out.0", "add_out")}
FLUX |= {f"transformer_blocks.0.attn.add_{part}_proj": (12, 12) for part in "qkv"}
FLUX |= {f"single_transformer_blocks.1.attn.to_{part}": (12, 12) for part in "qkv"}
FLUX_ALL = {**FLUX, "single_transformer_blocks.1.proj_mlp": (48, 12)}
SHAPES = {**UNET, **TEXT, **FLUX_ALL}

PARAMETERS = {
    f"{BLOCK}.norm1.weight": (16,),
    f"{BLOCK}.norm1.bias": (16,),
    "transformer_blocks.0.scale_shift_table": (1, 6, 12),
    "text_encoder.text_model.encoder.layers.0.layer_norm1.weight": (16,),
}
"""Parameters beside the modules, by the path in a model."""

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SIZES |= {"F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}
FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass
class Entry:
    """One tensor: what the header will say, and its bytes."""

    dtype: str
    shape: list[int]
    data: bytes

    @classmethod
    def of(cls, tensor: torch.Tensor, dtype: str) -> Entry:
        stored = tensor.to(FLOATS[dtype]).contiguous()
        return cls(dtype, list(stored.shape), stored.reshape(-1).view(torch.uint8).numpy().tobytes())

    def resize(self, shape: list[int], filler: bytes = b"") -> None:
        """Take another shape in earnest: as many bytes as it needs, the old ones over and over."""
        size = math.prod(shape) * SIZES[self.dtype]
        content = filler or self.data or b"\0"
        self.shape, self.data = shape, (content * (size // len(content) + 1))[:size]


@dataclass
class Draft:
    """A file before it is written; the edits apply to its header, as a table, and to all of its bytes."""

    entries: dict[str, Entry]
    metadata: dict[str, Any] = field(default_factory=dict)
    header_edits: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)
    byte_edits: list[Callable[[bytearray], None]] = field(default_factory=list)

    def some_key(self, draw: Random) -> str:
        return draw.choice(list(self.entries)) if self.entries else "nothing"

    def content(self) -> bytes:
        """The bytes of the file."""
        table: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        place = 0
        for key, entry in self.entries.items():
            end = place + len(entry.data)
            table[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [place, end]}
            place = end
        for edit in self.header_edits:
            edit(table)
        header = json.dumps(table).encode()
        whole = bytearray(len(header).to_bytes(8, "little") + header + b"".join(e.data for e in self.entries.values()))
        for change in self.byte_edits:
            change(whole)
        return bytes(whole)


@cache
def _tensors(spelling: str, family: str, flux: bool, rank: int, alpha: float | None) -> dict[str, torch.Tensor]:
    shapes = (FLUX if spelling == "xlabs" else FLUX_ALL) if flux else {**UNET, **TEXT}
    return lora_tensors(shapes, spelling, family, rank, alpha=alpha)


def good(draw: Random) -> Draft:
    """A file with nothing wrong, in some spelling, family and dtype."""
    flux = draw.random() < 0.3
    spelling = draw.choice(FLUX_SPELLINGS if flux else UNET_SPELLINGS)
    family, rank, alpha = draw.choice(FAMILIES), draw.choice((1, 2, 3)), draw.choice((None, 1.0))
    dtype = draw.choice(list(FLOATS))
    if family == "dora-in" and (flux or slots(spelling)[0].startswith(".lora_A")):
        family = (
            "dora"  # no such thing: PEFT has magnitudes of outputs only, and a fused weight cannot be split by rows
        )
    tensors = _tensors(spelling, family, flux, rank, alpha)
    return Draft({key: Entry.of(tensor, dtype) for key, tensor in tensors.items()})
