"""A LoRA file as a whole: opened, checked, its modules brought to canonical names; and files compared."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path

from klora.errors import LoraFileError, LoraValueError, MismatchError, UnsupportedFormatError
from klora.lora import peft_alpha
from klora.lora.container import TensorFile
from klora.lora.deltas import Delta, Group, load_delta
from klora.lora.deltas.base import size
from klora.lora.keys import is_numbered, refused_family, split_key
from klora.lora.model_index import ModelIndex, Place, flat
from klora.lora.names import Target, bare, is_text, kernel_of, resolve, sort_key
from klora.lora.tables import Table, architecture_of, table_of
from klora.text import printable

_DIGEST = re.compile("[0-9a-f]{12,64}")

Places = Callable[[str, Delta], tuple[Place, ...]]
"""From a file's own prefix and the delta there to the modules that it acts in."""


class LoraFile:
    """A LoRA file whose structure has been checked; its tensors stay on disk until they are used.

    `modules` and `text_encoder` hold the deltas by canonical name, in network order; `unmatched` the full keys that
    were not understood. `table` says by which rule all of it can be named, and `architecture` is "SD1", "SD2", "SDXL",
    "FLUX", or None where the file does not tell. What fits no table goes by its own bare names, flattened.
    """

    def __init__(self, tensors: TensorFile) -> None:
        self.path = tensors.path
        self.name = tensors.path.stem
        self.identity = tensors.identity
        self.metadata = tensors.metadata
        self.modules: dict[str, Delta]
        self.text_encoder: dict[str, Delta]
        self.unmatched: list[str]
        self.kernels: set[str] = set()
        """Keys of deltas stored as a convolution's, a 1×1 one's too, whose `shape` is as that of a linear layer."""
        self.finite = False
        """Whether its values are known to be numbers, neither NaN nor infinity."""
        self._tensors = tensors
        self._unread: list[str] = []
        self._keys: dict[str, dict[str, str]] = self._group_keys()
        self._deltas: dict[str, Delta] = {}
        self._targets: dict[str, tuple[Target, ...]] = {prefix: resolve(prefix) or () for prefix in self._keys}
        self._load()
        self.table: Table | None = table_of(self._targets, self._deltas)
        self._assign(self._by_rule if self.table else _bare_place)
        self._first_names = self.modules.keys()
        self._renamed: LoraFile | None = None
        self.architecture = architecture_of(self.table, self.modules, self._deltas, self.metadata)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> LoraFile:
        """Read the header of a .safetensors file and understand it.

        Raises LoraFileError naming file, key and cure for anything that cannot be read or understood, and its
        subclass UnsupportedFormatError for pickles, OFT, BOFT, GLoRA and IA3. Values are checked when they are used.
        """
        return cls(TensorFile(Path(path)))

    def __repr__(self) -> str:
        return f"LoraFile({str(self.path)!r}, {len(self.modules)} modules, {self.architecture})"

    @property
    def label(self) -> str:
        """How messages call it: its path, on one line."""
        return printable(str(self.path))

    @property
    def made_for(self) -> str:
        """How messages call the model that it was made for."""
        return self.architecture or ("an unknown UNet" if self.table == "unet" else "an unknown architecture")

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the file that was opened; LoraFileError where it has changed since."""
        return self._tensors.sha256()

    @cached_property
    def model_hash(self) -> str:
        """The digest by which trainers, WebUIs and image sites know a LoRA: of its tensors, or what its metadata say.

        LoraFileError where the file has changed since it was opened.
        """
        said = self.metadata.get("sshs_model_hash", "")
        return said if _DIGEST.fullmatch(said) else self._tensors.tensors_sha256()

    def check_finite(self, scored: bool = False) -> None:
        """Look at all values, unless that has been done: LoraValueError, naming the key, for NaN or infinity.

        `scored`: the sums of all `modules` are known to be finite, so that only what these do not tell is looked at.
        """
        if self.finite:
            return
        for delta in self.modules.values():
            delta.check_finite(scored)
        for delta in self.text_encoder.values():
            delta.check_finite()
        self.finite = True

    @cached_property
    def naming(self) -> str:
        """Tells the names of the modules apart from those that the file was opened with; empty where they are these."""
        if self.modules.keys() == self._first_names:
            return ""
        return hashlib.sha256("\n".join(self.modules).encode()).hexdigest()[:16]

    def for_model(self, index: ModelIndex) -> LoraFile:
        """The same file with its modules under the names of a model; those that it lacks keep theirs.

        Raises MismatchError where a fused weight cannot be split into the parts that the model has.
        """
        shapes = {prefix: delta.shape for prefix, delta in self._deltas.items() if not self._is_text(prefix)}
        try:
            found = index.locate(shapes)
        except ValueError as error:
            reason = f"does not fit the model: {error}"
            raise LoraFileError(self._tensors.file, reason, "the file is damaged or made for another model") from None
        return self._named(lambda prefix, delta: self._in_model(found.get(prefix), prefix, delta), index.text_name)

    def bare(self) -> LoraFile:
        """The same file with its modules under their own bare names, as where no table fits."""
        return self._named(_bare_place)

    def _named(self, places: Places, text_name: Callable[[str], str] = str) -> LoraFile:
        """The same file under other names; the same object for the same names, since much is kept by it."""
        file = copy.copy(self)
        file.__dict__.pop("naming", None)
        file._assign(places, text_name)
        self._renamed = next((one for one in (self, self._renamed) if one and one._is_named_as(file)), file)
        return self._renamed

    def _is_named_as(self, other: LoraFile) -> bool:
        same_text = self.text_encoder.keys() == other.text_encoder.keys()
        return same_text and self.modules.keys() == other.modules.keys()

    def _in_model(self, found: tuple[Place, ...] | None, prefix: str, delta: Delta) -> tuple[Place, ...]:
        if not found:
            return self._by_rule(prefix, delta) if self.table else _bare_place(prefix, delta)
        height = found[-1].rows[1] if found[-1].rows else delta.shape[0]
        if height != delta.shape[0]:
            raise MismatchError(
                f"{self.label} is for {self.made_for}: its {delta.key} is {size(delta.shape)}, in the model it has"
                f" {height} rows; choose a LoRA made for this model"
            )
        return found

    def _by_rule(self, prefix: str, delta: Delta) -> tuple[Place, ...]:
        targets = self._targets[prefix]
        rows = [_rows(target, delta) for target in targets]
        if targets and rows[-1][1] != delta.shape[0]:
            raise _not_fused(delta)
        return tuple(Place(target.name, span) for target, span in zip(targets, rows, strict=True))

    def _load(self) -> None:
        read = {prefix: slots for prefix, slots in self._keys.items() if self._is_read(prefix, slots)}
        alphas = self._alphas(slots["alpha"] for slots in read.values() if "alpha" in slots)
        configs = peft_alpha.read(self.metadata, self._tensors.file)
        for prefix, slots in self._keys.items():
            if prefix not in read:
                self._unread.extend(slots.values())
                continue
            target = next(iter(self._targets[prefix]), Target(bare(prefix)))
            group = self._group(prefix, slots, target)
            if "alpha" in slots:
                group.alpha = alphas[slots["alpha"]]
                group.used.add("alpha")
            elif config := configs.get(target.component):
                group.alpha, group.rslora = config.of(target.path), config.rslora
            delta = load_delta(group)
            if delta is not None:
                self._deltas[prefix] = delta
                if any(len(stored.shape) == 4 for stored in group.tensors.values()):
                    self.kernels.add(delta.key)
            self._unread.extend(key for slot, key in slots.items() if delta is None or slot not in group.used)
        if not self._deltas:
            raise _no_modules(self._tensors.file, list(self._tensors.entries))

    def _is_read(self, prefix: str, slots: Mapping[str, str]) -> bool:
        """Whether a group is a module: one known by rule, or one of a LoRA for the diffusion model of any kind."""
        if self._targets[prefix]:
            return True
        # Checkpoints have layers called "up" and "down" too.
        of_lora = {"down", "up"} <= slots.keys() and "lora" in f"{slots['down']}{slots['up']}".lower()
        return (of_lora or bool(slots.keys() - {"alpha", "down", "up"})) and not is_text(prefix)

    def _group_keys(self) -> dict[str, dict[str, str]]:
        """prefix → slot → full key; refuses families that are not read, and two tensors for one slot."""
        groups: dict[str, dict[str, str]] = {}
        for key, entry in self._tensors.entries.items():
            if family := refused_family(key, len(entry.shape)):
                cure = "use a LoRA, LoCon, DoRA, LoHa, LoKr or full-difference file"
                raise UnsupportedFormatError(self._tensors.file, f"is of the {family} family", cure, key)
            if is_numbered(key):
                reason = "is by the first LoRA trainer for SD 1, which numbers layers and does not name them"
                raise UnsupportedFormatError(
                    self._tensors.file, reason, "convert it to diffusers' or kohya's keys", key
                )
            if (split := split_key(key)) is None:
                self._unread.append(key)
                continue
            slots = groups.setdefault(split[0], {})
            if split[1] in slots:
                raise _twice(self._tensors.file, slots[split[1]], key)
            slots[split[1]] = key
        return groups

    def _alphas(self, keys: Iterable[str]) -> dict[str, float]:
        alphas = self._tensors.numbers(keys)
        for key, alpha in alphas.items():
            if not math.isfinite(alpha):
                raise LoraValueError(self._tensors.file, "is NaN or infinity", "use another file", key)
        return alphas

    def _group(self, prefix: str, slots: dict[str, str], target: Target) -> Group:
        tensors = {slot: self._tensors.weight(key) for slot, key in slots.items() if slot != "alpha"}
        return Group(self._tensors.file, printable(prefix), tensors, kernel=kernel_of(target.name))

    def _is_text(self, prefix: str) -> bool:
        return any(target.text_encoder for target in self._targets[prefix])

    def _assign(self, places: Places, text_name: Callable[[str], str] = str) -> None:
        """Fill `modules`, whose names `places` gives, what it gives none for being unmatched; and `text_encoder`."""
        self.unmatched = list(self._unread)
        modules: dict[str, Delta] = {}
        text_encoder: dict[str, Delta] = {}
        for prefix, delta in self._deltas.items():
            text = self._is_text(prefix)
            table = text_encoder if text else modules
            found = self._by_rule(prefix, delta) if text else places(prefix, delta)
            if not found:
                self.unmatched.extend(self._keys[prefix].values())
            for name, rows in found:
                name = text_name(name) if text else name
                if name in table:
                    raise _twice(self._tensors.file, table[name].key, delta.key)
                table[name] = delta.part(*rows) if rows else delta
        self.modules, self.text_encoder = _in_order(modules), _in_order(text_encoder)


def _bare_place(prefix: str, delta: Delta) -> tuple[Place, ...]:
    return (Place(flat(bare(prefix))),)


def _rows(target: Target, delta: Delta) -> tuple[int, int]:
    try:
        return target.rows(*delta.shape[:2])
    except ValueError:
        raise _not_fused(delta) from None


def _not_fused(delta: Delta) -> LoraFileError:
    reason = f"is {size(delta.shape)}, which cannot be split into q, k, v (and mlp) of that width"
    cure = "the file is damaged or made for another model"
    return LoraFileError(delta.file, reason, cure, delta.key)


def _in_order(table: dict[str, Delta]) -> dict[str, Delta]:
    return dict(sorted(table.items(), key=lambda item: sort_key(item[0])))


def _twice(file: str, first: str, second: str) -> LoraFileError:
    reason = f"names the same weight as {printable(first)}"
    cure = "keep one of the two: the file was merged wrongly"
    return LoraFileError(file, reason, cure, second)


def _no_modules(file: str, keys: list[str]) -> LoraFileError:
    example = f" (such as {printable(min(keys, key=len))})" if keys else ""
    reason = f"zero modules matched: none of its {len(keys)} keys{example} is of a known LoRA"
    return LoraFileError(file, reason, "give a LoRA, not a checkpoint or an embedding")
