"""The extension's page in the host's settings."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klora.fusion.policies import policies_with
from klora.settings import Settings, options
from klora.webui.args import choices_of, setting_options, text_of
from klora.webui.controls import changed_defaults, hint_of, slider_reach
from klora.webui.prompt_tag import NAME

if TYPE_CHECKING:
    from klora.cache import ScoreCache

SECTION = (NAME, "K-LoRA")
DEFAULTED = tuple(
    name
    for name, option in setting_options().items()
    if name != "share" and not option.hidden and not policies_with(name)
)
"""Settings whose first value in the accordion a user can choose; a tag does not heed it, so that it says it all."""

REFERENCES = f"{NAME}_references_folder"
MODELS = {"clip_model": f"{NAME}_clip_model", "dino_model": f"{NAME}_dino_model"}
CACHE_FOLDER, CACHE_MEGABYTES, SHOW_MAP = f"{NAME}_cache_folder", f"{NAME}_cache_megabytes", f"{NAME}_show_map"
_MEGABYTES = 256


def register_options() -> None:
    """Add the page; called by the host when it builds its settings."""
    import gradio as gr

    shared = importlib.import_module("modules.shared")

    category = _category()

    def heading(key: str, text: str) -> None:
        """Begin a group of settings, where the host has headings."""
        make = getattr(importlib.import_module("modules.options"), "OptionHTML", None)
        if make is not None:
            made = make(text)
            made.section, made.category_id = SECTION, category
            shared.opts.add_option(f"{NAME}_heading_{key}", made)

    def add(key: str, default: Any, label: str, info: str, *component: Any) -> Any:
        if isinstance(default, str) and not component:
            component = (gr.Textbox, {"max_lines": 1})
        made = shared.OptionInfo(default, label, *component, section=SECTION).info(info)
        made.category_id = category
        shared.opts.add_option(key, made)
        return made

    heading("files", "Maps and scores")
    add(SHOW_MAP, False, "Always add the selection map to the gallery", "also for tags typed into the prompt")
    where = "empty: cache/klora in the WebUI's data folder"
    add(CACHE_FOLDER, "", "Folder that keeps the scores of LoRA files", where)
    add(
        CACHE_MEGABYTES,
        _MEGABYTES,
        "Size of that folder, in MB",
        "the least recently used are deleted when it is full",
        gr.Number,
    )
    heading("references", "Reference pictures")
    add(REFERENCES, "", "Folder of reference pictures", "empty: klora-references in the WebUI's data folder")
    for name, key in MODELS.items():
        add(key, getattr(Settings(), name), options()[name].label, options()[name].help)
    heading("defaults", "What the accordion begins with")
    for name in DEFAULTED:
        option, default = setting_options()[name], text_of(getattr(Settings(), name))
        component: tuple[Any, ...] = ()
        if choices := choices_of(name, option):
            component = (gr.Dropdown, {"choices": list(choices)})
        elif reach := slider_reach(name, option):
            component = (gr.Slider, {"minimum": reach.low, "maximum": reach.high, "step": reach.step})
        elif not option.optional and not option.free:
            component = (gr.Number, {"precision": 0 if option.kind is int else None})
        hint = hint_of(name, option) or option.help
        add(default_key(name), default, option.label, hint, *component).needs_reload_ui()


def _category() -> str | None:
    """Name a group of our own among the host's, where it groups its settings; it would be "Uncategorized" otherwise."""
    categories = getattr(importlib.import_module("modules.options"), "categories", None)
    if categories is not None:
        categories.register_category(NAME, SECTION[1])
    return None if categories is None else NAME


def default_key(setting: str) -> str:
    """The host's name of the option that holds a setting's default."""
    return f"{NAME}_default_{setting}"


def defaults() -> dict[str, Any]:
    """The accordion's first values that the user chose."""
    return changed_defaults(lambda name: _option(default_key(name), getattr(Settings(), name)), DEFAULTED)


def map_always_wanted() -> bool:
    """Whether every picture comes with its selection map."""
    return bool(_option(SHOW_MAP, False))


def reference_folder() -> Path:
    """The folder whose pictures a prompt may name as references."""
    folder = str(_option(REFERENCES, "") or "").strip()
    return Path(folder or Path(importlib.import_module("modules.paths").data_path) / f"{NAME}-references")


def reference_models() -> dict[str, str]:
    """The models that compare with references, by setting."""
    return {name: str(_option(key, "") or getattr(Settings(), name)) for name, key in MODELS.items()}


def score_cache() -> ScoreCache:
    """The cache of scores in the folder, and of the size, that the settings say."""
    from klora.cache import ScoreCache

    folder = str(_option(CACHE_FOLDER, "") or "").strip()
    paths = importlib.import_module("modules.paths")
    try:
        size = max(0, int(float(_option(CACHE_MEGABYTES, _MEGABYTES)) * 2**20))
    except (TypeError, ValueError, OverflowError):
        size = _MEGABYTES * 2**20
    return ScoreCache(folder or Path(paths.data_path) / "cache" / NAME, size)


def _option(key: str, default: Any) -> Any:
    return getattr(importlib.import_module("modules.shared").opts, key, default)
