"""`klora evaluate --demo`: the model of the project and its LoRAs, judged by the project's classifier."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from klora.demo import run
from klora.demo.judge import Judge
from klora.evaluate.study import Concept, StudyPair

if TYPE_CHECKING:
    from PIL.Image import Image

METHODS = ",".join(
    (
        "k-lora:scale=s",
        "k-lora:scale=s*",
        "direct:preset=1,1",
        "direct:preset=0.5,0.5",
        "direct:preset=1/3,2/3",
        # One moment for the whole network: what is gained by choosing in each module shows against it.
        "fixed",
        "random",
        "top-k",
        "no-gamma",
        "dynamic",
        "switch",
        "composite",
        "cm-lora",
        "b-lora",
        "est",
        "np-lora",
        "lego",
        # What each file can do when it is alone.
        "direct:style_strength=0",
        "direct:subject_strength=0",
    )
)

TITLE = "The project's own model"
NOTES = (
    "32×32 pixels, painted by the model of the project; its judge says what it recognises, in place of CLIP and DINO",
    "a toy: which method leads here need not lead on a real model",
)


def demo_study() -> tuple[StudyPair, ...]:
    """Pair every subject that comes with the project with every style."""
    catalogue = run.read_catalogue(run.HOME)
    pairs = []
    for names in itertools.product(catalogue["subjects"], catalogue["styles"]):
        found = run.demo_pair(catalogue, run.HOME, *names)
        subject, style = (Concept(name, file, "") for name, file in zip(names, found.files, strict=True))
        pairs.append(StudyPair(subject, style, found.prompts["both"]))
    return tuple(pairs)


class Recognition:
    """Whether the judge names the subject, the style, and both; in place of CLIP and DINO, which know no such toys."""

    metrics: Mapping[str, str] = {
        "subject_recognised": "subject recognised",
        "style_recognised": "style recognised",
        "both_recognised": "both recognised",
    }
    balanced: Sequence[str] = ("subject_recognised", "style_recognised")

    def __init__(self, device: str) -> None:
        """Load the judge, which stays on the CPU whatever the `device`: pictures this small cost nothing there."""
        weights = run.HOME / "judge.safetensors"
        self.judge = Judge.load(weights)
        self._digest = hashlib.sha256(weights.read_bytes()).hexdigest()

    def key(self, pair: StudyPair) -> str:
        """Give a digest of the judge, and what it is asked for."""
        return f"{self._digest} {pair.name}"

    def __call__(self, image: Image, pair: StudyPair) -> dict[str, float]:
        """Give 1 for what the judge names rightly, else 0."""
        verdict = self.judge([image])[0]
        subject, style = verdict.subject == pair.subject.name, verdict.style == pair.style.name
        return {
            "subject_recognised": float(subject),
            "style_recognised": float(style),
            "both_recognised": float(subject and style),
        }
