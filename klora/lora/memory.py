"""A LoRA as a state dict in memory, as diffusers' `load_lora_weights` takes it too: the same interface as a file's."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from klora.errors import LoraFileError
from klora.late import torch
from klora.lora.header import NUMBERS, Entry
from klora.lora.source import TensorSource

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {f"torch.{dtype}": name for name, dtype in NUMBERS.items()} | {"torch.bool": "BOOL", "torch.complex64": "C64"}


class TensorsInMemory(TensorSource):
    """Copies of tensors in CPU memory: what the caller does with the state dict later changes nothing.

    Entries count bytes as if the tensors lay one behind the other, as they do in a file.
    """

    path = None

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Copy `tensors`; LoraFileError, naming the key, for what is no plain tensor. `name` is for messages."""
        self.file = self.name = name
        self.metadata = {}
        self.entries: dict[str, Entry] = {}
        self._starts: list[int] = []
        self._bytes: list[Tensor] = []
        end = 0
        for key, value in tensors.items():
            if what := _odd(key, value):
                raise LoraFileError(name, f"is {what}", "give a LoRA's state dict", str(key))
            own = value.detach().to("cpu", copy=True).contiguous()
            start, end = end, end + own.nbytes
            self.entries[key] = Entry(_NAMES[str(own.dtype)], tuple(own.shape), start, end)
            if own.nbytes:
                self._starts.append(start)
                self._bytes.append(own.flatten().view(torch.uint8))
        self.identity = self._digest

    def read(self, entry: Entry) -> Tensor:
        """A copy of a tensor, or of some rows of one."""
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.torch_dtype, device="cpu")
        place = bisect_right(self._starts, entry.begin) - 1
        data = self._bytes[place][entry.begin - self._starts[place] : entry.end - self._starts[place]]
        return data.clone().view(entry.torch_dtype).view(entry.shape)

    def sha256(self) -> str:
        """Hex digest of keys, dtypes, shapes and values."""
        return self._digest

    def tensors_sha256(self) -> str:
        """The same: there is nothing else."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        table = {key: (entry.dtype, entry.shape, entry.begin) for key, entry in self.entries.items()}
        digest = hashlib.sha256(json.dumps(table).encode())
        for data in self._bytes:
            digest.update(data.numpy().data)
        return digest.hexdigest()


def _odd(key: object, value: object) -> str | None:
    """What makes an item one of no LoRA's state dict, if something does."""
    if not isinstance(key, str):
        return f"a key of type {type(key).__name__}, not text"
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}, not a tensor"
    if str(value.dtype) not in _NAMES or value.layout is not torch.strided:
        return f"a tensor of {value.dtype} in {value.layout}, not of plain numbers"
    return "a tensor on the device meta, which has no values" if value.is_meta else None
