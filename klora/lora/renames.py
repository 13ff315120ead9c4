"""Modules that a model's original code and diffusers call otherwise, where neither a host's map nor a rule has both.

Each entry has two names, in diffusers and in the original code: `PARTS` of dotted paths, of Wan, Chroma, Z-Image or
Lumina 2; `PATHS` of Anima (in diffusers Cosmos Predict 2) as a whole, where # stands for a block's number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PARTS = (
    *((f"attn1.to_{leaf}", f"self_attn.{leaf}") for leaf in "qkv"),
    *((f"attn2.to_{leaf}", f"cross_attn.{leaf}") for leaf in "qkv"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn2.add_k_proj", "cross_attn.k_img"),
    ("attn2.add_v_proj", "cross_attn.v_img"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("linear_1", "in_layer"),
    ("linear_2", "out_layer"),
    ("attention.to_out.0", "attention.out"),
    ("attn.to_out.0", "attention.out"),
    *((f"feed_forward.linear_{number}", f"feed_forward.w{number}") for number in (1, 2, 3)),
)

_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "output_proj"}
_BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
    **{
        f"norm{number}.linear_{layer}": f"adaln_modulation_{part}.{layer}"
        for number, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for layer in (1, 2)
    },
}
PATHS = {
    **{f"transformer_blocks.#.{ours}": f"blocks.#.{theirs}" for ours, theirs in _BLOCK.items()},
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
    "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
    "norm_out.linear_1": "final_layer.adaln_modulation.1",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
    "proj_out": "final_layer.linear",
}
_OTHER_PATHS = PATHS | {theirs: ours for ours, theirs in PATHS.items()}
_BLOCK_NUMBER = re.compile(r"(?<=blocks\.)[0-9]+(?=\.)")


def renamed(path: str) -> Iterator[str]:
    """What a path is called where it, or any one part of it, has its other name."""
    number = _BLOCK_NUMBER.search(path)
    if other := _OTHER_PATHS.get(_BLOCK_NUMBER.sub("#", path)):
        yield other.replace("#", number[0]) if number else other
    whole = f".{path}."
    for ours, theirs in PARTS:
        for one, other in ((ours, theirs), (theirs, ours)):
            if f".{one}." in whole:
                yield whole.replace(f".{one}.", f".{other}.")[1:-1]
