"""What sessions prepare of a pair's weights, kept for the next session of the same pair."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from klora.lora.deltas import Delta
from klora.pair import Pair
from klora.settings import Settings

Combined = tuple[Delta | None, Delta | None]

MAX_PAIRS = 2
MAX_BYTES = 2**30
ROOM_BYTES = 2**30
ROOM_FRACTION = 0.5
"""How much of the memory of a GPU that is free when a session begins it may fill with what is as large as weights."""
LOPSIDED = 3
"""How many binary orders of magnitude factors in half precision may be apart before they are evened out."""


@contextmanager
def preparing() -> Iterator[None]:
    """For tensors that outlive the call they are made in: no gradient is recorded, and any mode may use them later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that dtype, itself where it is: `to` takes ten times as long to find out."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


@dataclass
class Room:
    """How many bytes may be held at a time of what is as large as the model: formed differences and weights."""

    free: int = field(default_factory=lambda: ROOM_BYTES)

    @classmethod
    def on(cls, device: torch.device) -> Room:
        """As much as there is on a device: of a GPU a part of its free memory."""
        if device.type != "cuda":
            return cls()
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return cls(int(ROOM_FRACTION * (free + unused)))

    def take(self, nbytes: int) -> bool:
        """Reserve, if there is so much."""
        if nbytes > self.free:
            return False
        self.free -= nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """Return what was reserved."""
        self.free += nbytes


class Chain(NamedTuple):
    """Weights to be applied in turn, last of all the number `factor`: down, (mid,) up; or one ΔW."""

    weights: tuple[Tensor, ...]
    factor: float

    def to(self, device: torch.device, dtype: torch.dtype) -> Chain:
        """The same there; the same tensors where they are there."""
        even = self._evened() if dtype == torch.float16 else self
        return Chain(tuple(weight.to(device=device, dtype=dtype) for weight in even.weights), even.factor)

    def _evened(self) -> Chain:
        """The same product with factors of one magnitude, where they or what lies between would leave fp16's range."""
        sizes = [float(weight.abs().max()) for weight in self.weights]
        if not self.factor or not all(sizes):
            return self
        logs = [math.log2(size) for size in sizes]
        mean = (math.fsum(logs) + math.log2(abs(self.factor))) / len(sizes)
        shifts = [round(mean - log) for log in logs]
        if max(map(abs, shifts)) < LOPSIDED:
            return self
        # By powers of two, which cost no precision.
        weights = (
            torch.ldexp(weight.float(), torch.tensor(shift, device=weight.device))
            for weight, shift in zip(self.weights, shifts, strict=True)
        )
        return Chain(tuple(weights), math.ldexp(self.factor, -sum(shifts)))


class Weights:
    """One delta's factors as a chain, in every (device, dtype) asked for: down, (mid,) up.

    Of a Kronecker product the chain is w1 and what w2 is made of. A delta without factors has none; what acts in its
    place depends on where it acts. The file's own tensors are held until a chain has been made of them.
    """

    def __init__(self, delta: Delta, room: Room | None = None) -> None:
        """Take `delta`'s tensors from the file; those that are a whole ΔW as long as there is `room` for them."""
        self.delta = delta
        with preparing():
            factors, kronecker = delta.factors(), delta.kronecker()
            self._read: tuple[Tensor, ...] = kronecker or ()
            if factors is not None:
                self._read = tuple(weight for weight in (factors.down, factors.mid, factors.up) if weight is not None)
            # Nothing is read from the file while the model is at work, but what would take as much memory as the model.
            self._held = () if self._read or not (room is None or self._fits(room)) else delta.tensors()
        self.low_rank, self.kronecker = factors is not None, kronecker is not None
        self.rank = len(self._read[0]) if self._read else delta.rank
        self.joinable = self.low_rank and len(self._read) == 2 and self._read[0].ndim == 2
        self._chains: dict[tuple[torch.device, torch.dtype], Chain] = {}

    def _fits(self, room: Room) -> bool:
        if not self.delta.is_stored_whole:
            return True
        nbytes = sum(stored.nbytes for stored in self.delta.stored())
        if not room.take(nbytes):
            return False
        weakref.finalize(self, room.give_back, nbytes).atexit = False
        return True

    def chain(self, device: torch.device, dtype: torch.dtype) -> Chain:
        """The factors there, always the same tensors."""
        found = self._chains.get((device, dtype))
        return found if found is not None else self._made(device, dtype)

    def difference(self, base: Tensor) -> Tensor:
        """ΔW, fp32, beside the weight `base` (out, in[, *kernel]) that it is added to."""
        if base.device.type != "cpu" and self.joinable:
            down, up = (factor.to(base.device, torch.float32) for factor in self.read())
            return (up @ down).mul_(self.delta.scale)
        return self.delta.matrix(base if self.delta.needs_base else None).to(base.device)

    def read(self) -> tuple[Tensor, ...]:
        """The factors as they are in the file, held from now on until the next chain is made."""
        if not self._read and (self.low_rank or self.kronecker):
            self._read = Weights(self.delta)._read
        return self._read

    def _made(self, device: torch.device, dtype: torch.dtype) -> Chain:
        with preparing():
            chain = Chain(self.read(), self.delta.scale).to(device, dtype)
        self._chains[device, dtype] = chain
        # One copy is enough: should the factors be wanted elsewhere too, they are read again.
        self._read = ()
        return chain

    def replace_down(self, device: torch.device, dtype: torch.dtype, down: Tensor) -> None:
        """Take an equal `down` there, so that there are not two of it."""
        (_, *others), factor = self.chain(device, dtype)
        self._chains[device, dtype] = Chain((down, *others), factor)

    def nbytes(self) -> int:
        """Bytes of memory, on all devices together."""
        chains = (weight for chain in self._chains.values() for weight in chain.weights)
        return sum({weight.data_ptr(): weight.nbytes for weight in (*self._held, *self._read, *chains)}.values())


class JoinedDown:
    """The `down` of several deltas below each other, of which each delta's own is a part."""

    def __init__(self, weights: Sequence[Weights]) -> None:
        self._weights = weights
        self.ranks = [weight.rank for weight in weights]
        self._stacks: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def stack(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(Σ r, in) there, always the same tensor."""
        if (device, dtype) not in self._stacks:
            with preparing():
                stack = torch.cat([weights.chain(device, dtype).weights[0] for weights in self._weights])
                for weights, part in zip(self._weights, stack.split(self.ranks), strict=True):
                    weights.replace_down(device, dtype, part)
            self._stacks[device, dtype] = stack
        return self._stacks[device, dtype]


class PairWeights:
    """The weights of one pair's deltas, and of what a policy has made of them. Threads may share it."""

    def __init__(self) -> None:
        self._weights: weakref.WeakKeyDictionary[Delta, Weights] = weakref.WeakKeyDictionary()
        self._room = Room()
        self._lock = threading.RLock()
        self._settings: Settings | None = None
        self._combined: dict[str, Combined] = {}
        self._joined: dict[tuple[Delta, ...], JoinedDown] = {}

    def of(self, delta: Delta) -> Weights:
        """The weights of a delta, prepared when it is first asked for."""
        with self._lock:
            found = self._weights.get(delta)
            if found is None:
                self._weights[delta] = found = Weights(delta, self._room)
            return found

    def combined(self, settings: Settings) -> dict[str, Combined]:
        """What a policy with these settings has made of modules so far, by name; of other settings, nothing is kept."""
        with self._lock:
            if settings != self._settings:
                self._settings, self._combined, self._joined = settings, {}, {}
            return self._combined

    def joined(self, deltas: tuple[Delta, ...]) -> JoinedDown:
        """The `down` of several deltas as one."""
        with self._lock:
            if deltas not in self._joined:
                self._joined[deltas] = JoinedDown([self.of(delta) for delta in deltas])
            return self._joined[deltas]

    def nbytes(self) -> int:
        """Bytes of memory, on all devices together."""
        with self._lock:
            return sum(weights.nbytes() for weights in self._weights.values())


class Yielding(Protocol):
    """What is at work, and can do with less memory."""

    def let_go(self) -> None:
        """Give back what is as large as the model, and go on without it."""


class KeptWeights:
    """The weights of the pairs used last: at most `max_pairs`, and as many as fit in `max_bytes`, the latest always.

    A session holds what it uses, whatever is dropped here.
    """

    def __init__(self, max_pairs: int = MAX_PAIRS, max_bytes: int = MAX_BYTES) -> None:
        self.max_pairs = max_pairs
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pairs: dict[Pair, PairWeights] = {}
        self.at_work: weakref.WeakSet[Yielding] = weakref.WeakSet()
        """What lets go of its memory first where the memory is wanted."""

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
        for one in list(self.at_work):
            one.let_go()
        with self._lock:
            self._pairs.clear()

    def __len__(self) -> int:
        return len(self._pairs)

    def _too_many(self) -> bool:
        return len(self._pairs) > self.max_pairs or sum(map(PairWeights.nbytes, self._pairs.values())) > self.max_bytes


KEPT = KeptWeights()
"""What all sessions of this process share."""
