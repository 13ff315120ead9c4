"""What sessions prepare of a pair's weights, kept for the next session of the same pair."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klora.lora.deltas import Delta
from klora.pair import Pair
from klora.settings import Settings

Combined = tuple[Delta | None, Delta | None]

MAX_PAIRS = 2
MAX_BYTES = 2**30
DENSE_BYTES = 2**30


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that dtype, itself where it is: `to` takes ten times as long to find out."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


@dataclass
class Room:
    """How many bytes of dense differences may be held at a time: those of a large file are as large as the model."""

    free: int = DENSE_BYTES

    def take(self, nbytes: int) -> bool:
        """Reserve, if there is so much."""
        if nbytes > self.free:
            return False
        self.free -= nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """Return what was reserved."""
        self.free += nbytes


class Weights:
    """One delta's factors as a chain to be applied in turn: down, (mid,) up; in every (device, dtype) asked for.

    Of a Kronecker product the chain is w1 and what w2 is made of. A delta without factors has none; what acts in its
    place depends on where it acts.
    """

    def __init__(self, delta: Delta, room: Room | None = None) -> None:
        """Take `delta`'s tensors from the file; those that are a whole ΔW as long as there is `room` for them."""
        # Nothing is read from the file while the model is at work, but what would take as much memory as the model.
        self._held = delta.tensors() if room is None or self._fits(delta, room) else ()
        factors, kronecker = delta.factors(), delta.kronecker()
        self.low_rank, self.kronecker = factors is not None, kronecker is not None
        self._factors: tuple[Tensor, ...] = kronecker or ()
        if factors is not None:
            self._factors = tuple(weight for weight in (factors.down, factors.mid, factors.up) if weight is not None)
        self._chains: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def _fits(self, delta: Delta, room: Room) -> bool:
        if not delta.is_stored_whole:
            return True
        nbytes = sum(stored.nbytes for stored in delta.stored())
        if not room.take(nbytes):
            return False
        weakref.finalize(self, room.give_back, nbytes).atexit = False
        return True

    @property
    def rank(self) -> int:
        """The rows of `down`."""
        return len(self._factors[0])

    @property
    def joinable(self) -> bool:
        """Whether it is down and up, of a linear layer."""
        return self.low_rank and len(self._factors) == 2 and self._factors[0].ndim == 2

    def chain(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The factors there, always the same tensors."""
        if (device, dtype) not in self._chains:
            self._chains[device, dtype] = tuple(weight.to(device=device, dtype=dtype) for weight in self._factors)
        return self._chains[device, dtype]

    def replace_down(self, device: torch.device, dtype: torch.dtype, down: Tensor) -> None:
        """Take an equal `down` there, so that there are not two of it."""
        self._chains[device, dtype] = (down, *self.chain(device, dtype)[1:])

    def nbytes(self) -> int:
        """Bytes of memory, on all devices together."""
        tensors = (*self._held, *self._factors, *(weight for chain in self._chains.values() for weight in chain))
        return sum({weight.data_ptr(): weight.nbytes for weight in tensors}.values())


class JoinedDown:
    """The `down` of several deltas below each other, of which each delta's own is a part."""

    def __init__(self, weights: Sequence[Weights]) -> None:
        self._weights = weights
        self.ranks = [weight.rank for weight in weights]
        self._stacks: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def stack(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(Σ r, in) there, always the same tensor."""
        if (device, dtype) not in self._stacks:
            stack = torch.cat([weights.chain(device, dtype)[0] for weights in self._weights])
            for weights, part in zip(self._weights, stack.split(self.ranks), strict=True):
                weights.replace_down(device, dtype, part)
            self._stacks[device, dtype] = stack
        return self._stacks[device, dtype]


class PairWeights:
    """The weights of one pair's deltas, and of what a policy has made of them."""

    def __init__(self) -> None:
        self._weights: weakref.WeakKeyDictionary[Delta, Weights] = weakref.WeakKeyDictionary()
        self._room = Room()
        self._settings: Settings | None = None
        self._combined: dict[str, Combined] = {}
        self._joined: dict[tuple[Delta, ...], JoinedDown] = {}

    def of(self, delta: Delta) -> Weights:
        """The weights of a delta, prepared when it is first asked for."""
        if delta not in self._weights:
            self._weights[delta] = Weights(delta, self._room)
        return self._weights[delta]

    def combined(self, settings: Settings) -> dict[str, Combined]:
        """What a policy with these settings has made of modules so far, by name; of other settings, nothing is kept."""
        if settings != self._settings:
            self._settings, self._combined, self._joined = settings, {}, {}
        return self._combined

    def joined(self, deltas: tuple[Delta, ...]) -> JoinedDown:
        """The `down` of several deltas as one."""
        if deltas not in self._joined:
            self._joined[deltas] = JoinedDown([self.of(delta) for delta in deltas])
        return self._joined[deltas]

    def nbytes(self) -> int:
        """Bytes of memory, on all devices together."""
        return sum(weights.nbytes() for weights in self._weights.values())


class KeptWeights:
    """The weights of the pairs used last: at most `max_pairs`, and as many as fit in `max_bytes`, the latest always.

    A session holds what it uses, whatever is dropped here.
    """

    def __init__(self, max_pairs: int = MAX_PAIRS, max_bytes: int = MAX_BYTES) -> None:
        self.max_pairs = max_pairs
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pairs: dict[Pair, PairWeights] = {}

    def of(self, pair: Pair) -> PairWeights:
        """The weights of a pair, which becomes the latest."""
        with self._lock:
            self._pairs[pair] = weights = self._pairs.pop(pair, None) or PairWeights()
            # What a pair has come to is known only once it has been used, so it is looked at when the next one comes.
            while len(self._pairs) > 1 and self._too_many():
                del self._pairs[next(iter(self._pairs))]
            return weights

    def clear(self) -> None:
        """Drop everything: the memory is wanted for something else."""
        with self._lock:
            self._pairs.clear()

    def __len__(self) -> int:
        return len(self._pairs)

    def _too_many(self) -> bool:
        return len(self._pairs) > self.max_pairs or sum(map(PairWeights.nbytes, self._pairs.values())) > self.max_bytes


KEPT = KeptWeights()
"""What all sessions of this process share."""
