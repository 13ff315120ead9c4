"""Modules that a model's original code and diffusers call otherwise, where neither a host's map nor a rule has both.

Each pair is a part of a dotted path, in diffusers and in the original code of Wan, Chroma, Z-Image or Lumina 2.
"""

from __future__ import annotations

from collections.abc import Iterator

PAIRS = (
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


def renamed(path: str) -> Iterator[str]:
    """What a path is called where any one part of it has its other name."""
    whole = f".{path}."
    for ours, theirs in PAIRS:
        for one, other in ((ours, theirs), (theirs, ours)):
            if f".{one}." in whole:
                yield whole.replace(f".{one}.", f".{other}.")[1:-1]
