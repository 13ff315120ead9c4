"""Whether a pair goes with the chosen checkpoint, told in the accordion before a picture is made."""

from __future__ import annotations

from klora.errors import KloraError, named_by
from klora.webui.args import NONE
from klora.webui.prompt_tag import quoted_name


def misfit(subject: str, style: str, checkpoint: str) -> str:
    """Say that a pair is for another model than the checkpoint of that title, or is no pair; else nothing."""
    from klora.hosts.webui.checkpoints import architecture_of, made_for, two_models
    from klora.hosts.webui.lora_library import Library
    from klora.webui.sides import find_side, open_pair

    if NONE in (subject, style) or not subject or not style:
        return ""
    names = Library()
    try:
        sides = find_side(quoted_name(subject), "subject", names), find_side(quoted_name(style), "style", names)
        with named_by(*(one.lora.path for side in sides for one in side)):
            meant = made_for(open_pair(*sides))
    except KloraError as error:
        return str(error)
    chosen = architecture_of(checkpoint) if checkpoint else None
    return two_models(meant, chosen) if meant and chosen and meant != chosen else ""
