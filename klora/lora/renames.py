"""Modules that a model's original code and diffusers call otherwise, where neither a host's map nor a rule has both.

Each entry has two names, in diffusers and in the original code: `ENDINGS` of dotted paths, in Wan, Chroma, Z-Image,
Lumina 2 and FLUX.2; whole `PATHS` of Anima (in diffusers Cosmos Predict 2), where # stands for a block's number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

ENDINGS = (
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
    *((f"attn.to_{leaf}", f"attention.to_{leaf}") for leaf in "qkv"),
    ("norm1.linear", "adaLN_modulation.1"),
    ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_caption_embed.caption_embedder.1", "cap_embedder.1"),
    ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
    ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    ("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    *((f"{name}.linear", f"{name}.lin") for name in ("double_stream_modulation_img", "double_stream_modulation_txt")),
    ("single_stream_modulation.linear", "single_stream_modulation.lin"),
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
_BLOCK_NUMBER = re.compile(r"(?<=blocks\.)[0-9]+(?=\.)")


def _both_ways(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    others: dict[str, list[str]] = {}
    for ours, theirs in pairs:
        others.setdefault(ours, []).append(theirs)
        others.setdefault(theirs, []).append(ours)
    return others


_OTHER_ENDINGS = _both_ways(ENDINGS)
_OTHER_PATHS = _both_ways(PATHS.items())


def renamed(path: str) -> Iterator[str]:
    """What else a path is called, as a whole or with another ending."""
    number = _BLOCK_NUMBER.search(path)
    for other in _OTHER_PATHS.get(_BLOCK_NUMBER.sub("#", path), ()):
        yield other.replace("#", number[0]) if number else other
    starts = [0, *(place + 1 for place, character in enumerate(path) if character == ".")]
    for start in starts:
        for other in _OTHER_ENDINGS.get(path[start:], ()):
            yield path[:start] + other
