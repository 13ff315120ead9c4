"""What every LoRA family has in common: one module's difference of weights, read row by row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

from klora.errors import LoraFileError, LoraValueError
from klora.late import torch
from klora.lora.source import Stored

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, KERNEL = (2, 3, 4, 5), (3, 4, 5)
"""How many dimensions a weight of a linear layer or a convolution has, and one with a kernel."""
D = TypeVar("D", bound="Delta")
F = TypeVar("F", bound="FileDelta")
L = TypeVar("L", bound="FamilyDelta")

FULL_RANK = 64
_SMALLEST = 2.0**-126  # of normal fp32 numbers
# Far beyond any that a trainer writes, so that the file is damaged.
MAX_SCALE = 2.0**40


class Factors(NamedTuple):
    """ΔW = up·down, unscaled: up (out, r), down (r, in[, *kernel]); with `mid` (r, r, *kernel), down is (r, in)."""

    up: Tensor
    down: Tensor
    mid: Tensor | None = None


# Of each dtype: the bits that are all set in a NaN or infinity and in nothing else.
_NOT_FINITE = {
    "torch.float64": 0x7FF0_0000_0000_0000,
    "torch.float32": 0x7F80_0000,
    "torch.float16": 0x7C00,
    "torch.bfloat16": 0x7F80,
    "torch.float8_e5m2": 0x7C,
    "torch.float8_e4m3fn": 0x7F,
}


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor in CPU memory holds neither NaN nor infinity."""
    # numpy has no threads: torch's, waiting for each other, take a thousand times as long on a busy machine.
    pattern = tensor.flatten().view(torch.uint8).numpy().view(f"i{tensor.element_size()}")
    mask = pattern.dtype.type(_NOT_FINITE[str(tensor.dtype)])
    return not bool(((pattern & mask) == mask).any())


def cp_down(core: Tensor, down: Tensor) -> Tensor:
    """The core (m, r, *kernel) of a CP decomposition times down (r, in), for all of the kernel: (m, in·kernel)."""
    return torch.einsum("mn...,ni->mi...", core, down).reshape(len(core), -1)


@dataclass
class Group:
    """The tensors that a file holds for one module, by slot ("down", "up", "hada_w1_a" …), and its `numbers`.

    `keys` are the full keys. `alpha` is None where neither a key nor the metadata gives one; `kernel` is the side of
    the module's kernel, known from its name, for the families that store kernels flat; `reshape` the shape that a file
    of ComfyUI's gives the layer. A family notes in `used` what it took.
    """

    file: str
    key: str
    tensors: dict[str, Stored]
    keys: Mapping[str, str]
    numbers: Mapping[str, float]
    alpha: float | None = None
    rslora: bool = False
    kernel: int = 1
    reshape: tuple[int, ...] | None = None
    used: set[str] = field(default_factory=set)

    def __contains__(self, slot: str) -> bool:
        return slot in self.tensors

    def get(self, slot: str) -> Stored | None:
        """The tensor of a slot, or None."""
        if slot in self.tensors:
            self.used.add(slot)
        return self.tensors.get(slot)

    def take(self, slot: str, *dims: int) -> Stored:
        """The tensor of a slot that must be there, with one of `dims` dimensions (default 2).

        Raises LoraFileError naming its key, or where it is missing that of another one of the module.
        """
        stored = self.get(slot)
        if stored is None:
            there = next(iter(self.tensors.values())).key
            cure = "the file is incomplete: download or export it again"
            raise LoraFileError(self.file, f"its {slot} tensor is missing", cure, there)
        if len(stored.shape) not in (dims or (2,)):
            raise self.error(stored, f"has shape {size(stored.shape)}, which {slot} cannot have")
        if 0 in stored.shape:
            raise self.error(stored, f"is empty ({size(stored.shape)}), so its rank or width is 0")
        return stored

    def rank(self) -> int | None:
        """The rank of its factors; None where ΔW is stored whole, or nothing is."""
        shared = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
        shapes = [self.tensors[slot].shape for slot in shared if slot in self.tensors]
        return shapes[0][0] if shapes and shapes[0] else None

    def has_kernel(self) -> bool:
        """Whether it is of a convolution whose kernel is larger than 1."""
        return self.kernel > 1 or any(side > 1 for stored in self.tensors.values() for side in stored.shape[2:])

    def error(self, stored: Stored, reason: str) -> LoraFileError:
        """An error about the structure of one tensor."""
        return LoraFileError(self.file, reason, "the file is damaged: download or export it again", stored.key)

    def scaling(self, rank: int, whole: bool = False) -> tuple[float, float]:
        """(alpha, scale): alpha = rank where the file gives none; scale is alpha / rank, or alpha / √rank (rsLoRA).

        Of what is stored `whole`, alpha has no meaning. A `scale` of the file's own stands in the place of all that; a
        `scalar` comes on top. Raises LoraValueError where the outcome is no number.
        """
        self.used.update(("alpha", "scale", "scalar") & self.numbers.keys())
        divisor = math.sqrt(rank) if self.rslora else rank
        alpha = float(rank) if whole or self.alpha is None else self.alpha
        scale = 1.0 if whole else alpha / divisor
        if own := self.numbers.keys() & {"scale", "scalar"}:
            scale = self.numbers.get("scale", scale) * self.numbers.get("scalar", 1.0)
            alpha = scale * divisor
        if not abs(scale) <= MAX_SCALE:
            slot = next(iter(own or {"alpha"}))
            key = self.keys.get(slot, self.key)
            reason = f"makes a scale of {scale:g}, for a rank of {rank}"
            raise LoraValueError(self.file, reason, "the file is damaged: download or export it again", key)
        return alpha, scale


def size(shape: tuple[int, ...]) -> str:
    """A shape for messages: 320×768."""
    return "×".join(map(str, shape)) or "one number"


def squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in) of a 1×1 kernel; any other shape unchanged."""
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def with_kernel(out: int, columns: int, kernel: int) -> tuple[int, ...]:
    """The shape of a module whose `columns` = in·k·k are stored flat; flat where these are no multiple of k·k."""
    if columns % kernel**2:
        return (out, columns)
    return squeeze((out, columns // kernel**2, kernel, kernel))


@dataclass(frozen=True)
class Bias:
    """What a file adds to a module's bias (out,): the sum of tensors of one dimension, each times a factor."""

    terms: tuple[tuple[Stored, float], ...]

    def rows(self, start: int, stop: int) -> Bias:
        """That of the rows [start, stop)."""
        return Bias(tuple((stored.rows(start, stop), factor) for stored, factor in self.terms))

    def times(self, weight: float) -> Bias:
        """weight times as much."""
        return Bias(tuple((stored, factor * weight) for stored, factor in self.terms))

    def change(self) -> Tensor:
        """The sum, fp32 (out,)."""
        return torch.stack([stored.fp32() * factor for stored, factor in self.terms]).sum(0)

    def stored(self) -> Iterator[Stored]:
        """The tensors of the file."""
        return (stored for stored, _ in self.terms)


@dataclass(eq=False)
class Delta(ABC):
    """The difference that a file makes to one module's weight, and maybe to its `bias`.

    `file` and `key` (the file's own prefix) say where it comes from. `shape` is (out, in) or (out, in, *kernel),
    kernels of 1 squeezed. `scale` is alpha / rank (rsLoRA: alpha / √rank; full differences: 1).
    """

    file: str
    key: str
    rank: int
    alpha: float
    scale: float
    shape: tuple[int, ...]
    bias: Bias | None = field(default=None, kw_only=True)

    family: ClassVar[str]

    @abstractmethod
    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        """Write scale·ΔW[start:stop] into `block`, fp32 (stop - start, in·kernel)."""

    @abstractmethod
    def _part(self: D, start: int, stop: int, shape: tuple[int, ...]) -> D:
        """The delta of the rows [start, stop), which has that `shape`."""

    @property
    def needs_base(self) -> bool:
        """Whether the difference depends on the weight that it is applied to (DoRA)."""
        return False

    @property
    def columns(self) -> int:
        """in·kernel."""
        return math.prod(self.shape[1:])

    @property
    def is_stored_whole(self) -> bool:
        """Whether what is stored is as large as ΔW itself."""
        return False

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows [start, stop) of scale·ΔW, fp32 (stop - start, in·kernel) on the CPU; of a DoRA, its direction.

        `out`, a contiguous fp32 tensor of at least that many entries, is written to and returned in part. Values are
        not checked. Raises IndexError outside of the matrix.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start} to {stop} of a delta with {self.shape[0]} rows")
        count = stop - start
        if out is None:
            block = torch.empty(count, self.columns, dtype=torch.float32, device="cpu")
        else:
            block = out.view(-1)[: count * self.columns].view(count, self.columns)
        if count:
            self._fill(start, stop, block)
        return block

    def add_rows(self, start: int, stop: int, block: Tensor) -> None:
        """Add the rows [start, stop) of scale·ΔW to `block`, fp32 (stop - start, in·kh·kw)."""
        block.add_(self.rows(start, stop))

    def factors(self) -> Factors | None:
        """The unscaled factors in the file's dtype (fp8 as fp32), or None for a family without them."""
        return None

    def kronecker(self) -> tuple[Tensor, ...] | None:
        """Unscaled w1 (a, b) and w2 (c, d), or w1 and w2's factors (r, d) and (c, r), of ΔW = w1 ⊗ w2; else None."""
        return None

    def matrix(self, base_weight: Tensor | None = None) -> Tensor:
        """The whole difference, fp32, of shape `shape`, scale included.

        A delta with `needs_base` (DoRA) gives W' − W0 for the `base_weight` W0, on its device; ValueError without one.
        """
        return self.rows(0, self.shape[0]).view(self.shape)

    def part(self: D, start: int, stop: int) -> D:
        """The same delta restricted to the output rows [start, stop): a slice of a fused weight.

        Raises IndexError for an empty or impossible range, UnsupportedFormatError where the rows depend on each other.
        """
        if not 0 <= start < stop <= self.shape[0]:
            raise IndexError(f"rows {start} to {stop} of a delta with {self.shape[0]} rows")
        if (start, stop) == (0, self.shape[0]):
            return self
        part = self._part(start, stop, (stop - start, *self.shape[1:]))
        return replace(part, bias=self.bias.rows(start, stop)) if self.bias else part

    def shaped(self: D, shape: tuple[int, ...]) -> D:
        """The same delta in another shape of as many columns: a kernel is told from the layer where it was flat."""
        return replace(self, shape=shape)

    def stored(self) -> Iterator[Stored]:
        """The tensors of the file that it is made of; none of what a policy has made."""
        return iter(())

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors it is made of, in memory: as long as somebody holds them, the file is not read again."""
        return tuple(stored.data() for stored in self.stored())

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Read its tensors once, for all that is asked of it inside."""
        held = self.tensors()
        yield
        del held

    def unscored(self) -> Iterator[Stored]:
        """The tensors whose NaN would not show in a sum over `rows`."""
        if abs(self.scale) >= _SMALLEST:
            return self.bias.stored() if self.bias else iter(())
        # A product by 0 is not computed at all.
        return self.stored()

    def check_finite(self, scored: bool = False) -> None:
        """Raise LoraValueError, naming file and full tensor key, when a tensor holds NaN or infinity.

        `scored`: the sum of its entries is known to be finite, so that only what that does not tell is looked at.
        """
        for stored in self.unscored() if scored else self.stored():
            if not all_finite(stored.data()):
                raise LoraValueError(
                    self.file, "holds NaN or infinity", "the training diverged: use another file or epoch", stored.key
                )


class FileDelta(Delta):
    """A delta of tensors that a file holds."""

    def times(self: F, weight: float) -> F:
        """weight·ΔW; the delta itself for a weight of 1."""
        if weight == 1:
            return self
        bias = self.bias and self.bias.times(weight)
        return replace(self, alpha=self.alpha * weight, scale=self.scale * weight, bias=bias)

    def stored(self) -> Iterator[Stored]:
        """The tensors of the file among its fields."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Stored):
                yield value
        if self.bias:
            yield from self.bias.stored()


class FamilyDelta(FileDelta):
    """A delta of a family that files hold."""

    @classmethod
    @abstractmethod
    def load(cls: type[L], group: Group) -> L | None:
        """Read a group of tensors, or return None when they are of another family. Raises LoraFileError."""
