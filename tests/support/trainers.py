"""Small files as each trainer spells them for each model, and docs/formats.md's table of what is read of them.

python -m tests.support.trainers    # write the table anew
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from klora.errors import KloraError
from klora.hosts.diffusers.pipeline import DiffusersHost
from klora.lora.file import LoraFile
from tests.support.lora_files import flux_ldm, unet_ldm
from tests.support.other_pipelines import make
from tests.support.pipelines import PIPELINES

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- trainers: begin -->\n", "<!-- trainers: end -->\n"
TITLES = {
    "sd": "SD 1",
    "sdxl": "SDXL",
    "flux": "FLUX",
    "sd3": "SD 3",
    "chroma": "Chroma",
    "qwen_image": "Qwen-Image",
    "lumina2": "Lumina 2",
    "z_image": "Z-Image",
    "sana": "Sana",
    "aura_flow": "AuraFlow",
    "pixart_sigma": "PixArt Σ",
    "flux2": "FLUX.2",
    "wan": "Wan",
}
Shapes = Mapping[str, tuple[int, int]]
Rename = Callable[[str], str | None]
RANK = 2


def shapes_of(pipe: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears that the files train: attention, and what FLUX's own code fuses with it.

    Of SDXL's many transformer blocks the first one each.
    """
    model = getattr(pipe, "unet", None) or pipe.transformer
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and re.search(r"attn|attention\.|^single_\w+\.\d+\.proj_(mlp|out)$", name)
        and not re.search(r"attentions\.\d\.transformer_blocks\.[1-9]", name)
    }


def as_it_is(name: str) -> str:
    return name


def original_flux(name: str) -> str:
    """In Black Forest Labs' own code."""
    return str(flux_ldm(name))


def original_wan(name: str) -> str:
    name = name.replace("attn1", "self_attn").replace("attn2", "cross_attn")
    return re.sub(r"\.to_([qkv])", r".\1", name).replace(".to_out.0", ".o")


def original_sd3(name: str) -> str:
    block, _, rest = name.removeprefix("transformer_blocks.").partition(".")
    attention, _, leaf = rest.partition(".")
    stream = "context_block" if "add" in leaf else "x_block"
    return f"joint_blocks.{block}.{stream}.{attention}.{'proj' if 'out' in leaf else 'qkv'}"


def original_lumina(name: str) -> str:
    stem, _, leaf = name.partition(".attn.")
    return f"{stem}.attention.{'out' if 'out' in leaf else 'qkv'}"


def original_flux2(name: str) -> str:
    if name.startswith("single_"):
        stem, _, leaf = name.removeprefix("single_transformer_").partition(".attn.")
        return f"single_{stem}.{'linear2' if leaf == 'to_out' else 'linear1'}"
    return original_flux(name)


def xlabs(name: str) -> str | None:
    """XLabs' name of a module of FLUX; it trains the attention of double blocks."""
    block, _, leaf = original_flux(name).partition("_attn.")
    stem, _, stream = block.rpartition(".")
    return f"{stem}.processor.{leaf}_lora{'1' if stream == 'img' else '2'}" if leaf else None


class Spelling(NamedTuple):
    """What stands before a module's name, how it is called if it is trained, and which tensors follow it."""

    root: str
    rename: Rename = as_it_is
    endings: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    family: str = "lora"
    alpha: bool = False
    bias: bool = False

    def tensors(self, shapes: Shapes) -> dict[str, Tensor]:
        """A file of modules with these shapes; those under one name are the rows of one tensor."""
        rows: dict[str, tuple[int, int]] = {}
        for name, (out, width) in shapes.items():
            path = str(self.rename(name))
            prefix = self.root + (path.replace(".", "_") if self.root.endswith("_") else path)
            rows[prefix] = (out + rows.get(prefix, (0, 0))[0], width)
        found: dict[str, Tensor] = {}
        for prefix, (out, width) in rows.items():
            for ending, shape in self._shapes(out, width).items():
                found[f"{prefix}.{ending}"] = torch.ones(shape)
        return found

    def _shapes(self, out: int, width: int) -> dict[str, tuple[int, ...]]:
        if self.family == "lokr":
            own: dict[str, tuple[int, ...]] = {"lokr_w1": (4, 4), "lokr_w2": (out // 4, width // 4)}
        elif self.family == "loha":
            own = {f"hada_w{i}_{side}": (out, RANK) if side == "a" else (RANK, width) for i in (1, 2) for side in "ab"}
        else:
            own = {self.endings[0]: (RANK, width), self.endings[1]: (out, RANK)}
        if self.family == "dora":
            own["dora_scale"] = (out, 1)
        if self.bias:
            own["lora_B.bias"] = (out,)
        return {**own, "alpha": ()} if self.alpha else own


KOHYA = ("lora_down.weight", "lora_up.weight")
kohya = partial(Spelling, endings=KOHYA, alpha=True)
sd_blocks, sdxl_blocks = partial(unet_ldm, levels=4), partial(unet_ldm, levels=3)
# By their models' original code, in the formats of OneTrainer that go by it.
ORIGINAL: dict[str, Rename] = {
    "sd": sd_blocks,
    "sdxl": sdxl_blocks,
    "flux": original_flux,
    "sd3": original_sd3,
    "chroma": original_flux,
    "qwen_image": as_it_is,
    "z_image": as_it_is,
    "flux2": original_flux2,
}
one_trainer_original = {
    model: [Spelling(root, rename, alpha=True) for root in ("diffusion_model.", "")]
    for model, rename in ORIGINAL.items()
}
in_diffusers = {model: [Spelling("unet." if model in ("sd", "sdxl") else "transformer.")] for model in TITLES}
in_peft = {model: [Spelling("base_model.model.")] for model in TITLES}
TRAINERS: dict[str, dict[str, list[Spelling]]] = {
    "sd-scripts": {
        "sd": [kohya("lora_unet_")],
        "sdxl": [kohya("lora_unet_", sdxl_blocks)],
        "flux": [kohya("lora_unet_", original_flux)],
        "sd3": [kohya("lora_unet_", original_sd3)],
        "chroma": [kohya("lora_unet_", original_flux)],
        "lumina2": [kohya("lora_unet_", original_lumina)],
    },
    "LyCORIS": {
        "sd": [kohya("lora_unet_", family=family) for family in ("lora", "loha", "lokr", "dora")],
        "sdxl": [kohya("lora_unet_", sdxl_blocks, family=family) for family in ("lora", "loha", "lokr", "dora")],
        "flux": [kohya("lycoris_", family=family) for family in ("loha", "lokr")],
        "sd3": [kohya("lycoris_", family="lokr")],
        "sana": [kohya("lycoris_", family="lokr")],
        "pixart_sigma": [kohya("lycoris_", family="lokr")],
    },
    "ai-toolkit": {
        "sd": [kohya("lora_unet_")],
        "sdxl": [kohya("lora_unet_")],
        "flux": [Spelling("transformer."), Spelling("transformer.", family="lokr", alpha=True)],
        "sd3": [Spelling("transformer.")],
        "chroma": [Spelling("diffusion_model.", original_flux)],
        "qwen_image": [Spelling("diffusion_model."), Spelling("diffusion_model.", family="lokr", alpha=True)],
        "lumina2": [Spelling("transformer."), Spelling("transformer.", family="lokr", alpha=True)],
        "z_image": [Spelling("diffusion_model."), Spelling("diffusion_model.", family="lokr", alpha=True)],
        "aura_flow": [kohya("lora_transformer_")],
        "pixart_sigma": [kohya("lora_transformer_")],
        "flux2": [
            Spelling("diffusion_model.", original_flux2),
            Spelling("diffusion_model.", original_flux2, family="lokr", alpha=True),
        ],
        "wan": [Spelling("diffusion_model.", original_wan)],
    },
    "OneTrainer": {
        "sd": [kohya("lora_unet_"), kohya("lora_unet_", family="dora"), *one_trainer_original["sd"]],
        "sdxl": [kohya("lora_unet_"), kohya("lora_unet_", sdxl_blocks), *one_trainer_original["sdxl"]],
        **{
            model: [
                Spelling("transformer."),
                kohya("transformer."),
                kohya("lora_transformer_"),
                *([kohya("lora_unet_", ORIGINAL[model])] if model in ORIGINAL else []),
                *one_trainer_original.get(model, []),
            ]
            for model in ("flux", "sd3", "chroma", "qwen_image", "z_image", "sana", "pixart_sigma", "flux2")
        },
    },
    "SimpleTuner": {model: [*in_diffusers[model], kohya("lycoris_", family="lokr")] for model in TITLES},
    "musubi-tuner": {
        model: [kohya("lora_unet_", rename, family=family) for family in ("lora", "loha", "lokr")]
        for model, rename in (
            ("flux", original_flux),
            ("qwen_image", as_it_is),
            ("z_image", as_it_is),
            ("flux2", original_flux2),
            ("wan", original_wan),
        )
    },
    "diffusers": in_diffusers,
    "PEFT": in_peft,
    "XLabs": {"flux": [Spelling("", xlabs, ("down.weight", "up.weight"))]},
    "BFL": {"flux": [Spelling("", original_flux), Spelling("", original_flux, bias=True)]},
    "fal": {"flux": [Spelling("base_model.model.", original_flux)]},
}


def outcome(spelling: Spelling, shapes: Shapes, host: DiffusersHost) -> str:
    """What K-LoRA makes of one file: "all", "n of m" modules, or "refused"."""
    shapes = {name: shape for name, shape in shapes.items() if spelling.rename(name)}
    try:
        file = LoraFile.open(spelling.tensors(shapes)).for_model(host.index)
    except KloraError:
        return "refused"
    read = file.modules.keys() & shapes.keys()
    if read == shapes.keys() == file.modules.keys() and not file.unmatched:
        return "all"
    return f"{len(read)} of {len(shapes)}"


def row(model: str, folder: Path) -> list[str]:
    """The cells of one model, a trainer each; empty where no file was made."""
    pipe = PIPELINES[model](folder) if model in PIPELINES else make(model)[0]
    shapes, host = shapes_of(pipe), DiffusersHost(pipe)
    cells = []
    for models in TRAINERS.values():
        found = [outcome(one, shapes, host) for one in models.get(model, ())]
        cells.append(", ".join(dict.fromkeys(found)))
    return cells


def table() -> str:
    """The table in Markdown."""
    lines = [["", *TRAINERS], ["---"] * (1 + len(TRAINERS))]
    with tempfile.TemporaryDirectory() as folder:
        lines += [[title, *row(model, Path(folder) / model)] for model, title in TITLES.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def written() -> str:
    """The table that the page has."""
    return PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}{table()}{END}{tail}", "utf-8")
