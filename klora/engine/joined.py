"""Modules that take the same input share its product with `down`: on a GPU, launches cost more than arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from klora.engine.weights import JoinedDown, as_dtype

JOINING_DEVICES = {"cuda"}
"""Kinds of device on which a larger product costs less than a second one."""


def joins_on(device: torch.device) -> bool:
    """Whether products are joined there."""
    return device.type in JOINING_DEVICES


def input_of(name: str) -> str | None:
    """A name for the input of a module, the same for all modules that take the same; None for one that is alone."""
    prefix, _, leaf = name.rpartition(".")
    if leaf in ("to_q", "to_k", "to_v"):
        if not prefix.endswith("attn2"):
            return f"{prefix}:hidden"
        # What cross-attention looks for comes from the picture, what it finds from the text.
        return None if leaf == "to_q" else f"{prefix}:context"
    if leaf in ("add_q_proj", "add_k_proj", "add_v_proj"):
        return f"{prefix}:added"
    # A single block of FLUX.
    return f"{prefix}.attn:hidden" if leaf == "proj_mlp" else None


class SharedInput:
    """One LoRA in the modules that take one input: the first of them makes the product, the others take their part.

    Nothing is assumed of the host: a module that is called with another tensor, or twice, makes its own product.
    """

    def __init__(self, down: JoinedDown) -> None:
        self.down = down
        self._acting: set[int] = set()
        self._taken: set[int] = set()
        self._x: Tensor | None = None
        self._version = 0
        self._product: tuple[Tensor, ...] = ()

    def set_acting(self, place: int, acts: bool) -> None:
        """Note whether the LoRA acts in one of the modules."""
        (self._acting.add if acts else self._acting.discard)(place)

    @property
    def pays(self) -> bool:
        """Whether there is more than one product to join."""
        return len(self._acting) > 1

    def product(self, place: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x·downᵀ of the module at `place`, (…, r): a view of the product for all of them."""
        version = 0 if x.is_inference() else x._version
        if self._x is not x or self._version != version or place in self._taken or self._product[0].dtype != dtype:
            joined = F.linear(as_dtype(x, dtype), self.down.stack(x.device, dtype))
            self._product = torch.split_with_sizes(joined, self.down.ranks, dim=-1)
            self._x, self._version = x, version
            self._taken = set()
        self._taken.add(place)
        part = self._product[place]
        if self._taken >= self._acting:
            self.forget()
        return part

    def forget(self) -> None:
        """Let go of the input and its product."""
        self._x, self._product = None, ()


def shared_inputs(names: Sequence[str]) -> list[list[str]]:
    """The groups of two and more modules that take the same input."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if (source := input_of(name)) is not None:
            groups.setdefault(source, []).append(name)
    return [group for group in groups.values() if len(group) > 1]
