"""Run by ComfyUI's own Python: what its LoRA code makes of files, in small models of its own classes.

    python key_map.py ROOT keys MODEL FILE             # its map of keys with the shapes of the weights that they mean
    python key_map.py ROOT load MODEL FOLDER LORA …    # of each LoRA: ΔW by weight, in a file of the same name there

Nothing of this repository is imported, as in the probe.
"""

import json
import logging
import sys
from pathlib import Path

ROOT, TASK, KIND, OUT, *LORA = sys.argv[1:]
del sys.argv[1:]
sys.path.insert(0, ROOT)
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

FLUX = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "context_in_dim": 32,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [2, 2, 4],
    "theta": 10000,
    "qkv_bias": True,
}
UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "use_temporal_attention": False,
}
MODELS = {
    "sd1": (
        supported.SD15,
        {
            **UNET,
            "num_res_blocks": [2] * 4,
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1] * 6 + [0] * 2,
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * 9 + [0] * 3,
            "context_dim": 768,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
        },
    ),
    "sdxl": (
        supported.SDXL,
        {
            **UNET,
            "num_res_blocks": [2] * 3,
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 1, 1, 2, 2],
            "transformer_depth_middle": 2,
            "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
            "context_dim": 2048,
            "use_linear_in_transformer": True,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
            "num_head_channels": 32,
        },
    ),
    "flux": (supported.Flux, {"image_model": "flux", **FLUX, "vec_in_dim": 32, "guidance_embed": True}),
    "chroma": (
        supported.Chroma,
        {"image_model": "chroma", **FLUX, "in_dim": 16, "out_dim": 32, "hidden_dim": 32, "n_layers": 1},
    ),
    "sd3": (
        supported.SD3,
        {
            "in_channels": 16,
            "patch_size": 2,
            "depth": 1,
            "num_blocks": 2,
            "adm_in_channels": 32,
            "context_size": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 32, "out_features": 64},
            },
            "pos_embed_scaling_factor": None,
            "pos_embed_max_size": 16,
            "input_size": None,
            "num_patches": 256,
        },
    ),
    "aura_flow": (
        supported.AuraFlow,
        {"cond_seq_dim": 32, "dim": 64, "n_heads": 2, "n_double_layers": 1, "n_layers": 3, "max_seq": 256},
    ),
    "pixart_sigma": (
        supported.PixArtSigma,
        {"image_model": "pixart_sigma", "hidden_size": 32, "num_heads": 4, "depth": 2, "caption_channels": 32},
    ),
    "lumina2": (
        supported.Lumina2,
        {
            "image_model": "lumina2",
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 2,
            "multiple_of": 16,
            "qk_norm": True,
            "cap_feat_dim": 32,
            "axes_dims": [2, 2, 4],
            "axes_lens": [64, 64, 64],
        },
    ),
    "wan": (
        supported.WAN21_T2V,
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 32,
            "ffn_dim": 48,
            "freq_dim": 16,
            "text_dim": 32,
            "in_dim": 4,
            "out_dim": 4,
            "num_heads": 4,
            "num_layers": 2,
        },
    ),
    "qwen_image": (
        supported.QwenImage,
        {
            "image_model": "qwen_image",
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
}


def model():
    kind, config = MODELS[KIND]
    config = kind({**config, "dtype": torch.float32})
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({}, "", device="cpu")


made = model()
shapes = {name: tuple(weight.shape) for name, weight in made.state_dict().items()}
known = comfy.lora.model_lora_keys_unet(made, {})


def read(target):
    """(name, rows, function) of a value of the map."""
    return (target, None, None) if isinstance(target, str) else (*target, None, None)[:3]


if TASK == "keys":
    found = {
        key: [name, shapes[name], rows]
        for key, target in known.items()
        for name, rows, function in [read(target)]
        if name in shapes and len(shapes[name]) > 1 and name.endswith(".weight") and function is None
    }
    Path(OUT).write_text(json.dumps(found))
else:
    said = []
    logging.warning = lambda *text: said.append(" ".join(map(str, text)))
    for lora in LORA:
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(lora)), known)
        changes = {}
        for target, patch in patches.items():
            name, rows, function = read(target)
            weight = changes.setdefault(name, torch.zeros(shapes[name]))
            changes[name] = comfy.lora.calculate_weight([(1.0, patch, 1.0, rows, function)], weight, name)
        save_file(changes, Path(OUT, Path(lora).name))
    print(json.dumps(said))
