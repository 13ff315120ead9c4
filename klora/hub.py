"""Where a model comes from: a folder, or the hub, which is asked once whether it is there.

The hub's own libraries ask a hub that cannot be reached again and again, with pauses, for every file of a model: half
a minute passes before they say so. Where it does not answer, they get what is kept of it on this machine, or nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from klora.errors import KloraError

PATIENCE = 2.0
"""Seconds in which the hub has to answer."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """A folder or a hub id, and whether only files of this machine will do."""

    name: str
    local_files_only: bool

    def load(self, kind: Any, **options: Any) -> Any:
        """Give what `kind`, a class of diffusers or transformers, makes of it by its `from_pretrained`."""
        return kind.from_pretrained(self.name, local_files_only=self.local_files_only, **options)


def find_model(model: str, config: str = "config.json") -> ModelSource:
    """Say where a model, a folder or a hub id, is loaded from; `config` is a file that each such model has.

    Raises KloraError for what is neither, and for a hub id where the hub does not answer and nothing is kept of it.
    """
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        return ModelSource(str(folder), local_files_only=True)
    if folder.is_file():
        reason = "it is a file"
    elif not _HUB_ID.fullmatch(model):
        reason = "there is no such folder, and it is not a hub id either"
    elif hub_answers():
        return ModelSource(model, local_files_only=False)
    elif _is_kept(model, config):
        return ModelSource(model, local_files_only=True)
    else:
        reason = "there is no such folder, and the hub does not answer"
    raise KloraError(f"{model}: cannot be loaded ({reason}); give a folder, or a hub id (owner/name) while online")


def hub_answers() -> bool:
    """Whether the hub gives an answer, of any kind, in time; no where HF_HUB_OFFLINE forbids to ask."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=PATIENCE))
        # Releases of the hub's library have clients of different kinds, with errors of their own.
        except Exception:
            return

    # In a thread, since no limit of a client covers the look-up of a host's name.
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return bool(answers)


def _is_kept(model: str, config: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, config), str)
