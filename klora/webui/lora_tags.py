"""The host's own LoRA tags beside a fusion: silenced for its files, and their hashes joined by its own."""

from __future__ import annotations

import importlib
from typing import Any

from klora.errors import KloraError
from klora.hosts.lora_library import Library
from klora.webui.messages import comment
from klora.webui.prompt_tag import NAME
from klora.webui.requested_fusion import RequestedFusion


def yield_to(p: Any, params_list: list[Any], fusion: RequestedFusion, names: Library) -> None:
    """Silence `<lora:…>` tags of the same files: K-LoRA governs all of their modules."""
    ours = {fusion.subject.path, fusion.style.path}
    data: dict[str, list[Any]] = next(
        (
            data
            for data in (getattr(p, "extra_network_data", None), getattr(p, "hr_extra_network_data", None))
            if data and any(params is params_list[0] for params in data.get(NAME, ()))
        ),
        {},
    )
    plain = data.get("lora", [])
    silenced = []
    for params in plain:
        try:
            found = names.find(params.positional[0]) if params.positional else None
        except KloraError:
            continue
        if found is not None and found.path in ours:
            # With both its strengths at 0; `items`, by which conditioning is cached, stays as it is.
            params.positional = [params.positional[0], "0", "0"]
            params.named = {key: value for key, value in params.named.items() if key not in ("te", "unet")}
            silenced.append(found.name)
    if silenced:
        comment(p, f"{', '.join(silenced)} is in a <lora:…> tag too; K-LoRA alone applies it")
        # The host may have activated its tags before this one.
        registry = importlib.import_module("modules.extra_networks").extra_network_registry
        registry["lora"].activate(p, plain)


def add_hashes(p: Any, fusion: RequestedFusion) -> None:
    """Name both files in "Lora hashes", by which image sites and a later paste recognise them."""
    shared = importlib.import_module("modules.shared")
    if not shared.opts.lora_add_hashes_to_infotext:
        return
    hashes = dict(getattr(p, "lora_hashes", None) or {})
    for name, lora in ((fusion.tag.subject, fusion.subject), (fusion.tag.style, fusion.style)):
        if lora.shorthash:
            hashes[name.replace(":", "").replace(",", "")] = lora.shorthash
    p.lora_hashes = hashes
    if hashes:
        p.extra_generation_params["Lora hashes"] = ", ".join(f"{name}: {value}" for name, value in hashes.items())
