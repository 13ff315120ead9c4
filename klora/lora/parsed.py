"""A LoRA's tensors, checked and put together to one delta for each of the file's own prefixes. No model is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from klora.errors import LoraFileError, UnsupportedFormatError
from klora.lora.alpha import MetadataAlpha
from klora.lora.deltas import FileDelta, FullDelta, Group, ZeroDelta, load_delta
from klora.lora.keys import FACTOR, NUMBERS, refused_family, split_key
from klora.lora.names import Target, bare, is_text, kernel_of, resolve
from klora.lora.numbered import is_numbered, text_name, unet_names
from klora.lora.parameters import ParameterDelta, is_whole, of_full, of_key, of_slots
from klora.lora.source import TensorSource
from klora.lora.tables import Table, table_of
from klora.text import printable

Slots = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class ParsedFile:
    """What a file holds, by its own prefixes, in its order.

    `keys` are the full keys of each prefix by slot, `deltas` what these make, `targets` what the prefix stands for by
    rule, `parameters` what else of the model is changed. `unread` are the full keys that were not understood, `kernels`
    the prefixes of deltas stored as a convolution's, a 1×1 one's too. `table` says by which rule all of it can be
    named, `alphas` how many modules have their alpha from where.
    """

    source: TensorSource
    keys: Mapping[str, Slots]
    deltas: Mapping[str, FileDelta]
    parameters: tuple[ParameterDelta, ...]
    targets: Mapping[str, tuple[Target, ...]]
    unread: tuple[str, ...]
    kernels: frozenset[str]
    table: Table | None
    alphas: Mapping[str, int]

    @classmethod
    def parse(cls, source: TensorSource) -> ParsedFile:
        """Understand what is in `source`. Raises LoraFileError naming file, key and cure."""
        keys, unread = _group_keys(source)
        targets = _targets(keys, source)
        read = {prefix: slots for prefix, slots in keys.items() if _is_read(prefix, slots, targets[prefix])}
        numbers = source.numbers(key for slots in read.values() for slot, key in slots.items() if _is_number(slot))
        metadata = MetadataAlpha(source.metadata, source.file)
        deltas: dict[str, FileDelta] = {}
        parameters = [of_key(source.file, key, source.weight(key)) for key in unread if is_whole(key)]
        unread = [key for key in unread if not is_whole(key)]
        kernels = set()
        alphas: Counter[str] = Counter()
        for prefix, slots in keys.items():
            if prefix not in read:
                unread.extend(slots.values())
                continue
            target = next(iter(targets[prefix]), Target(bare(prefix)))
            group = _group(source, prefix, slots, target, numbers)
            said = _set_alpha(group, target, metadata)
            delta = load_delta(group)
            if delta is not None:
                deltas[prefix] = delta
                alphas[said] += not isinstance(delta, (FullDelta, ZeroDelta))
                if any(len(stored.shape) > 2 for stored in group.tensors.values()):
                    kernels.add(delta.key)
            else:
                others = of_slots(source.file, prefix, slots, group.tensors)
                parameters.extend(others)
                group.used.update(slot for slot, key in slots.items() if any(key == other.key for other in others))
            unread.extend(key for slot, key in slots.items() if slot not in group.used)
        if not deltas:
            raise _no_modules(source)
        table = table_of(targets, deltas)
        return cls(source, keys, deltas, tuple(parameters), targets, tuple(unread), frozenset(kernels), table, +alphas)

    def as_parameters(self, prefix: str) -> list[ParameterDelta]:
        """A full difference, and that of the bias beside it, as ones of parameters: of what, a model tells."""
        delta, keys = self.deltas[prefix], self.keys[prefix]
        return of_full(delta, prefix, keys) if isinstance(delta, FullDelta) else []

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
        # BFL's norms have a `.scale` that is no number beside factors.
        if is_whole(key) or (split := split_key(key)) is None:
            unread.append(key)
            continue
        slots = groups.setdefault(split[0], {})
        if split[1] in slots:
            raise twice(source.file, slots[split[1]], key)
        slots[split[1]] = key
    return groups, unread


def _targets(keys: Mapping[str, Slots], source: TensorSource) -> dict[str, tuple[Target, ...]]:
    """What each prefix stands for by rule; nothing where it is not understood."""
    shapes = {
        prefix: (*source.entries[slots["up"]].shape[:1], *source.entries[slots["down"]].shape[1:])
        for prefix, slots in keys.items()
        if is_numbered(prefix) and slots.keys() >= {"up", "down"}
    }
    in_order = unet_names(shapes)
    targets: dict[str, tuple[Target, ...]] = {}
    for prefix in keys:
        if name := text_name(prefix):
            targets[prefix] = (Target(name, text_encoder=True),)
        elif prefix in in_order:
            targets[prefix] = (Target(in_order[prefix]),)
        else:
            targets[prefix] = resolve(prefix) or ()
    return targets


# What says something of a module's tensors, and makes no module on its own.
_BESIDE = {*NUMBERS, "down_bias", "up_bias", "reshape"}


def _is_read(prefix: str, slots: Slots, targets: tuple[Target, ...]) -> bool:
    """Whether a group is a module: one known by rule, or one of a LoRA for the diffusion model of any kind."""
    if targets or is_numbered(prefix):
        return True
    # Checkpoints have layers called "up" and "down" too.
    of_lora = {"down", "up"} <= slots.keys() and "lora" in f"{slots['down']}{slots['up']}".lower()
    own = {slot for slot in slots if slot not in _BESIDE and not slot.endswith(FACTOR)}
    return (of_lora or bool(own - {"down", "up"})) and not is_text(prefix)


def _is_number(slot: str) -> bool:
    return slot in NUMBERS or slot.endswith(FACTOR)


def _group(source: TensorSource, prefix: str, slots: Slots, target: Target, numbers: Mapping[str, float]) -> Group:
    """The tensors and numbers of one prefix; `numbers` go by full key."""
    own = {slot: numbers[key] for slot, key in slots.items() if _is_number(slot)}
    tensors = {
        slot: source.weight(key, own.get(slot + FACTOR, 1.0))
        for slot, key in slots.items()
        if not _is_number(slot) and slot != "reshape"
    }
    group = Group(source.file, printable(prefix), tensors, slots, own, own.get("alpha"), kernel=kernel_of(target.name))
    group.used.update(slot for slot in own if slot.endswith(FACTOR) and slot.removesuffix(FACTOR) in tensors)
    if "reshape" in slots:
        group.reshape = source.shape(slots["reshape"])
    return group


def _set_alpha(group: Group, target: Target, metadata: MetadataAlpha) -> str:
    """Give a group without an alpha of its own what the metadata say; where its alpha is from."""
    if group.alpha is not None or "scale" in group.numbers:
        return "keys"
    rank = group.rank()
    said = metadata.of(target.component, target.path, rank, group.has_kernel(), group.key) if rank else None
    if said is None:
        return "rank"
    group.alpha, group.rslora = said.alpha, said.rslora
    return f"metadata {printable(said.key)}"


def _no_modules(source: TensorSource) -> LoraFileError:
    keys = source.entries
    example = f" (such as {printable(min(keys, key=len))})" if keys else ""
    reason = f"zero modules matched: none of its {len(keys)} keys{example} is of a known LoRA"
    return LoraFileError(source.file, reason, "give a LoRA, not a checkpoint or an embedding")
