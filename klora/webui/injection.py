"""The accordion's tag into the prompts, so that all that comes after sees one truth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from klora.errors import KloraError
from klora.hosts.sdnext import is_refined, own_detail_prompt
from klora.webui.args import FusionRequest, asks_for_more, override_tag, read_args
from klora.webui.messages import comment, fail, note
from klora.webui.prompt_tag import NAME, Tag, find_tag

OVERRIDES = "klora_overrides"
"""Where a processing object keeps what an X/Y/Z axis has set."""

WRITTEN = "klora_written"
"""Where a processing object, and a copy of it that a grid's cell is, keeps the tag that the accordion has written."""

PLANS = "klora_plans"
"""Where a processing object keeps the plans that ran, for the selection map."""

# What the host takes for a tag.
_ANY_TAG = re.compile(r"<(\w+):([^>]+)>")
_TYPED = f"<{NAME}:"
_TAG = re.compile(rf"<{NAME}:[^>]+>")
_LIKE_TAG = re.compile("<k-?lora:", re.IGNORECASE)


def apply_request(p: Any, args: Sequence[Any]) -> FusionRequest | None:
    """Write into the prompts of `p` what `args` and the axes ask for; give the request if it is what counts.

    A tag that the user typed wins over `args`, not over the axes, and it is said. Raises SettingsError, and then
    nothing is changed.
    """
    overrides: Mapping[str, Any] = getattr(p, OVERRIDES, None) or {}
    _tell_of_no_tags(p)
    if any(_TAG.search(prompt) for prompt in p.all_prompts):
        written = getattr(p, WRITTEN, None)
        typed = written is None or not any(written in prompt for prompt in p.all_prompts)
        if overrides:
            _change(p, lambda prompt: rewrite(prompt, overrides))
        if typed:
            _tell_of_unused(p, args)
        return None
    request = read_args(args, overrides)
    if request is None:
        if overrides:
            raise KloraError("an axis needs a pair: enable K-LoRA, or type a tag into the prompt")
        return None
    tag = str(request.tag)
    _change(p, lambda prompt: rewrite(prompt, overrides) if _TAG.search(prompt) else add_tag(prompt, tag))
    setattr(p, WRITTEN, tag)
    return request


def _tell_of_no_tags(p: Any) -> None:
    """Name what looks like a tag of ours and is none."""
    for prompt in {*p.all_prompts, *(getattr(p, "all_hr_prompts", None) or ())}:
        if found := _LIKE_TAG.search(_TAG.sub("", prompt)):
            fault = "has no pair or no >" if found[0] == _TYPED else "is spelled otherwise"
            note(p, f"{found[0]}… in the prompt does nothing, for it {fault}; write <{NAME}:subject:style>")
            return
    negative = ("all_negative_prompts", "all_hr_negative_prompts")
    for prompt in (prompt for name in negative for prompt in getattr(p, name, None) or ()):
        if found := _LIKE_TAG.search(prompt):
            note(p, f"{found[0]}… in the negative prompt is plain text to this WebUI; put it into the prompt")
            return


def _tell_of_unused(p: Any, args: Sequence[Any]) -> None:
    """Say that a typed tag counts more than `args`, which may be bad all the same."""
    try:
        if asks_for_more(args):
            comment(p, f"the <{NAME}:…> tag in the prompt counts, not the pair and settings beside it")
    except KloraError as error:
        fail(p, str(error), "the tag in the prompt counts, and what is set beside it is bad")


def _change(p: Any, change: Any) -> None:
    """Replace, never edit: the lists may be those of the user's request, or of another cell of a grid."""
    changed: dict[str, Any] = {"all_prompts": [change(prompt) for prompt in p.all_prompts]}
    if getattr(p, "enable_hr", False) and getattr(p, "all_hr_prompts", None):
        changed["all_hr_prompts"] = [change(prompt) for prompt in p.all_hr_prompts]
    # SD.Next's name for a second pass's prompt; without one that pass goes on with the first prompt. Its refiner would
    # read the tag as words.
    if getattr(p, "enable_hr", False) and getattr(p, "refiner_prompt", "") and not is_refined(p):
        changed["refiner_prompt"] = change(p.refiner_prompt)
    if details := own_detail_prompt(p):
        changed["detailer_prompt"] = "\n".join(change(line) for line in details.split("\n"))
    # The grid's text is made of this one.
    main = getattr(p, "main_prompt", None)
    if isinstance(main, str):
        changed["main_prompt"] = change(main)
    for name, value in changed.items():
        setattr(p, name, value)


def add_tag(prompt: str, tag: str) -> str:
    """Put a tag behind a prompt, or before it where the end would swallow it (a comment, an unclosed tag)."""
    if not prompt.strip():
        return tag
    behind = f"{prompt} {tag}"
    found = any(match.group(0) == tag for match in _ANY_TAG.finditer(behind))
    if found and "#" not in prompt.rpartition("\n")[2]:
        return behind
    return f"{tag} {prompt}"


def rewrite(prompt: str, overrides: Mapping[str, Any]) -> str:
    """Change the first tag of a prompt, the one that counts; a bad one stays, to be complained of later."""
    try:
        tag = find_tag(prompt)
    except KloraError:
        return prompt
    if tag is None or not overrides:
        return prompt
    changed = override_tag(tag, overrides)
    return _TAG.sub(lambda _: str(changed), prompt, count=1)


def pair_of(p: Any) -> Tag | None:
    """The tag that `p` ran with, None where there is none or a bad one."""
    try:
        return find_tag(p.all_prompts[0]) if getattr(p, "all_prompts", None) else None
    except KloraError:
        return None
