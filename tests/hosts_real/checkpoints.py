"""What the checkpoints of a host hold, and LoRA files made to fit them."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.lora_files import lora_tensors, unet_ldm, unet_ldm_table

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."
ATTENTION = tuple(f"{block}.{leaf}" for block in ("attn1", "attn2") for leaf in ("to_q", "to_k", "to_v", "to_out.0"))
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")
RESNET = ("conv1", "conv2", "time_emb_proj")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file with the shapes of its tensors."""

    path: Path
    shapes: Shapes

    @property
    def is_sd1(self) -> bool:
        key = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        return self.shapes.get(key, (0, 0))[1] == 768 and any(name.startswith(TEXT) for name in self.shapes)

    @property
    def is_sdxl(self) -> bool:
        return any(name.startswith("conditioner.embedders.1.") for name in self.shapes)

    def modules(self, *leaves: str) -> Shapes:
        """Shapes of the UNet's modules that end so, by diffusers name; leaves of a transformer without its number."""
        levels = 3 if self.is_sdxl else 4
        found = {}
        for container in unet_ldm_table(levels):
            if ".resnets." in container:
                names = [f"{container}.{leaf}" for leaf in RESNET if leaf in leaves]
            elif ".attentions." in container:
                inner = [leaf for leaf in (*ATTENTION, *FEED_FORWARD) if leaf in leaves]
                names = [f"{container}.{leaf}" for leaf in PROJECTIONS if leaf in leaves]
                names += [f"{container}.transformer_blocks.{n}.{leaf}" for n in range(10) for leaf in inner]
            else:
                continue
            for name in names:
                shape = self.shapes.get(f"{UNET}{unet_ldm(name, levels)}.weight")
                if shape:
                    found[name] = shape
        return found

    def text(self) -> Shapes:
        """Shapes of the text encoders' linears, by transformers name."""
        found = {}
        for key, shape in self.shapes.items():
            if match := re.fullmatch(rf"(?:{TEXT}|conditioner\.embedders\.0\.transformer\.)(.+layers.+)\.weight", key):
                if len(shape) == 2:
                    found[f"text_encoder.{match[1]}"] = shape
            elif match := re.fullmatch(r"conditioner\.embedders\.1\..+resblocks\.(\d+)\.attn\.in_proj_weight", key):
                layer, width = f"text_encoder_2.text_model.encoder.layers.{match[1]}", shape[1]
                for leaf in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    found[f"{layer}.self_attn.{leaf}"] = (width, width)
        return found


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return Checkpoint(path, {key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"})


def write_sdxl_loras(folder: Path, model: Checkpoint) -> None:
    """Write the same for an SDXL checkpoint, as kohya names its modules there."""
    with_text = {**model.modules(*ATTENTION), **model.text()}
    _write(folder / "xl_subj.safetensors", with_text, 4, 4.0, 11, "ldm")
    _write(folder / "xl_style.safetensors", with_text, 4, 2.0, 12, "ldm")
    _write(folder / "xl_style_peft.safetensors", with_text, 4, 2.0, 12, "peft")


def write_loras(folder: Path, model: Checkpoint) -> None:
    """Write the files that the tests name in their prompts."""
    attention = model.modules(*ATTENTION)
    everything = model.modules(*ATTENTION, *FEED_FORWARD, *PROJECTIONS, *RESNET)
    with_text = {**attention, **model.text()}
    _write(folder / "subj.safetensors", attention, 8, 8.0, 1)
    _write(folder / "style.safetensors", attention, 16, 8.0, 2)
    _write(folder / "subj_peft.safetensors", attention, 8, 8.0, 1, "peft")
    _write(folder / "style_peft.safetensors", attention, 16, 8.0, 2, "peft")
    _write(folder / "subj_all.safetensors", everything, 4, 4.0, 3)
    _write(folder / "style_all.safetensors", everything, 4, 4.0, 4)
    _write(folder / "subj_te.safetensors", with_text, 8, 4.0, 5)
    _write(folder / "style_te.safetensors", with_text, 4, 4.0, 6)
    _write(folder / "subj_te_peft.safetensors", with_text, 8, 4.0, 5, "peft")
    _write(folder / "style_te_peft.safetensors", with_text, 4, 4.0, 6, "peft")
    # A LoRA of another architecture: the names are SDXL's, and no SD 1 model has them.
    other = {f"down_blocks.2.attentions.0.transformer_blocks.{n}.attn1.to_q": (64, 64) for n in range(2, 10)}
    _write(folder / "other.safetensors", other, 4, 4.0, 7)
    (folder / "broken.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{broken")


def _write(path: Path, shapes: Shapes, rank: int, alpha: float, seed: int, spelling: str = "kohya") -> None:
    """Write a random LoRA whose deltas are about a third as large as the weights, some larger and some smaller."""
    strength = 0.35 * rank**0.5 / alpha
    tensors = lora_tensors(shapes, spelling, rank=rank, seed=seed, strength=strength)
    draw = random.Random(seed)
    written: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        # As kohya's own SD 1 files have it.
        name = key.replace("lora_te1_", "lora_te_") if spelling == "kohya" else key
        if key.endswith((".lora_up.weight", ".lora_B.weight")):
            tensor = tensor * 2 ** draw.uniform(-1, 1)
            if spelling == "peft":
                # No alpha: both spellings are to mean the same.
                tensor = tensor * (alpha / rank)
            else:
                written[name.replace(".lora_up.weight", ".alpha")] = torch.tensor(alpha)
        written[name] = tensor.contiguous()
    save_file(
        written, str(path), metadata={"ss_base_model_version": "sdxl_base_v1-0" if spelling == "ldm" else "sd_v1-5"}
    )
