"""What `klora compare` and `klora evaluate` need, in small: a saved pipeline, a folder of a study, CLIP and DINO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.support.lora_files import write_lora
from tests.support.models import module_shapes
from tests.support.pipelines import sd_pipeline

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def write_model(folder: Path) -> dict[str, tuple[int, ...]]:
    """Save a tiny pipeline as `folder`/model; gives the shapes of its attention modules."""
    pipe = sd_pipeline(folder / "tokenizer", levels=2)
    pipe.save_pretrained(folder / "model")
    return {name: shape for name, shape in module_shapes(pipe.unet).items() if ".attn" in name}


def noise(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_study(folder: Path, attention: dict[str, tuple[int, ...]]) -> Path:
    """One subject and two styles, each with a LoRA and two reference pictures."""
    for seed, place in enumerate(("subjects/dog", "styles/ink", "styles/pop_art")):
        inside = folder / place
        inside.mkdir(parents=True)
        write_lora(inside / "lora.safetensors", attention, "kohya", rank=4, seed=seed)
        noise(10 * seed).save(inside / "a.png")
        noise(10 * seed + 1).save(inside / "b.jpg")
    (folder / "subjects/dog/prompt.txt").write_text("a sbu dog\n")
    return folder


def clip_model() -> Any:
    """A CLIP of two layers."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 54}, vision_config=VISION, projection_dim=12)).eval()


def vit_model() -> Any:
    """A ViT of two layers, as DINO is one."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(2)
    return ViTModel(ViTConfig(**VISION)).eval()


def write_encoders(folder: Path) -> tuple[Path, Path]:
    """Save both as their users find them, with their preprocessing."""
    from transformers import CLIPImageProcessor, ViTImageProcessor

    clip, dino = folder / "clip", folder / "dino"
    clip_model().save_pretrained(clip)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(clip)
    vit_model().save_pretrained(dino)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(dino)
    return clip, dino


def write_demo_home(folder: Path) -> Path:
    """What stands for the installed `klora/demo`: two subjects, three styles, a judge that has learned nothing."""
    from safetensors.torch import save_file

    from klora.demo.judge import JudgeNet

    attention = write_model(folder)
    subjects, styles = {}, {}
    for seed, (name, family) in enumerate({"bolt": "robot", "mimi": "cat"}.items()):
        write_lora(folder / f"{name}.safetensors", attention, "kohya", seed=seed)
        subjects[name] = {"file": f"{name}.safetensors", "family": family, "prompt": f"a sbu {family}"}
        subjects[name]["held_out"] = name == "mimi"
    for seed, name in enumerate(["neon", "dots", "ink"]):
        write_lora(folder / f"{name}.safetensors", attention, "peft", seed=10 + seed)
        styles[name] = {"file": f"{name}.safetensors", "prompt": "a {family} in szn style"}
        styles[name]["held_out"] = name != "neon"
    catalogue = {
        "model": "model",
        "recommended": {"steps": 2, "guidance_scale": 4.0},
        "prompt": "a sbu {family} in szn style",
        "subjects": subjects,
        "styles": styles,
    }
    (folder / "catalogue.json").write_text(json.dumps(catalogue))
    torch.manual_seed(0)
    judge = JudgeNet(len(subjects), len(styles))
    names = {"subjects": json.dumps(list(subjects)), "styles": json.dumps(list(styles))}
    save_file(judge.state_dict(), folder / "judge.safetensors", {"floor": "0.6", **names})
    return folder
