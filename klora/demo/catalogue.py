"""What comes with the project: a model, its LoRAs, and the prompts that they were trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora.errors import KloraError

HOME = Path(__file__).parent


@dataclass(frozen=True)
class DemoPair:
    """A subject and a style of the catalogue, with the prompts for each alone and for both."""

    subject: str
    style: str
    files: tuple[Path, Path]
    prompts: Mapping[str, str]


def read_catalogue(home: Path) -> dict[str, Any]:
    """Read what comes with the project; KloraError where it is missing from the installation."""
    try:
        catalogue: dict[str, Any] = json.loads((home / "catalogue.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KloraError(
            f"{home / 'catalogue.json'}: the demo model is not in this installation; install klora again"
        ) from None
    return catalogue


def demo_pairs(catalogue: Mapping[str, Any], home: Path) -> list[DemoPair]:
    """Pair the subjects and styles of the catalogue in their order."""
    names = zip(catalogue["subjects"], catalogue["styles"], strict=False)
    return [demo_pair(catalogue, home, subject, style) for subject, style in names]


def demo_pair(catalogue: Mapping[str, Any], home: Path, subject: str, style: str) -> DemoPair:
    """The pair of a subject and a style of the catalogue, by name; KloraError for a name that is not there."""
    files = lora_file(catalogue, home, "subject", subject), lora_file(catalogue, home, "style", style)
    a, b = catalogue["subjects"][subject], catalogue["styles"][style]
    prompts = {
        "subject": a["prompt"].format(family=a["family"]),
        "style": b["prompt"].format(family=a["family"]),
        "both": catalogue["prompt"].format(family=a["family"]),
    }
    return DemoPair(subject, style, files, prompts)


def lora_file(catalogue: Mapping[str, Any], home: Path, side: str, name: str) -> Path:
    """The file of a subject or a style; KloraError for a name that is not there."""
    known = catalogue[f"{side}s"]
    if name not in known:
        raise KloraError(f"{name}: is not in the demo; choose {', '.join(known)}")
    return home / str(known[name]["file"])


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: for matrices this small, several are slower, and far slower on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
