"""A tensor's full key → the module's prefix and the slot in it, in every spelling of the slots."""

from __future__ import annotations

import re

# One alternative per slot; the adapter's name that PEFT may put in ("lora_A.default.weight") is dropped.
_ADAPTER = r"(?:\.(?!bias$)[^.]+)?"
_LORA = r"(?:lora_|lora\.|lora_linear_layer\.)"
_SLOTS = {
    "down": rf"{_LORA}?down\.weight|lora_down|lora_A{_ADAPTER}\.weight|lora_A(?:\.default)?",
    "up": rf"{_LORA}?up\.weight|lora_up|lora_B{_ADAPTER}\.weight|lora_B(?:\.default)?",
    "down_bias": rf"{_LORA}down\.bias|lora_A{_ADAPTER}\.bias",
    "up_bias": rf"{_LORA}up\.bias|lora_B{_ADAPTER}\.bias",
    "mid": r"lora_mid\.weight",
    "alpha": r"(?:lora_down\.)?alpha",
    "scale": r"scale",  # in A1111's reading, in the place of alpha / rank
    "scalar": r"scalar",  # LyCORIS' factor, where it was saved on its own
    "dora_scale": r"dora_scale",
    "magnitude": rf"lora_magnitude_vector{_ADAPTER}(?:\.weight)?|magnitude",  # the second is ai-toolkit's
    "diff": r"diff|lora\.weight",  # the second is what ZipLoRA's trainer makes of both files
    "diff_b": r"diff_b",
    "diff_m": r"diff_m",
    "set": r"set_weight",
    "reshape": r"reshape_weight",
    "w_norm": r"w_norm",
    "b_norm": r"b_norm",
}
# Where a file of PEFT's was turned into one of kohya's without its dots, an underscore stands before "lora_down".
_ENDING = re.compile(
    r"(?:\.|_(?=lora_(?:down|up)\.))(?:"
    + "|".join(f"(?P<{slot}>{pattern})" for slot, pattern in _SLOTS.items())
    + rf"|(?P<other>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)){_ADAPTER})$"
)
_LONGEST_ENDING = 160
# What fp8 numbers are to be multiplied by stands in the place of ".weight", or behind a key without it.
_FACTOR = re.compile(r"\.(?:scale_weight|weight_scale)$")
FACTOR = ".factor"
NUMBERS = ("alpha", "scale", "scalar")
"""The slots that hold one number; so does any that ends in `FACTOR`."""

# Parts of keys that give away a family which is refused, with its name.
_REFUSED = {
    "BOFT": re.compile(r"\.boft_(?:R|s)\b"),
    "OFT": re.compile(r"\.oft_(?:blocks|diag|r|R|s)\b"),
    "GLoRA": re.compile(r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight$"),
    "IA3": re.compile(r"\.(?:ia3_l\b|on_input$)"),
    "sparse-difference": re.compile(r"\.bias_(?:indices|values|size)$"),
}

# `unet:12:up`, as the first LoRA trainer for SD 1 wrote it.
_NUMBERED = re.compile(r"((?:unet|text_encoder):[0-9]{1,4}):(up|down)")


def split_key(key: str) -> tuple[str, str] | None:
    """(prefix, slot) of a full tensor key, or None when it ends like no tensor of a LoRA.

    Slots: down, up, mid, alpha, dora_scale, magnitude, diff, hada_*, lokr_* …; `FACTOR` behind one of them for what its
    numbers are to be multiplied by.
    """
    if match := _NUMBERED.fullmatch(key):
        return match[1], match[2]
    if factor := _FACTOR.search(key):
        stem = key[: factor.start()]
        of = _split(f"{stem}.weight") or _split(stem)
        return (of[0], of[1] + FACTOR) if of else None
    return _split(key)


def _split(key: str) -> tuple[str, str] | None:
    if (match := _ENDING.search(key, max(0, len(key) - _LONGEST_ENDING))) is None or match.start() == 0:
        return None
    slot = match["other"] or match.lastgroup
    return (key[: match.start()], str(slot))


def refused_family(key: str, dimensions: int) -> str | None:
    """The name of the family that a key belongs to when K-LoRA does not read it (OFT, BOFT, GLoRA, IA3 …)."""
    name = next((name for name, pattern in _REFUSED.items() if pattern.search(key)), None)
    # LyCORIS keeps the blocks of both in `oft_blocks`; BOFT has one dimension more, for its butterfly factors.
    return "BOFT" if name == "OFT" and dimensions == 4 else name
