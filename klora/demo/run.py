"""The work of `klora demo`: the LoRAs of the project fused with the model of the project, on one sheet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from klora.api import fuse
from klora.errors import KloraError
from klora.generate import load_pipeline
from klora.report.files import OutputFile, png_bytes
from klora.report.picture import selection_map
from klora.report.sheet import contact_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

    from klora.fusion.plan import FusionPlan

HOME = Path(__file__).parent
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Method:
    """One way to use two LoRAs: a heading, its settings, and which of the catalogue's prompts is asked of it."""

    title: str
    settings: Mapping[str, Any]
    prompt: str


METHODS = (
    Method("subject alone", {"policy": "direct", "style_strength": 0}, "subject"),
    Method("style alone", {"policy": "direct", "subject_strength": 0}, "style"),
    Method("plain merge", {"policy": "direct"}, "both"),
    Method("K-LoRA", {}, "both"),
)


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
    """Give the pair of a subject and a style of the catalogue, by name; KloraError for a name that is not there."""
    for given, known in ((subject, catalogue["subjects"]), (style, catalogue["styles"])):
        if given not in known:
            raise KloraError(f"{given}: is not in the demo; choose {', '.join(known)}")
    a, b = catalogue["subjects"][subject], catalogue["styles"][style]
    prompts = {
        "subject": a["prompt"].format(family=a["family"]),
        "style": b["prompt"].format(family=a["family"]),
        "both": catalogue["prompt"].format(family=a["family"]),
    }
    return DemoPair(subject, style, (home / a["file"], home / b["file"]), prompts)


def run_demo(folder: Path, home: Path | None = None) -> Iterator[str]:
    """Paint every pair by every method for a few seeds; write a contact sheet and a selection map, and say where.

    Needs no network and no GPU. Raises KloraError where the installation lacks the model or `folder` takes no files.
    """
    home = home or HOME
    catalogue = read_catalogue(home)
    pairs = demo_pairs(catalogue, home)
    targets = {name: OutputFile.check(folder / f"{name}.png") for name in ("contact-sheet", "selection-map")}
    pipe = load_pipeline(str(home / catalogue["model"]), torch.float32)
    recommended = catalogue["recommended"]
    pipe.set_progress_bar_config(disable=True)
    groups: list[list[list[Image]]] = []
    maps: list[tuple[str, FusionPlan]] = []
    total = len(pairs) * len(METHODS)
    with one_thread(), tqdm(total=total, desc="painting", unit="cell", leave=False) as bar:
        for pair in pairs:
            groups.append([])
            for method in METHODS:
                with fuse(pipe, *pair.files, **method.settings) as session:
                    groups[-1].append(_paint(pipe, pair.prompts[method.prompt], recommended))
                bar.update()
            # The last method is K-LoRA, and its session knows the schedule that was really followed.
            maps.append((f"{pair.subject} × {pair.style}", session.plan))
    columns = [(method.title, _asked(method, pairs)) for method in METHODS]
    rows = [(f"{pair.subject}", f"× {pair.style}") for pair in pairs]
    title, plan = maps[0]
    for (name, target), image in zip(
        targets.items(), (contact_sheet(groups, columns, rows), selection_map(plan, title)), strict=True
    ):
        target.write(png_bytes(image))
        yield f"{name.replace('-', ' ')}: {target.path}"


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: for matrices this small, several are slower, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _paint(pipe: Any, prompt: str, recommended: Mapping[str, Any]) -> list[Image]:
    images: list[Image] = pipe(
        [prompt] * len(SEEDS),
        num_inference_steps=recommended["steps"],
        guidance_scale=recommended["guidance_scale"],
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
    ).images
    return images


def _asked(method: Method, pairs: list[DemoPair]) -> str:
    """Give the prompt of a column, which differs from row to row in what it names."""
    prompts = {pair.prompts[method.prompt] for pair in pairs}
    return f"“{prompts.pop()}”" if len(prompts) == 1 else f"“{pairs[0].prompts[method.prompt]}” …"
