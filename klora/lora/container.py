"""The safetensors container, read without trust: a header of JSON, then the bytes of the tensors, memory-mapped.

The header is checked here, and not by the safetensors package, so that every error can name the tensor at fault. The
rules are the format's own: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from klora.errors import LoraFileError, UnsupportedFormatError
from klora.text import printable

# A LoRA's header is some hundred kB; kohya's tag statistics can make it a few MB.
MAX_HEADER = 16 * 2**20
_MAX_BRACKETS = 10**6
_MAX_TENSORS = 50_000
_MAX_DIGITS = 15
_MAX_DIMENSIONS = 8
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
_DAMAGED = "download or copy the file again"
_NOT_LORA = "choose a LoRA saved as .safetensors"

_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2}
_SIZES |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}
_WEIGHTS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NUMBERS = {**_WEIGHTS, "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor; `begin` and `end` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file: its checked header and lazy views of its tensors."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`. Raises LoraFileError (UnsupportedFormatError for pickles) naming file and key."""
        self.path = path
        self.file = printable(str(path))
        length = _check_regular(path, self.file)
        try:
            with open(path, "rb") as stream:
                header, start = _read_header(stream, length, self.file)
                self._map = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise _unreadable(self.file, error) from None
        self.metadata, self.entries = _parse(header, length - start, self.file)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)[start:]

    def weight(self, key: str) -> Tensor:
        """A view of a floating-point tensor. Raises LoraFileError for another dtype."""
        entry = self.entries[key]
        if entry.dtype not in _WEIGHTS:
            raise LoraFileError(
                self.file, f"has dtype {entry.dtype}", "weights must be fp32, fp16, bf16 or fp8", printable(key)
            )
        return self._view(entry, _WEIGHTS[entry.dtype])

    def number(self, key: str) -> float:
        """The value of a tensor of one number. Raises LoraFileError where it holds none or more."""
        entry = self.entries[key]
        if math.prod(entry.shape) != 1 or entry.dtype not in _NUMBERS:
            reason = f"should be one number, is {entry.dtype} of shape {list(entry.shape)}"
            raise LoraFileError(self.file, reason, _DAMAGED, printable(key))
        return float(self._view(entry, _NUMBERS[entry.dtype]).item())

    def sha256(self) -> str:
        """Hex digest of the whole file as it is mapped, so that it belongs to the tensors that were read."""
        digest = hashlib.sha256()
        view = memoryview(self._map)
        for start in range(0, len(view), 2**20):
            digest.update(view[start : start + 2**20])
        return digest.hexdigest()

    def _view(self, entry: Entry, dtype: torch.dtype) -> Tensor:
        data = self._bytes[entry.begin : entry.end]
        if data.data_ptr() % dtype.itemsize:
            data = data.clone()  # an unaligned header: such bytes cannot be viewed as numbers
        return data.view(dtype).view(entry.shape)


def _check_regular(path: Path, file: str) -> int:
    """The length of a regular file. A pipe or device is refused before it is opened, since reading it may block."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise LoraFileError(file, "is a folder", "give the .safetensors file inside it")
    if not stat.S_ISREG(status.st_mode):
        raise LoraFileError(file, "is a device, pipe or socket", "give a .safetensors file")
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise _pickle(file)
    if status.st_size == 0:
        raise LoraFileError(file, "is empty", _DAMAGED)
    return status.st_size


def _unreadable(file: str, error: Exception) -> LoraFileError:
    if isinstance(error, FileNotFoundError):
        return LoraFileError(file, "does not exist", "check the path")
    reason = getattr(error, "strerror", None) or printable(str(error))
    return LoraFileError(file, f"cannot be read ({reason})", "check the path and its permissions")


def _pickle(file: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        file, "is a pickle (.pt, .ckpt, .bin), which can run code when loaded", "convert it to .safetensors"
    )


def _read_header(stream: BinaryIO, length: int, file: str) -> tuple[bytes, int]:
    """(the header's bytes, where the tensors begin)."""
    start = stream.read(8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > length - 8 or size > MAX_HEADER:
        raise _not_safetensors(file, start + stream.read(24), size, length)
    header = stream.read(size)
    if not header.startswith(b"{"):
        raise _not_safetensors(file, start + header[:24], size, length)
    return header, 8 + size


def _not_safetensors(file: str, head: bytes, size: int, length: int) -> LoraFileError:
    """The most helpful error for a file that does not begin like a safetensors file."""
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05"):
        return _pickle(file)
    if head.startswith(b"version https://git-lfs"):
        return LoraFileError(file, "is a Git LFS pointer, not the file itself", "download the real file (git lfs pull)")
    if head.lstrip()[:1] == b"<":
        return LoraFileError(file, "is a web page, not a LoRA", "download the file again, logged in if need be")
    if head.startswith(b"GGUF"):
        return UnsupportedFormatError(file, "is a GGUF file", _NOT_LORA)
    if head[8:9] == b"{" and size <= MAX_HEADER:
        return LoraFileError(file, f"is truncated: its header of {size} bytes is not all there ({length})", _DAMAGED)
    if head[8:9] == b"{":
        return LoraFileError(file, f"has a header of {size} bytes, more than a LoRA can have", _DAMAGED)
    return LoraFileError(file, "is no safetensors file, or a damaged one", _NOT_LORA)


def _parse(header: bytes, room: int, file: str) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and entries of a header whose tensors have `room` bytes."""
    if header.count(b"[") + header.count(b"{") > _MAX_BRACKETS:
        raise LoraFileError(file, "has a header with far too many parts", _DAMAGED)
    try:
        parsed = json.loads(header.decode(), object_pairs_hook=_unique, parse_int=_short_int)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(file, f"has a header that cannot be read ({printable(str(error))})", _DAMAGED) from None
    metadata = parsed.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoraFileError(file, "is not a table of texts", _DAMAGED, "__metadata__")
    if len(parsed) > _MAX_TENSORS:
        raise LoraFileError(file, f"has {len(parsed)} tensors, more than a LoRA can have", _NOT_LORA)
    entries = {key: _entry(key, value, room, file) for key, value in parsed.items()}
    _check_layout(entries, room, file)
    return metadata, entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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
        return LoraFileError(file, reason, _DAMAGED, printable(key))

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise error("has no dtype, shape and data_offsets in the header")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise error(f"has the unknown dtype {printable(str(dtype))}")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise error("has a shape that is none")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise error("has offsets that are none")
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
            raise LoraFileError(file, f"has offsets out of range: it {what}", _DAMAGED, printable(key))
        place = entry.end
    if place != room:
        raise LoraFileError(file, f"has {room - place} bytes that belong to no tensor", _DAMAGED)
