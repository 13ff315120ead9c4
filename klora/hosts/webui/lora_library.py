"""The LoRA files that a WebUI lists."""

from __future__ import annotations

import difflib
import importlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from klora.errors import KloraError


@dataclass(frozen=True)
class ListedLora:
    """A LoRA that the host lists."""

    name: str
    path: Path
    on_disk: Any


class Library:
    """The LoRA files that the host lists, by the names and aliases that `<lora:…>` accepts.

    A host whose LoRA extension is switched off lists none.
    """

    def __init__(self) -> None:
        self._networks = lora_code("networks") or _NONE

    def names(self) -> list[str]:
        """List the names, as the host's own menus do."""
        return sorted(self._networks.available_networks, key=str.casefold)

    def refresh(self) -> None:
        """Have the host look into its folders again."""
        self._networks.list_available_networks()

    def find(self, name: str) -> ListedLora:
        """The LoRA of that name or alias; KloraError where there is none."""
        on_disk = self._lookup(name)
        # The host does not notice by itself that a file has come, gone or moved to another folder.
        if on_disk is None or not Path(on_disk.filename).exists():
            self.refresh()
            on_disk = self._lookup(name)
        if on_disk is None:
            near = self._near(name)
            hint = f"did you mean {near}?" if near else "see the Lora tab for the names"
            raise KloraError(f"there is no LoRA named {name!r}; {hint}")
        return ListedLora(on_disk.name, Path(on_disk.filename), on_disk)

    def knows(self, name: str) -> bool:
        """Whether there is a LoRA of that name or alias."""
        return self._lookup(name) is not None

    def _near(self, name: str) -> str | None:
        """A listed name that is spelled like this one, or else holds it; "None" is a menu's word and like no name."""
        known = {one.casefold(): one for one in self.names()}
        typed = name.casefold()
        if typed == "none" or not typed:
            return None
        found = difflib.get_close_matches(typed, known, n=1) or [one for one in known if typed in one]
        return known[found[0]] if found else None

    def _lookup(self, name: str) -> Any:
        networks = self._networks
        if name.lower() in networks.forbidden_network_aliases:
            return networks.available_networks.get(name)
        return networks.available_network_aliases.get(name)


def lora_code(name: str) -> Any:
    """A module of the host's own LoRA code, by A1111's name for it; None where that code is switched off."""
    for path in (name, _IN_SDNEXT[name]):
        with suppress(ImportError):
            return importlib.import_module(path)
    return None


_IN_SDNEXT = {"networks": "modules.lora.lora_load", "extra_networks_lora": "modules.lora.extra_networks_lora"}
_NONE = SimpleNamespace(
    available_networks={},
    available_network_aliases={},
    forbidden_network_aliases={},
    list_available_networks=lambda: None,
)
