"""(Re)registers everything with the host: called by the entry script each time the host executes it."""

from __future__ import annotations

import importlib
from typing import Any

from klora.webui.prompt_tag import NAME


def register() -> None:
    """Register the tag and the callbacks.

    Reload UI clears all callbacks and executes only the entry script again, so nothing may be registered at import.
    """
    callbacks = importlib.import_module("modules.script_callbacks")
    callbacks.on_before_ui(_register_tag)
    callbacks.on_before_ui(_add_axes)
    callbacks.on_ui_settings(_register_options)
    callbacks.on_app_started(_add_routes)
    callbacks.on_infotext_pasted(_on_pasted)
    callbacks.on_cfg_denoiser(_on_evaluation)
    callbacks.on_script_unloaded(_unregister_tag)


def _register_tag() -> None:
    from klora.webui.runtime import make_extra_network

    importlib.import_module("modules.extra_networks").register_extra_network(make_extra_network())


def _unregister_tag() -> None:
    importlib.import_module("modules.extra_networks").extra_network_registry.pop(NAME, None)


def _on_evaluation(params: object) -> None:
    from klora.webui.runtime import on_evaluation

    on_evaluation(params)


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
