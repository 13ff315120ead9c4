"""The safetensors container: a header of JSON, then the bytes of the tensors, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from klora.errors import LoraFileError, UnsupportedFormatError
from klora.late import torch
from klora.lora import disk
from klora.lora.header import DAMAGED, MAX_HEADER, NOT_LORA, Entry, parse
from klora.lora.source import TensorSource

if TYPE_CHECKING:
    from torch import Tensor

_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


class TensorFile(TensorSource):
    """A safetensors file whose header has been read and checked. It is opened anew for what is read of it later."""

    def __init__(self, path: Path) -> None:
        """Read the header of `path`. Raises LoraFileError (UnsupportedFormatError for pickles) naming file and key."""
        self.path: Path = path
        self.file = str(path)
        self.name = path.stem
        self.identity: disk.Identity
        with disk.reading(path) as (stream, self.identity):
            if path.suffix.lower() in _PICKLE_SUFFIXES:
                raise _pickle(self.file)
            header, self._start = _read_header(stream, self.identity.size, self.file)
        self.metadata, self.entries = parse(header, self.identity.size - self._start, self.file)

    def numbers(self, keys: Iterable[str]) -> dict[str, float]:
        """The values of tensors of one number each, read at once. Raises LoraFileError where one holds none or more."""
        with disk.reading(self.path, self.identity) as (stream, _):
            return {key: (entry := self._number(key)).number(self._bytes(stream, entry)) for key in keys}

    def read(self, entry: Entry) -> Tensor:
        """A tensor of this file, in memory of its own. Raises LoraFileError where the file is not what it was."""
        with disk.reading(self.path, self.identity) as (stream, _):
            return self._read(stream, entry)

    def sha256(self) -> str:
        """Hex digest of the file that was opened; LoraFileError where it has changed since."""
        return disk.sha256(self.path, self.identity)

    def tensors_sha256(self) -> str:
        """The same of what follows the header."""
        return disk.sha256(self.path, self.identity, self._start)

    def _bytes(self, stream: BinaryIO, entry: Entry) -> bytes:
        data = bytearray(entry.end - entry.begin)
        disk.read_into(stream, self._start + entry.begin, memoryview(data))
        return bytes(data)

    def _read(self, stream: BinaryIO, entry: Entry) -> Tensor:
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
        disk.read_into(stream, self._start + entry.begin, data.numpy().data)
        return data.view(entry.torch_dtype).view(entry.shape)


def _pickle(file: str) -> UnsupportedFormatError:
    reason = "is a pickle (.pt, .ckpt, .bin), which can run code when loaded"
    return UnsupportedFormatError(file, reason, "convert it to .safetensors")


def _read_header(stream: BinaryIO, length: int, file: str) -> tuple[bytearray, int]:
    """(the header's bytes, where the tensors begin)."""
    if length == 0:
        raise LoraFileError(file, "is empty", DAMAGED)
    head = stream.read(32)
    size = int.from_bytes(head[:8], "little")
    if size > length - 8 or size > MAX_HEADER or head[8:9] != b"{":
        raise _not_safetensors(file, head, size, length)
    header = bytearray(size)
    disk.read_into(stream, 8, memoryview(header))
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
        return UnsupportedFormatError(file, "is a GGUF file", NOT_LORA)
    if head[8:9] == b"{" and size <= MAX_HEADER:
        return LoraFileError(file, f"is truncated: its header of {size} bytes is not all there ({length})", DAMAGED)
    if head[8:9] == b"{":
        return LoraFileError(file, f"has a header of {size} bytes, more than a LoRA can have", DAMAGED)
    return LoraFileError(file, "is not a safetensors file, or a damaged one", NOT_LORA)
