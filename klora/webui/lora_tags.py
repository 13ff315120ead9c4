"""The host's own LoRA tags beside a fusion: silenced for its files, and their hashes joined by its own."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from klora.errors import KloraError
from klora.hosts.webui.lora_library import Library
from klora.webui.messages import comment
from klora.webui.prompt_tag import NAME
from klora.webui.requested_fusion import RequestedFusion

_SHORT = 12


def yield_to(p: Any, params_list: list[Any], fusion: RequestedFusion, names: Library) -> None:
    """Silence the tags of the same files that end in the host's LoRA code: K-LoRA governs all of their modules."""
    ours = {fusion.subject.path, fusion.style.path}
    for handler, tags in _lora_tags(_data_with(p, params_list[0])).items():
        same = [(kind, params, name) for kind, params in tags if (name := _name_in(names, params, ours))]
        for kind, params, name in same:
            # For a handler whose turn comes later; `items`, by which conditionings are cached, stays as it is.
            params.positional = [params.positional[0], "0", "0"]
            params.named = {key: value for key, value in params.named.items() if key not in ("te", "unet")}
            comment(p, f"{name} is in a <{kind}:…> tag too; K-LoRA alone applies it")
        if same:
            # For one whose turn has been.
            silenced = [params for _, params, _ in same]
            handler.activate(p, [params for _, params in tags if not any(params is other for other in silenced)])


def _data_with(p: Any, params: Any) -> dict[str, list[Any]]:
    """The tags of the prompt that a tag of ours is in."""
    for data in (getattr(p, "extra_network_data", None), getattr(p, "hr_extra_network_data", None)):
        if data and any(params is other for other in data.get(NAME, ())):
            return dict(data)
    return {}


def _lora_tags(data: Mapping[str, list[Any]]) -> dict[Any, list[tuple[str, Any]]]:
    """The tags, each with its kind, by handler, of those handlers that are the host's or built upon it."""
    known = importlib.import_module("modules.extra_networks")
    of_host = importlib.import_module("extra_networks_lora").ExtraNetworkLora
    found: dict[Any, list[tuple[str, Any]]] = {}
    for kind, tags in data.items():
        handler = known.extra_network_registry.get(kind) or known.extra_network_aliases.get(kind)
        if isinstance(handler, of_host):
            found.setdefault(handler, []).extend((kind, params) for params in tags)
    return found


def _name_in(names: Library, params: Any, paths: Collection[Path]) -> str | None:
    """The name of the LoRA of a tag where its file is one of `paths`."""
    try:
        found = names.find(params.positional[0]) if params.positional else None
    except KloraError:
        return None
    return found.name if found is not None and found.path in paths else None


def add_hashes(p: Any, fusion: RequestedFusion) -> None:
    """Name both files in "Lora hashes", by which image sites and a later paste recognise them.

    The host's own hashes are those of the files as they were when it listed them.
    """
    shared = importlib.import_module("modules.shared")
    if not shared.opts.lora_add_hashes_to_infotext or getattr(shared.cmd_opts, "no_hashing", False):
        return
    hashes = dict(getattr(p, "lora_hashes", None) or {})
    for name, file in ((fusion.tag.subject, fusion.pair.subject), (fusion.tag.style, fusion.pair.style)):
        hashes[name.replace(":", "").replace(",", "")] = file.model_hash[:_SHORT]
    p.lora_hashes = hashes
    p.extra_generation_params["Lora hashes"] = ", ".join(f"{name}: {value}" for name, value in hashes.items())
