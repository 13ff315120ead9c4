"""Pictures on disk: numbered, and each with all that made it in its PNG."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klora.lora.weighted import weighted_name
from klora.report.files import OutputFile, png_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

_NUMBERED = re.compile(r"(\d{5,})-.*\.png")


def next_number(folder: Path) -> int:
    """The number after the highest in use, so that no picture is ever overwritten."""
    taken = [int(match[1]) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    return max(taken, default=-1) + 1


def write_picture(image: Image, path: Path, facts: dict[str, Any]) -> Path:
    """Write a PNG that carries its facts, for people and for programs; KloraError where that fails."""
    texts = {"parameters": parameters(facts), "klora": json.dumps(facts)}
    OutputFile.check(path).write(png_bytes(image, texts))
    return path


def parameters(facts: dict[str, Any]) -> str:
    """Write the facts as people and image viewers read them: prompt, negative prompt, one line of the rest."""
    settings = facts["settings"]
    rows = {
        "Steps": facts["steps"],
        "Sampler": facts["scheduler"],
        "CFG scale": facts["guidance_scale"],
        "Seed": facts["seed"],
        "Size": "x".join(map(str, facts["size"])),
        "Model": facts["model"],
        "K-LoRA subject": _side(facts["subject"]),
        "K-LoRA style": _side(facts["style"]),
        **{f"K-LoRA {name.replace('_', ' ')}": value for name, value in settings.items() if value not in (None, "")},
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in rows.items())
    negative = [f"Negative prompt: {facts['negative_prompt']}"] if facts["negative_prompt"] else []
    return "\n".join([facts["prompt"], *negative, line])


def _side(facts: dict[str, Any]) -> str:
    """The names of a side's LoRAs: dog*0.8 + coat."""
    loras = facts.get("loras", [facts])
    return " + ".join(weighted_name(Path(lora["file"]).stem, lora.get("weight", 1)) for lora in loras)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text
