"""Whether a file as a whole fits one of the tables by rule, and which model it then was made for.

Other models share many names with FLUX, so that one name alone tells nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from klora.lora.deltas import Delta
from klora.lora.names import Target, is_flux, spellings

Table = Literal["unet", "flux"]

ARCHITECTURE_OF_WIDTH = {768: "SD1", 1024: "SD2", 2048: "SDXL"}
_FLUX_WIDTH = 3072
_FLUX_BLOCKS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
_FLUX_MLP = re.compile(r"\.(?:proj_mlp|ff(?:_context)?\.net\.0\.proj)$")
_MLP_RATIO = 4
# FLUX has this weight, but diffusers stores its rows in another order.
_LEFT_OUT = "final_layer_adaLN_modulation_1"


def table_of(targets: Mapping[str, tuple[Target, ...]], deltas: Mapping[str, Delta]) -> Table | None:
    """The table that has every diffusion-model module of a file; None where there is none.

    `targets` are what each of the file's own prefixes stands for by rule.
    """
    found = [(target, deltas[prefix]) for prefix in deltas for target in targets[prefix] if not target.text_encoder]
    if any(not targets[prefix] and _LEFT_OUT not in spellings(prefix) for prefix in deltas):
        return None
    flux = {is_flux(target.name) for target, _ in found}
    if True not in flux:
        # Also for a file of text encoders alone, which goes with any.
        return "unet"
    return "flux" if flux == {True} and all(_in_flux(*one) for one in found) else None


def _in_flux(target: Target, delta: Delta) -> bool:
    stack, _, rest = target.name.partition(".")
    number = rest.partition(".")[0]
    if number.isdigit() and int(number) >= _FLUX_BLOCKS[stack]:
        return False
    if not _FLUX_MLP.search(target.name):
        return True
    height, width, *_ = delta.shape
    # One of 3·width rows has no mlp to be split off, which is an error of its own.
    return (height - 3 * width if target.fused else height) in (_MLP_RATIO * width, 0)


def architecture_of(
    table: Table | None, modules: Mapping[str, Delta], deltas: Mapping[str, Delta], metadata: Mapping[str, str]
) -> str | None:
    """The model a file was made for: SD1, SD2, SDXL, FLUX; None where it does not tell.

    `modules` go by canonical name, `deltas` by the file's own prefixes. A UNet is known by the width of its text
    context. Names of FLUX's double blocks in diffusers alone might be those of another model too.
    """
    if table == "flux":
        says = metadata.get("modelspec.architecture")
        telling = (
            any(name.startswith("single_transformer_blocks.") for name in modules)
            or any("double_blocks" in prefix for prefix in deltas)
            or any(delta.shape[1] == _FLUX_WIDTH for delta in deltas.values())
        )
        return "FLUX" if telling and (says is None or says.lower().startswith("flux-1")) else None
    if table is None:
        return None
    for name, delta in modules.items():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            return ARCHITECTURE_OF_WIDTH.get(delta.shape[1])
    # Only SDXL has several transformer layers, and only from 640 channels on.
    layers = (delta.shape for name, delta in modules.items() if ".transformer_blocks.1." in name)
    return "SDXL" if any(shape[0] in (640, 1280) for shape in layers) else None
