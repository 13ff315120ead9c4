"""Tiny random models as folders of diffusers, and LoRAs for all their attention, for a real SD.Next to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.lora_files import write_lora
from tests.support.other_pipelines import make
from tests.support.pipelines import autoencoder, clip_text_model, clip_tokenizer, flux_pipeline, scheduler, sd_pipeline

WIDE = 784
"""The host takes a text encoder no wider than SD 1's for one that gives no pooled text."""

ENDS = {"flux": ("lora_down", "lora_up"), "z_image": ("lora_A", "lora_B")}

Shapes = dict[str, tuple[int, int]]


def write_models(folder: Path) -> dict[str, Shapes]:
    """Write the models; give the shapes of their attention, and of their text encoders, by diffusers name."""
    pipes = {
        "sd": sd_pipeline(folder / "tokenizer"),
        "sd_other": sd_pipeline(folder / "tokenizer"),
        "sdxl": sdxl_pipeline(folder / "tokenizer"),
        "flux": flux_pipeline(folder / "tokenizer"),
        "z_image": z_image_pipeline(),
    }
    with torch.no_grad():
        for weight in pipes["sd_other"].unet.parameters():
            weight.mul_(0.9)
    for name, pipe in pipes.items():
        pipe.save_pretrained(str(folder / name))
    return {name: shapes_of(pipe) for name, pipe in pipes.items()}


def write_loras(folder: Path, models: dict[str, Shapes]) -> None:
    """Write a subject and a style for each model; those of SD 1 also in PEFT's spelling, with a text part, as DoRA."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shapes in models.items():
        attention = {key: shape for key, shape in shapes.items() if not key.startswith("text_encoder")}
        for seed, side in enumerate(("subject", "style")):
            common: dict[str, Any] = {"rank": 4, "seed": seed, "strength": 0.3}
            if name.startswith("sd"):
                write_lora(folder / f"{name}_{side}.safetensors", attention, **common)
            else:
                write_transformer_lora(folder / f"{name}_{side}.safetensors", attention, ENDS[name], seed)
            if name == "sd":
                write_lora(folder / f"{name}_{side}_peft.safetensors", attention, "peft", **common)
                write_lora(folder / f"{name}_{side}_dora.safetensors", attention, family="dora", **common)
                more = {**common, "seed": seed + 2}
                write_lora(folder / f"{name}_more_{side}.safetensors", shapes, **more)
                write_full_loras(folder, f"{name}_{side}", attention, **more)
                text = folder / f"{name}_{side}_text.safetensors"
                write_lora(text, shapes, **common)
                # As kohya's own SD 1 files have it.
                tensors = {key.replace("lora_te1_", "lora_te_"): tensor for key, tensor in load_file(text).items()}
                save_file(tensors, str(text))


def write_full_loras(folder: Path, name: str, shapes: Shapes, rank: int, seed: int, strength: float) -> None:
    """Differences of the attention's whole weights; in a second file with those of the norms before it, as LyCORIS."""
    path = write_lora(
        folder / f"{name}_full.safetensors", shapes, family="full", seed=seed, strength=strength, rank=rank
    )
    tensors = {key: 0.5 * tensor for key, tensor in load_file(path).items()}
    save_file(tensors, str(path))
    draw = torch.Generator().manual_seed(seed)
    for module, (_, width) in shapes.items():
        block, attention, _ = module.partition(".attn1.to_q")
        if attention:
            key = f"lora_unet_{block}.norm1".replace(".", "_")
            tensors |= {f"{key}.{leaf}": torch.randn(width, generator=draw) * 0.3 for leaf in ("w_norm", "b_norm")}
    save_file(tensors, str(folder / f"{name}_norms.safetensors"))


def write_merged(models: Path, lora: Path) -> None:
    """Write the small SD 1 once more, with the differences of a file in its weights."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(models / "sd"), safety_checker=None)
    leaves = {"diff": "weight", "w_norm": "weight", "b_norm": "bias"}
    modules = {f"lora_unet_{name}".replace(".", "_"): module for name, module in pipe.unet.named_modules()}
    with torch.no_grad():
        for key, tensor in load_file(lora).items():
            module, _, leaf = key.partition(".")
            getattr(modules[module], leaves[leaf]).add_(tensor)
    pipe.save_pretrained(str(models / "sd_merged"))


def write_transformer_lora(path: Path, shapes: Shapes, ends: tuple[str, str], seed: int, rank: int = 4) -> None:
    """A LoRA by the transformer's own paths, its weights' names ending as the host knows them."""
    down, up = ends
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, inside) in shapes.items():
        tensors[f"transformer.{name}.{down}.weight"] = torch.randn(rank, inside, generator=draw) * inside**-0.5
        tensors[f"transformer.{name}.{up}.weight"] = torch.randn(out, rank, generator=draw) * 0.1
    save_file(tensors, str(path))


def shapes_of(pipe: Any) -> Shapes:
    """The shapes of the attention's and the first text encoder's linear layers."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    found = {name: shape for name, shape in _linears(model) if ".attn" in name or ".attention." in name}
    for name, shape in _linears(pipe.text_encoder):
        if "self_attn" in name:
            # Recent transformers drop a level, which LoRA files keep.
            found[f"text_encoder.text_model.{name.removeprefix('text_model.')}"] = shape
    return found


def _linears(model: nn.Module) -> list[tuple[str, tuple[int, int]]]:
    return [
        (name, (module.out_features, module.in_features))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def sdxl_pipeline(folder: Path) -> Any:
    """SDXL in small, with a second text encoder that the host takes for one."""
    import diffusers

    torch.manual_seed(0)
    first, second = clip_text_model(), clip_text_model(with_projection=True, width=WIDE)
    width = first.config.hidden_size + WIDE
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        cross_attention_dim=width,
        attention_head_dim=(1, 2, 4),
        block_out_channels=(8, 16, 32),
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=second.config.projection_dim + 6 * 8,
    ).eval()
    return diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=autoencoder(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        scheduler=scheduler("EulerDiscreteScheduler"),
        add_watermarker=False,
    )


def z_image_pipeline() -> Any:
    """Z-Image in small, with a text encoder of its kind that knows a few letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    pipe, _ = make("z_image")
    width = pipe.transformer.config.cap_feat_dim
    letters = {letter: index for index, letter in enumerate("?_abcdefghijklmnopqrstuvwxyz")}
    core = Tokenizer(models.WordLevel(letters, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="_")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(letters),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    pipe.register_modules(text_encoder=Qwen3ForCausalLM(config).eval(), tokenizer=tokenizer)
    return pipe
