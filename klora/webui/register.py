"""(Re)registers everything with the host: called by the entry script each time the host executes it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from klora.webui.prompt_tag import NAME


def register() -> None:
    """Register the tag and the callbacks.

    Reload UI clears all callbacks and executes only the entry script again, so nothing may be registered at import.
    """
    callbacks = importlib.import_module("modules.script_callbacks")
    for event, function in (
        ("before_ui", _register_tag),
        ("before_ui", _add_axes),
        ("ui_settings", _register_options),
        ("app_started", _add_routes),
        ("infotext_pasted", _on_pasted),
        ("cfg_denoiser", _on_evaluation),
        ("after_process", _on_processed),
        ("model_loaded", _release_memory),
        ("script_unloaded", _unregister_tag),
    ):
        _on(callbacks, event, function)


def _on(callbacks: Any, event: str, function: Callable[..., None]) -> None:
    """Register one callback, telling the host whose it is where it can be told.

    It would find out by the call stack, which takes it some 50 ms each time and would be most of our start-up time.
    """
    add, listed = getattr(callbacks, "add_callback", None), getattr(callbacks, "callback_map", {})
    key = f"callbacks_{event}"
    if add is not None and key in listed and {"category", "filename"} <= inspect.signature(add).parameters.keys():
        add(listed[key], function, category=event, filename=__file__)
    elif hasattr(callbacks, f"on_{event}"):
        getattr(callbacks, f"on_{event}")(function)


def _register_tag() -> None:
    from klora.webui.extra_network import make_extra_network

    importlib.import_module("modules.extra_networks").register_extra_network(make_extra_network())


def _unregister_tag() -> None:
    network = importlib.import_module("modules.extra_networks").extra_network_registry.pop(NAME, None)
    if network is not None:
        network.attached.detach_all()
        _release_memory(None)


def _on_evaluation(params: object) -> None:
    from klora.webui.extra_network import on_evaluation

    on_evaluation(params)


def _on_processed(p: object) -> None:
    from klora.webui.extra_network import on_processed

    on_processed(p)


def _release_memory(sd_model: object) -> None:
    """Leave the memory to the model that has come; the pairs of the last pictures are prepared again when needed."""
    from klora.engine.weights import KEPT

    KEPT.clear()


def _add_axes() -> None:
    from klora.webui.xyz_axes import add_axes

    add_axes()


def _register_options() -> None:
    from klora.webui.options import register_options

    register_options()


def _add_routes(demo: object, app: object) -> None:
    from klora.webui.api import add_routes

    add_routes(demo, app)


def _on_pasted(infotext: str, params: dict[str, Any]) -> None:
    from klora.webui.paste import on_pasted

    on_pasted(infotext, params)
