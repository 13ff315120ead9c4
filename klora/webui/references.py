"""Reference pictures in a WebUI: by name from one folder, never by path, as with LoRAs.

Whoever may send a prompt must not be able to name files of the machine, nor models to be downloaded.
"""

from __future__ import annotations

from pathlib import Path

from klora.errors import SettingsError
from klora.settings import Settings
from klora.webui.options import reference_folder, reference_models

REFERENCE_SETTINGS = ("style_refs", "subject_refs")
MODEL_SETTINGS = ("clip_model", "dino_model")


def with_references(settings: Settings) -> Settings:
    """Put the paths in the place of the references' names, and the models of the settings page with them.

    Raises SettingsError for what is not in the folder, and for a model named elsewhere than on the settings page.
    """
    usual = Settings()
    for name in MODEL_SETTINGS:
        if getattr(settings, name) != getattr(usual, name):
            raise SettingsError(name, "is chosen on the settings page of K-LoRA only")
    named = {name: _paths(name, getattr(settings, name)) for name in REFERENCE_SETTINGS if getattr(settings, name)}
    return Settings.parse({**settings.to_dict(), **named, **reference_models()}) if named else settings


def _paths(setting: str, names: str) -> str:
    folder = reference_folder().resolve()
    return ";".join(str(_inside(setting, folder, name.strip())) for name in names.split(";") if name.strip())


def _inside(setting: str, folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder) or not path.exists():
        raise SettingsError(
            setting, f"{name!r} is not a picture or folder in the folder of references (see the settings)"
        )
    return path
