"""Where the tensors of a LoRA come from: what a file and a state dict in memory have in common."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from klora.errors import LoraFileError
from klora.lora.disk import Identity
from klora.lora.header import DAMAGED, NUMBERS, WEIGHTS, Entry
from klora.text import printable

if TYPE_CHECKING:
    from torch import Tensor

_DIMENSIONS = 5


class TensorSource(ABC):
    """Tensors by their full key.

    `file` is what messages call it, `name` the same in short; `path` where it lies on disk, if it does; `identity`
    differs from that of any other content; `entries` says what there is.
    """

    file: str
    name: str
    path: Path | None
    identity: Identity | str
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    finite: bool = False
    """Whether its values are known to be numbers, neither NaN nor infinity."""

    @abstractmethod
    def read(self, entry: Entry) -> Tensor:
        """A tensor, in memory of K-LoRA's own. Raises LoraFileError where it is not what it was."""

    @abstractmethod
    def sha256(self) -> str:
        """Hex digest of all of it; LoraFileError where it has changed."""

    @abstractmethod
    def tensors_sha256(self) -> str:
        """The same of the tensors alone."""

    def weight(self, key: str, factor: float = 1.0) -> Stored:
        """A floating-point tensor times `factor`, not yet read. Raises LoraFileError for another dtype."""
        entry = self.entries[key]
        if entry.dtype not in WEIGHTS:
            raise LoraFileError(self.file, f"has dtype {entry.dtype}", "weights must be fp32, fp16, bf16 or fp8", key)
        return Stored(printable(key), self, entry, factor)

    def numbers(self, keys: Iterable[str]) -> dict[str, float]:
        """The values of tensors of one number each. Raises LoraFileError where one holds none or more."""
        return {key: float(self.read(self._number(key)).item()) for key in keys}

    def shape(self, key: str) -> tuple[int, ...]:
        """What a tensor says that a shape is. Raises LoraFileError where it cannot be one."""
        entry = self.entries[key]
        if len(entry.shape) != 1 or entry.shape[0] > _DIMENSIONS or entry.dtype not in NUMBERS:
            reason = f"should be a shape, is {entry.dtype} of shape {list(entry.shape)}"
            raise LoraFileError(self.file, reason, DAMAGED, key)
        return tuple(self.read(entry).long().tolist())

    def _number(self, key: str) -> Entry:
        entry = self.entries[key]
        if math.prod(entry.shape) != 1 or entry.dtype not in NUMBERS:
            reason = f"should be one number, is {entry.dtype} of shape {list(entry.shape)}"
            raise LoraFileError(self.file, reason, DAMAGED, key)
        return entry


class Stored:
    """A tensor of a file under its full key: read when it is used, and kept as long as somebody holds it."""

    def __init__(self, key: str, source: TensorSource, entry: Entry, factor: float = 1.0) -> None:
        self.key = key
        self._source = source
        self._entry = entry
        self._factor = factor
        self._kept: weakref.ref[Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        return self._entry.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self._entry.end - self._entry.begin

    def data(self) -> Tensor:
        """The tensor in the file's dtype, with a factor in fp32: the same object for all who hold it at one time."""
        tensor = self._kept() if self._kept else None
        if tensor is None:
            tensor = self._source.read(self._entry)
            if self._factor != 1.0:
                tensor = tensor.float() * self._factor
            self._kept = weakref.ref(tensor)
        return tensor

    def native(self) -> Tensor:
        """The tensor in the file's dtype, but fp8, which cannot be computed with, as fp32."""
        data = self.data()
        return data if data.dtype.itemsize > 1 else data.float()

    def fp32(self) -> Tensor:
        """The tensor in fp32."""
        return self.data().float()

    def view(self, *shape: int) -> Stored:
        """The same tensor in another shape."""
        return Stored(self.key, self._source, self._entry.view(*shape), self._factor)

    def rows(self, start: int, stop: int) -> Stored:
        """The rows [start, stop) of it."""
        return Stored(self.key, self._source, self._entry.rows(start, stop), self._factor)
