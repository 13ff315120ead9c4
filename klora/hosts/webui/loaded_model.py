"""The model that a WebUI has loaded, as the host that it is."""

from __future__ import annotations

import importlib
from typing import Any

from klora.hosts.base import Host
from klora.hosts.sdnext import SdnextHost, is_pipeline
from klora.hosts.webui.a1111 import A1111Host
from klora.hosts.webui.forge import ForgeHost
from klora.hosts.webui.host import WebuiHost


def host_of(sd_model: Any) -> WebuiHost:
    """See a loaded model as a host that calls back before every evaluation."""
    return ForgeHost(sd_model) if hasattr(sd_model, "forge_objects") else A1111Host(sd_model)


def model_of(loaded: Any) -> Host:
    """See a loaded model as the host that it is; KloraError for a pipeline that K-LoRA cannot fuse in."""
    return SdnextHost(loaded) if is_pipeline(loaded) else host_of(loaded)


def loaded_host() -> Host | None:
    """The model that the next picture is made with, as a host; None where it is not loaded yet, which stays so."""
    data = importlib.import_module("modules.sd_models").model_data
    # Forge and Neo load what has been chosen for the next picture; till then the last one is there, or a stand-in.
    waits = hasattr(data, "forge_hash") and data.forge_hash != str(data.forge_loading_parameters)
    return None if waits or data.sd_model is None else model_of(data.sd_model)
