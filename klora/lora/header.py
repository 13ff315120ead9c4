"""The header of a safetensors file, read without trust: https://github.com/huggingface/safetensors#format.

Not by the safetensors package, because its errors do not name the tensor, it takes one of two tensors of a name in
silence, and a hostile header of 80 MB costs it 1 GB (docs/architecture.md).
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from klora.errors import LoraFileError
from klora.late import torch
from klora.text import printable

# A LoRA's header is some hundred kB; kohya's tag statistics can make it a few MB.
MAX_HEADER = 16 * 2**20
_MAX_PARTS = 125_000
_MAX_TENSORS = 12_000
_MAX_DIGITS = 15
_MAX_DIMENSIONS = 8
DAMAGED = "download or copy the file again"
NOT_LORA = "choose a LoRA saved as .safetensors"

_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2}
_SIZES |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}
WEIGHTS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
NUMBERS = {**WEIGHTS, "I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64"}
"""What torch calls each dtype that is read."""
# What the struct package calls them: bf16 is the upper half of an fp32 number, E5M2 of an fp16 one.
_CODES = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f", "F8_E5M2": "<e", "I8": "<b", "U8": "<B", "I16": "<h"}
_CODES |= {"I32": "<i", "I64": "<q"}


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor; `begin` and `end` count in bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def rows(self, start: int, stop: int) -> Entry:
        """The entry of its rows [start, stop), which lie together."""
        row = (self.end - self.begin) // self.shape[0]
        return Entry(self.dtype, (stop - start, *self.shape[1:]), self.begin + start * row, self.begin + stop * row)

    @property
    def torch_dtype(self) -> torch.dtype:
        """What torch makes of it; for those that are in NUMBERS."""
        dtype: torch.dtype = getattr(torch, NUMBERS[self.dtype])
        return dtype

    def number(self, data: bytes) -> float:
        """The value of a tensor of one number, which is in NUMBERS, from its bytes."""
        if self.dtype == "F8_E4M3":
            return _from_e4m3(data[0])
        code = _CODES[self.dtype]
        return float(struct.unpack(code, data.rjust(struct.calcsize(code), b"\0"))[0])

    def view(self, *shape: int) -> Entry:
        """The same bytes in another shape of as many numbers."""
        return replace(self, shape=shape)


def _from_e4m3(bits: int) -> float:
    """A sign, four bits of exponent, three of the number: the middle of an fp16 number, but for 8 in the exponent."""
    if bits & 0x7F == 0x7F:
        return math.nan
    return 256 * float(struct.unpack("<e", struct.pack("<H", (bits & 0x80) << 8 | (bits & 0x7F) << 7))[0])


def parse(header: bytes | bytearray, room: int, file: str) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and entries of a header whose tensors have `room` bytes; LoraFileError naming the key at fault."""
    if _parts(header) > _MAX_PARTS:
        raise LoraFileError(file, "has a header with far too many parts", DAMAGED)
    try:
        parsed = json.loads(header.decode(), object_pairs_hook=_table, parse_int=_short_int)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(file, f"has a header that cannot be read ({printable(str(error))})", DAMAGED) from None
    metadata = parsed.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoraFileError(file, "is not a table of texts", DAMAGED, "__metadata__")
    if len(parsed) > _MAX_TENSORS:
        raise LoraFileError(file, f"has {len(parsed)} tensors, more than a LoRA can have", NOT_LORA)
    entries = {key: _entry(key, value, room, file) for key, value in parsed.items()}
    _check_layout(entries, room, file)
    return metadata, entries


def _parts(header: bytes | bytearray) -> int:
    """How many values the header has at most: each costs a hundred bytes or more, be it written with two."""
    plain = header.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = plain.count(b'"')
    if quotes > 2 * _MAX_PARTS:
        return quotes
    outside = b'"'.join(plain.split(b'"')[::2])
    return outside.count(b",") + outside.count(b"[") + outside.count(b"{")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of unique names and of texts that can be written again; ValueError where it is not one."""
    for pair in pairs:
        for text in pair:
            if isinstance(text, str) and not text.isascii():
                text.encode()
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"it has {counts.most_common(1)[0][0]} twice")
    return table


def _short_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("a number is far too large")
    return int(digits)


def _entry(key: str, value: object, room: int, file: str) -> Entry:
    def error(reason: str) -> LoraFileError:
        return LoraFileError(file, reason, DAMAGED, key)

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise error("has no dtype, shape and data_offsets in the header")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise error(f"has the unknown dtype {printable(str(dtype))}")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise error(f"has {printable(str(shape))} for a shape, which is not a shape")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise error(f"has {printable(str(offsets))} for data_offsets, which are not offsets")
    begin, end = offsets
    if end > room:
        raise error(f"has offsets out of range: it ends at byte {end} of {room}, so the file is truncated or damaged")
    if end - begin != math.prod(shape) * _SIZES[dtype]:
        raise error(
            f"has {end - begin} bytes, but its shape {shape} of {dtype} needs {math.prod(shape) * _SIZES[dtype]}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(entries: dict[str, Entry], room: int, file: str) -> None:
    """The tensors lie one behind the other: no overlap, no gap, nothing behind the last."""
    place = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            what = "overlaps another tensor" if entry.begin < place else "leaves a gap before it"
            raise LoraFileError(file, f"has offsets out of range: it {what}", DAMAGED, key)
        place = entry.end
    if place != room:
        raise LoraFileError(file, f"has {room - place} bytes that belong to no tensor", DAMAGED)
