"""What can be wrong with a file: each function spoils a draft in one way."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from tests.fuzz.drafts import FLOATS, SIZES, Draft, Entry, good
from tests.fuzz.families import SLOTS, beside, flat, norms, numbered, prefix_of, volume

ODD_NUMBERS = (0, 1, -1, 2, 3, 7, 8, 63, 255, 2**16, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, 10**30, 1.5, 1e308)
ODD_TEXTS = (
    "",
    " ",
    "\0",
    "\n",
    "\x1b[31m",
    "\u2028",
    "𝕏" * 3,
    "é",
    "..",
    "/",
    "x" * 400,
    "lora_unet_",
    ".alpha",
    "\ud800",
)
ODD_VALUES: tuple[Any, ...] = (None, True, [], {}, "F32", [[]], {"a": 1}, *ODD_NUMBERS, *ODD_TEXTS)
PREFIXES = (
    "lora_unet_",
    "unet.",
    "unet.unet.",
    "transformer.",
    "diffusion_model.",
    "base_model.model.",
    "lora_te_",
    "lycoris_",
    "",
)


def odd(draw: Random) -> Any:
    return draw.choice(ODD_VALUES)


def header_bytes(draw: Random, draft: Draft) -> None:
    def edit(whole: bytearray) -> None:
        size = min(int.from_bytes(whole[:8], "little"), len(whole) - 9)
        for _ in range(draw.randint(1, 4)):
            place = 8 + draw.randrange(max(1, size))
            if draw.random() < 0.5:
                whole[place : place + 1] = bytes([draw.randrange(256)])
            else:
                whole[place : place + draw.randint(0, 3)] = draw.choice(
                    (b'"', b"{", b"[", b",", b"}", b"0", b"\\u", b"\xff")
                )

    draft.byte_edits.append(edit)


def header_size(draw: Random, draft: Draft) -> None:
    size = draw.choice((0, 1, 7, 2**24, 2**24 + 1, 2**32, 2**63, 2**64 - 1, draw.randrange(4000)))
    draft.byte_edits.append(lambda whole: whole.__setitem__(slice(0, 8), size.to_bytes(8, "little")))


def length(draw: Random, draft: Draft) -> None:
    share, more = draw.random(), draw.randbytes(draw.randint(0, 40))

    def edit(whole: bytearray) -> None:
        if draw.random() < 0.6:
            del whole[int(share * len(whole)) :]
        else:
            whole.extend(more)

    draft.byte_edits.append(edit)


def any_bytes(draw: Random, draft: Draft) -> None:
    def edit(whole: bytearray) -> None:
        for _ in range(draw.randint(1, 20)):
            if whole:
                whole[draw.randrange(len(whole))] = draw.randrange(256)

    draft.byte_edits.append(edit)


def any_values(draw: Random, draft: Draft) -> None:
    for _ in range(draw.randint(1, 5)):
        if entry := draft.entries.get(draft.some_key(draw)):
            entry.data = draw.randbytes(len(entry.data))


def entry_field(draw: Random, draft: Draft) -> None:
    key, part, value = draft.some_key(draw), draw.choice(("dtype", "shape", "data_offsets", "extra", None)), odd(draw)

    def edit(table: dict[str, Any]) -> None:
        entry = table.get(key)
        if part is None or not isinstance(entry, dict):
            table[key] = value
        else:
            entry[part] = value

    draft.header_edits.append(edit)


def offsets(draw: Random, draft: Draft) -> None:
    keys = [draft.some_key(draw), draft.some_key(draw)]
    kind, by = draw.randrange(4), draw.choice((-64, -8, -1, 1, 4, 64, 10**12))

    def edit(table: dict[str, Any]) -> None:
        one, two = (table.get(key) for key in keys)
        if not (isinstance(one, dict) and isinstance(two, dict) and "data_offsets" in one and "data_offsets" in two):
            return
        if kind == 0:
            one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
        elif kind == 1:
            one["data_offsets"] = two["data_offsets"]
        elif isinstance(one["data_offsets"], list):
            one["data_offsets"] = [n + by * (kind == 2 or i) for i, n in enumerate(one["data_offsets"])]

    draft.header_edits.append(edit)


def shape_told(draw: Random, draft: Draft) -> None:
    key, kind, number = draft.some_key(draw), draw.randrange(4), draw.choice(ODD_NUMBERS)

    def edit(table: dict[str, Any]) -> None:
        entry = table.get(key)
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            return
        shape = list(entry["shape"])
        if kind == 0:
            shape.reverse()
        elif kind == 1:
            shape.append(1)
        elif kind == 2:
            shape = [1, *shape]
        elif shape:
            shape[draw.randrange(len(shape))] = number
        entry["shape"] = shape

    draft.header_edits.append(edit)


def shape_real(draw: Random, draft: Draft) -> None:
    for _ in range(draw.randint(1, 3)):
        if entry := draft.entries.get(draft.some_key(draw)):
            shape = list(entry.shape) or [1]
            kind = draw.randrange(5)
            if kind == 0:
                shape[draw.randrange(len(shape))] = draw.choice((0, 1, 2, 3, 5, 16, 17, 48, 64))
            elif kind == 1:
                shape = [draw.choice((0, 1, 2, 3, 16)) for _ in range(draw.randint(0, 5))]
            elif kind == 2:
                shape.reverse()
            elif kind == 3:
                shape = [*shape, *[1] * draw.randint(1, 4)]
            else:
                shape = [shape[0], 1, *shape[1:]] if draw.random() < 0.5 else shape[:1]
            entry.resize(shape)


def giant(draw: Random, draft: Draft) -> None:
    """Small tensors whose product is enormous."""
    prefix = draft.some_key(draw).split(".lora")[0].split(".hada")[0].split(".lokr")[0].removesuffix(".alpha")
    for key in [key for key in draft.entries if key.startswith(prefix)]:
        del draft.entries[key]
    wide, narrow = draw.choice((2**8, 2**10, 2**11, 2**12, 2**13, 2**14, 2**16, 2**18)), draw.choice((1, 2, 16))
    shapes = draw.choice(
        (
            {"lora_down.weight": [1, wide], "lora_up.weight": [wide, 1]},
            {"lora_A.weight": [1, wide], "lora_B.weight": [narrow, 1]},
            {"lokr_w1": [wide // 256, 64], "lokr_w2": [64, 64]},
            {"lokr_w1": [1, wide], "lokr_w2": [1, wide]},
            {"lokr_w1_a": [wide, 1], "lokr_w1_b": [1, wide], "lokr_w2": [1, 1]},
            {"lokr_w1": [2, 2], "lokr_w2_a": [wide, 1], "lokr_w2_b": [1, wide]},
            {"hada_w1_a": [wide, 1], "hada_w1_b": [1, wide], "hada_w2_a": [wide, 1], "hada_w2_b": [1, wide]},
            {"lora_down.weight": [64, wide // 64 or 1], "lora_up.weight": [narrow, 64]},
        )
    )
    for slot, shape in shapes.items():
        entry = Entry("F8_E4M3", [], b"\x30")
        entry.resize(shape)
        draft.entries[f"{prefix}.{slot}"] = entry


def dtype(draw: Random, draft: Draft) -> None:
    """Another dtype in earnest: the same shape, as many bytes as it needs."""
    for _ in range(draw.randint(1, 3)):
        if entry := draft.entries.get(draft.some_key(draw)):
            entry.dtype = draw.choice(list(SIZES))
            entry.resize(entry.shape)


def missing(draw: Random, draft: Draft) -> None:
    for _ in range(draw.randint(1, 3)):
        draft.entries.pop(draft.some_key(draw), None)


def renamed(draw: Random, draft: Draft) -> None:
    for _ in range(draw.randint(1, 4)):
        key = draft.some_key(draw)
        if key not in draft.entries:
            return
        prefix, _, _ = key.partition(".lora" if ".lora" in key else ".")
        new = draw.choice(
            (
                f"{prefix}.{draw.choice(SLOTS)}",
                draw.choice(PREFIXES) + key,
                key.replace("0", str(draw.choice((1, 9, 12, 999, 1000, "00")))),
                key.replace("_", ".") if draw.random() < 0.5 else key.replace(".", "_"),
                key[draw.randrange(len(key) + 1) :] + str(odd(draw)),
                key.upper(),
                draw.choice(ODD_TEXTS),
                key * 30,
                f"{prefix}.lora_A.{draw.choice(ODD_TEXTS)}.weight",
            )
        )
        draft.entries = {(new if k == key else k): entry for k, entry in draft.entries.items()}


def twice(draw: Random, draft: Draft) -> None:
    one, two = draft.some_key(draw), draft.some_key(draw)
    old, new = json.dumps(one).encode(), json.dumps(two).encode()
    draft.byte_edits.append(lambda whole: whole.__setitem__(slice(None), whole.replace(old, new.ljust(len(old)), 1)))


def mixed(draw: Random, draft: Draft) -> None:
    """Tensors of another good file beside these, or in their place."""
    other = good(draw)
    for key, entry in other.entries.items():
        if draw.random() < 0.5:
            draft.entries[key] = entry


def values(draw: Random, draft: Draft) -> None:
    for _ in range(draw.randint(1, 3)):
        entry = draft.entries.get(draft.some_key(draw))
        if entry is None or entry.dtype not in FLOATS:
            continue
        number = draw.choice((float("nan"), float("inf"), 0.0, -0.0, 3e38, 1e-45, 6e4, 1e19))
        code = {"F64": "<d", "F32": "<f"}.get(entry.dtype)
        filler = struct.pack(code, number) if code else draw.randbytes(SIZES[entry.dtype])
        if draw.random() < 0.5:
            entry.resize(entry.shape, filler)
        elif entry.data:
            entry.data = (filler + entry.data)[: len(entry.data)]


def alpha(draw: Random, draft: Draft) -> None:
    key = draft.some_key(draw)
    prefix = prefix_of(key)
    kind = draw.choice(("F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "U64"))
    entry = Entry(kind, [], draw.randbytes(8) if draw.random() < 0.5 else struct.pack("<f", 1e30) * 2)
    entry.resize(draw.choice(([], [1], [1, 1], [2], [0])))
    draft.entries[f"{prefix}.alpha"] = entry


def plain_alpha(draw: Random, draft: Draft) -> None:
    """Alphas and ranks as plain texts of the metadata, of one reading or of several."""
    draft.entries = {key: entry for key, entry in draft.entries.items() if not key.endswith(".alpha")}
    texts = ("1", "2.0", "8", "0", "-1", "1e308", "inf", "nan", "None", "9" * 400, *ODD_TEXTS)
    names = ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha", "transformer.lora_alpha", "unet.alpha")
    names += ("r", "rank", "network_dim", "ss_network_dim", "unet.r", "use_rslora")
    args = ({"conv_alpha": "1", "conv_dim": 2}, {"conv_alpha": odd(draw)}, [], odd(draw))
    if not isinstance(draft.metadata, dict):
        draft.metadata = {}
    for _ in range(draw.randint(1, 4)):
        draft.metadata[draw.choice(names)] = draw.choice(texts[:3] if draw.random() < 0.7 else texts)
    if draw.random() < 0.3:
        draft.metadata["ss_network_args"] = json.dumps(draw.choice(args))


def metadata(draw: Random, draft: Draft) -> None:
    if draw.random() < 0.2:
        draft.metadata = odd(draw)
        return
    draft.metadata = {draw.choice(("ss_tag", "format", "a")): odd(draw) if draw.random() < 0.2 else "text"}
    config: Any = {draw.choice(("unet.", "transformer.", "text_encoder.", "")) + "lora_alpha": odd(draw)}
    atoms = (
        ".",
        ".*",
        "(a|b)",
        "(.|.)",
        "to_q",
        "attn1",
        "\\.",
        "^",
        "$",
        "[a-z]",
        "[",
        "(",
        ")",
        "+",
        "?",
        "\\d",
        "\\1",
        "(?i)",
    )
    if draw.random() < 0.7:
        patterns = {
            "".join(draw.choice(atoms) for _ in range(draw.choice((1, 3, 9, 40)))): draw.choice((1, 2.0, odd(draw)))
            for _ in range(draw.choice((1, 5, 80)))
        }
        config["unet.alpha_pattern"] = draw.choice((patterns, patterns, odd(draw)))
    config["unet.use_rslora"] = draw.choice((True, False, 1, None))
    text = draw.choice((json.dumps(config), json.dumps(config)[:-1], json.dumps(odd(draw)), "[" * 5000, "9" * 5000))
    draft.metadata["lora_adapter_metadata"] = text


def heavy_header(draw: Random, draft: Draft) -> None:
    """A header of many parts, or of long ones."""
    count = draw.choice((10**4, 10**5, 10**6))
    piece = draw.choice(("[]", "{}", "1", '""', '"\\ud83d\\ude00"', '{"a":1}', '"x\\\\"'))
    text = f"[{','.join([piece] * (count // max(1, len(piece) // 2)))}]"
    if draw.random() < 0.3:
        text = json.dumps("𝕏" * (count // 4))
    if draw.random() < 0.3:
        text = "{" + ",".join(f'"{i}":1' for i in range(count // 8)) + "}"
    place = draw.choice(("__metadata__", "x"))

    def edit(whole: bytearray) -> None:
        size = int.from_bytes(whole[:8], "little")
        more = f'"{place}":{text},'.encode()
        whole[9:9] = more
        whole[:8] = min(2**64 - 1, size + len(more)).to_bytes(8, "little")

    draft.byte_edits.insert(0, edit)


def nothing(draw: Random, draft: Draft) -> None:
    """Leave it as it is."""


Mutation = Callable[[Random, Draft], None]
MUTATIONS: tuple[Mutation, ...] = (
    header_bytes,
    header_size,
    length,
    any_bytes,
    any_values,
    entry_field,
    offsets,
    shape_told,
    shape_real,
    giant,
    dtype,
    missing,
    renamed,
    twice,
    mixed,
    values,
    alpha,
    beside,
    volume,
    flat,
    norms,
    numbered,
    plain_alpha,
    metadata,
    heavy_header,
    nothing,
)
