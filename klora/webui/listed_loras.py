"""The LoRAs that a menu can offer."""

from __future__ import annotations

from klora.webui.ui import Names


def listed() -> Names:
    """The host's LoRAs; none where it knows no LoRAs at all."""
    try:
        from klora.hosts.webui.lora_library import Library

        return Library()
    except ImportError:
        return _NoLoras()


class _NoLoras:
    """Stands for the list of a host whose LoRA extension is switched off."""

    def names(self) -> list[str]:
        """List nothing."""
        return []

    def refresh(self) -> None:
        """Find nothing."""
