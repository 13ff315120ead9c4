"""The model that a WebUI has loaded, as the host that it is."""

from __future__ import annotations

from typing import Any

from klora.hosts.a1111 import A1111Host
from klora.hosts.forge import ForgeHost
from klora.hosts.webui_host import WebuiHost


def host_of(sd_model: Any) -> WebuiHost:
    """See a loaded model as a host."""
    return ForgeHost(sd_model) if hasattr(sd_model, "forge_objects") else A1111Host(sd_model)
