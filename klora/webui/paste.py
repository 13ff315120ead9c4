"""Pasted texts, on the host's side: what the controls become, and files that have another name here, by their hash."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from klora.hosts.webui.lora_library import lora_code
from klora.webui.infotext import PASTERS, rename_by_hash

SECONDS = 20.0
"""How long a paste may wait for files to be hashed; the one that is being read then is read to its end."""


def _update(paste: Callable[[Mapping[str, Any]], Any], params: Mapping[str, Any]) -> Any:
    """The update of a control, None for no change. SD.Next takes no bare value of what is no name of a field."""
    import gradio as gr

    value = paste(params)
    return None if value is None else gr.update(value=value)


FIELDS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    name: partial(_update, paste) for name, paste in PASTERS.items()
}
"""What each control is told when a text is pasted.

The same objects in both tabs: by them the host pairs controls when a picture is sent from one tab to the other.
"""


def on_pasted(_infotext: str, params: dict[str, Any]) -> None:
    """Rename LoRAs in pasted klora tags; called by the host, which does so for its own tags only."""
    rename_by_hash(params, name_here)


def name_here(name: str, shorthash: str) -> str | None:
    """The name here of the LoRA with that hash; None where there is none, or `name` is that very file."""
    networks = lora_code("networks")
    same = networks.available_network_aliases.get(name)
    if same is not None and same.shorthash == shorthash:
        return None
    found = networks.available_network_hash_lookup.get(shorthash)
    if found is None and same is None:
        found = _search(networks, shorthash)
    return None if found is None else str(found.get_alias())


def _search(networks: Any, shorthash: str) -> Any:
    """The LoRA of a hash among those not hashed yet, the latest renamed first; None where SECONDS do not tell."""
    unknown = [entry for entry in networks.available_networks.values() if not entry.hash]
    until = time.monotonic() + SECONDS
    for entry in sorted(unknown, key=_changed, reverse=True):
        if time.monotonic() > until:
            break
        entry.read_hash()
        if entry.shorthash == shorthash:
            return entry
    return None


def _changed(entry: Any) -> float:
    try:
        return os.stat(entry.filename).st_ctime
    except OSError:
        return 0.0
