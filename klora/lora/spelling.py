"""How the keys of a merged file are spelled: as those of its inputs, where these agree, for who loads them loads it."""

from __future__ import annotations

from collections.abc import Sequence

from klora.errors import KloraError
from klora.lora.file import LoraFile
from klora.lora.names import bare

SPELLINGS = ("kohya", "diffusers")
_GENERIC = ("diffusion_model.", "model.diffusion_model.")
_ROOTS = {"kohya": "lora_unet_", "diffusers": "transformer."}


def spelling_of(loras: Sequence[LoraFile], wanted: str | None = None) -> str:
    """The spelling of a file made of `loras`, "kohya" or "diffusers": the `wanted` one, or else the inputs' own.

    Without a model, the modules of other models than SD, SDXL and FLUX are known by the inputs' own names alone. Raises
    KloraError, naming the spelling that works, for one in which these would be names that no program knows.
    """
    own = _own(loras)
    if _by_rule(loras):
        return wanted or ("diffusers" if own == "diffusers" and all(map(_is_diffusers, loras)) else "kohya")
    if wanted not in (None, own):
        raise KloraError(
            f"--spelling {wanted}: these files name the modules of a model that K-LoRA does not know by rule as"
            f" {own} does, and no program would load other names; use --spelling {own}"
        )
    return own


def spelling_for_all(loras: Sequence[LoraFile]) -> str:
    """The spelling that every WebUI, ComfyUI and diffusers load: kohya's by rule, else the inputs' own."""
    return "kohya" if _by_rule(loras) else _own(loras)


def own_prefixes(loras: Sequence[LoraFile]) -> dict[str, str]:
    """The whole keys, by name, of modules that no rule names: the files' own, under one root where theirs differ."""
    if all(lora.table for lora in loras):
        return {}
    found: dict[str, str] = {}
    for lora in loras:
        for name, delta in lora.modules.items():
            found.setdefault(name, delta.key)
    roots = {key.removesuffix(bare(key)) for key in found.values()}
    return found if len(roots) == 1 else {name: _ROOTS[_own(loras)] + bare(key) for name, key in found.items()}


def _own(loras: Sequence[LoraFile]) -> str:
    dotted = all("." in delta.key for lora in loras for delta in lora.modules.values())
    return "diffusers" if dotted else "kohya"


def _is_diffusers(lora: LoraFile) -> bool:
    """Whether a file is as diffusers writes it, so that who loads it loads what diffusers writes.

    ComfyUI's own format has factors of the same names. Of it UNets go by their original code's names alone.
    """
    generic = lora.table == "unet" and any(delta.key.startswith(_GENERIC) for delta in lora.modules.values())
    return lora.is_peft and not generic


def _by_rule(loras: Sequence[LoraFile]) -> bool:
    """Whether the names of all modules are known by rule.

    SD 3 and Qwen-Image share names in diffusers with FLUX, by which kohya's keys of these would go.
    """
    shared = any(lora.table == "flux" and lora.architecture is None for lora in loras)
    return all(lora.table for lora in loras) and not (shared and _own(loras) == "diffusers")
