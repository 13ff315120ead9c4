"""A LoRA's tensors, checked and put together to one delta for each of the file's own prefixes. No model is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from klora.errors import LoraFileError, LoraValueError, UnsupportedFormatError
from klora.lora import peft_alpha
from klora.lora.deltas import FileDelta, Group, load_delta
from klora.lora.keys import is_numbered, refused_family, split_key
from klora.lora.names import Target, bare, is_text, kernel_of, resolve
from klora.lora.source import TensorSource
from klora.lora.tables import Table, table_of
from klora.text import printable

Slots = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class ParsedFile:
    """What a file holds, by its own prefixes, in its order.

    `keys` are the full keys of each prefix by slot, `deltas` what these make, `targets` what the prefix stands for by
    rule. `unread` are the full keys that were not understood, `kernels` the prefixes of deltas stored as a
    convolution's, a 1×1 one's too. `table` says by which rule all of it can be named.
    """

    source: TensorSource
    keys: Mapping[str, Slots]
    deltas: Mapping[str, FileDelta]
    targets: Mapping[str, tuple[Target, ...]]
    unread: tuple[str, ...]
    kernels: frozenset[str]
    table: Table | None

    @classmethod
    def parse(cls, source: TensorSource) -> ParsedFile:
        """Understand what is in `source`. Raises LoraFileError naming file, key and cure."""
        keys, unread = _group_keys(source)
        targets = {prefix: resolve(prefix) or () for prefix in keys}
        read = {prefix: slots for prefix, slots in keys.items() if _is_read(prefix, slots, targets[prefix])}
        alphas = _alphas(source, (slots["alpha"] for slots in read.values() if "alpha" in slots))
        configs = peft_alpha.read(source.metadata, source.file)
        deltas: dict[str, FileDelta] = {}
        kernels = set()
        for prefix, slots in keys.items():
            if prefix not in read:
                unread.extend(slots.values())
                continue
            target = next(iter(targets[prefix]), Target(bare(prefix)))
            group = _group(source, prefix, slots, target)
            if "alpha" in slots:
                group.alpha = alphas[slots["alpha"]]
                group.used.add("alpha")
            elif config := configs.get(target.component):
                group.alpha, group.rslora = config.of(target.path), config.rslora
            delta = load_delta(group)
            if delta is not None:
                deltas[prefix] = delta
                if any(len(stored.shape) == 4 for stored in group.tensors.values()):
                    kernels.add(delta.key)
            unread.extend(key for slot, key in slots.items() if delta is None or slot not in group.used)
        if not deltas:
            raise _no_modules(source)
        return cls(source, keys, deltas, targets, tuple(unread), frozenset(kernels), table_of(targets, deltas))

    def is_text(self, prefix: str) -> bool:
        """Whether a prefix stands for a module of a text encoder."""
        return any(target.text_encoder for target in self.targets[prefix])


def twice(file: str, first: str, second: str) -> LoraFileError:
    """An error about two tensors or modules of a file that stand for one."""
    reason = f"names the same weight as {printable(first)}"
    cure = "keep one of the two: the file was merged wrongly"
    return LoraFileError(file, reason, cure, second)


def _group_keys(source: TensorSource) -> tuple[dict[str, dict[str, str]], list[str]]:
    """prefix → slot → full key, and the keys that end like no tensor of a LoRA.

    Refuses families that are not read, and two tensors for one slot.
    """
    groups: dict[str, dict[str, str]] = {}
    unread = []
    for key, entry in source.entries.items():
        if family := refused_family(key, len(entry.shape)):
            cure = "use a LoRA, LoCon, DoRA, LoHa, LoKr or full-difference file"
            raise UnsupportedFormatError(source.file, f"is of the {family} family", cure, key)
        if is_numbered(key):
            reason = "is by the first LoRA trainer for SD 1, which numbers layers and does not name them"
            raise UnsupportedFormatError(source.file, reason, "convert it to diffusers' or kohya's keys", key)
        if (split := split_key(key)) is None:
            unread.append(key)
            continue
        slots = groups.setdefault(split[0], {})
        if split[1] in slots:
            raise twice(source.file, slots[split[1]], key)
        slots[split[1]] = key
    return groups, unread


def _is_read(prefix: str, slots: Slots, targets: tuple[Target, ...]) -> bool:
    """Whether a group is a module: one known by rule, or one of a LoRA for the diffusion model of any kind."""
    if targets:
        return True
    # Checkpoints have layers called "up" and "down" too.
    of_lora = {"down", "up"} <= slots.keys() and "lora" in f"{slots['down']}{slots['up']}".lower()
    return (of_lora or bool(slots.keys() - {"alpha", "down", "up"})) and not is_text(prefix)


def _alphas(source: TensorSource, keys: Iterable[str]) -> dict[str, float]:
    alphas = source.numbers(keys)
    for key, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise LoraValueError(source.file, "is NaN or infinity", "use another file", key)
    return alphas


def _group(source: TensorSource, prefix: str, slots: Slots, target: Target) -> Group:
    tensors = {slot: source.weight(key) for slot, key in slots.items() if slot != "alpha"}
    return Group(source.file, printable(prefix), tensors, kernel=kernel_of(target.name))


def _no_modules(source: TensorSource) -> LoraFileError:
    keys = source.entries
    example = f" (such as {printable(min(keys, key=len))})" if keys else ""
    reason = f"zero modules matched: none of its {len(keys)} keys{example} is of a known LoRA"
    return LoraFileError(source.file, reason, "give a LoRA, not a checkpoint or an embedding")
