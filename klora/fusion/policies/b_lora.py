"""B-LoRA (Frenkel et al., Implicit Style-Content Separation using B-LoRA, ECCV 2024, arXiv 2403.14572)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType

from klora.errors import SettingsError
from klora.fusion.policies.base import NEITHER, STYLE, SUBJECT, Active, Moment, Policy

CONTENT_BLOCK, STYLE_BLOCK = "up_blocks.0.attentions.0.", "up_blocks.0.attentions.1."


def owner(module: str) -> Active:
    """The LoRA that a module of SDXL belongs to; neither outside the two blocks."""
    if module.startswith(CONTENT_BLOCK):
        return SUBJECT
    return STYLE if module.startswith(STYLE_BLOCK) else NEITHER


class BLora(Policy):
    """The subject in one block of SDXL, the style in the next, nothing else: a filter on ordinary LoRAs."""

    name = "b-lora"
    title = "B-LoRA blocks"
    static = True
    defaults = MappingProxyType({"text_encoder": "none"})  # two blocks and nothing else

    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        return owner(module)

    def decide_other(self, module: str, allowed: Active, moment: Moment) -> Active:
        return allowed.times(owner(module))

    def notices(self, subject: Sequence[str], style: Sequence[str]) -> Iterable[str]:
        for side, names, block in (("subject", subject, CONTENT_BLOCK), ("style", style, STYLE_BLOCK)):
            if not any(name.startswith(block) for name in names):
                yield f"the {side} file has nothing in SDXL's {block.rstrip('.')}, so in b-lora it does nothing"

    def check_model(self, modules: Iterable[str]) -> None:
        if not any(owner(module) != NEITHER for module in modules):
            raise SettingsError(
                "policy",
                "b-lora is for SDXL; these files, or this model, have none of its two blocks; use another policy",
            )
