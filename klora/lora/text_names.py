"""The modules of text encoders: CLIP (one or two), and T5, which counts as the second until a model is at hand."""

from __future__ import annotations

import re

from klora.lora.unet_names import NUMBER, flat_table

_NORMS = ["layer_norm1", "layer_norm2"]
_CLIP = flat_table([*(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2", *_NORMS])
_CLIP |= {f"self_attn_to_{p}_lora": f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")}
_T5_FF = [f"DenseReluDense.{leaf}" for leaf in ("wi", "wi_0", "wi_1", "wo")]
_T5 = flat_table([*(f"SelfAttention.{leaf}" for leaf in "qkvo"), *_T5_FF, "layer_norm"])
_CLIP_TOP = {"text_projection": "text_projection", "final_layer_norm": "text_model.final_layer_norm"}

_PREFIX = re.compile(
    r"(?:lora_te([123]?)|text_encoder(?:_([23]))?|(?:text_encoders_)?(clip_l|clip_h|clip_g|t5xxl)(?:_transformer)?)_(?:text_model_)?(.+)"
)
_ANY = re.compile(r"(?:lora_te[0-9]?|text_encoders?(?:_[0-9])?|clip_[lgh]|t5xxl)_")
_CLIP_LAYER = re.compile(rf"encoder_layers_{NUMBER}_(.+)")
_T5_LAYER = re.compile(rf"encoder_block_{NUMBER}_layer_{NUMBER}_(.+)")


def find(flat: str) -> str | None:
    """`text_encoder.…` or `text_encoder_2.…` for the flattened name of a text encoder's module, or None."""
    match = _PREFIX.fullmatch(flat)
    if match is None:
        return None
    kohya, diffusers, comfy, rest = match.groups()
    encoder = kohya or diffusers or comfy
    second = encoder in ("2", "clip_g")
    if layer := _CLIP_LAYER.fullmatch(rest):
        leaf = _CLIP.get(layer[2])
        path = leaf and encoder not in ("3", "t5xxl") and f"text_model.encoder.layers.{layer[1]}.{leaf}"
    elif layer := _T5_LAYER.fullmatch(rest):
        # It is the first, second or third, and kohya numbers it 3 in all models.
        leaf, second = _T5.get(layer[3]), True
        path = leaf and f"encoder.block.{layer[1]}.layer.{layer[2]}.{leaf}"
    else:
        path = _CLIP_TOP.get(rest) if encoder not in ("3", "t5xxl") else None
    root = "text_encoder_2" if second else "text_encoder"
    return f"{root}.{path}" if path else None


def t5_path(name: str) -> str:
    """The path of a T5's module without the encoder that it counts as; empty for any other."""
    path = name.partition(".")[2]
    return path if path.startswith("encoder.block.") else ""


def is_text(flat: str) -> bool:
    """Whether a flattened name is that of a text encoder's module, known or not."""
    return _ANY.match(flat) is not None
