"""Modules that a model's original code and diffusers call otherwise, where neither a host's map nor a rule has both.

Names are dotted paths, # stands for a number in them. `ENDINGS` are ends of paths that Wan, Chroma, Z-Image, Lumina 2
and FLUX.2 have; `BLOCKS` and `TOP` whole paths of each model, in diffusers and in the original code. What the original
code stores fused has several names in diffusers, in the order of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

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
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
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
    ("norm_out.linear_2", "final_layer.linear"),
    ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    ("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    *((f"{name}.linear", f"{name}.lin") for name in ("double_stream_modulation_img", "double_stream_modulation_txt")),
    ("single_stream_modulation.linear", "single_stream_modulation.lin"),
)

Leaves = Mapping[str, str]
"""Original name → name in diffusers, or several with spaces between where it is fused."""

_QKV, _ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_MLP = {"fc1": "net.0.proj", "fc2": "net.2"}
_ANIMA = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}
_AURA = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_AURA_ADDED = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}
_AURA_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
# PixArt and Sana.
_CROSS = {
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0",
}
_FLUX_ATTENTION = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_FLUX_NORMS = {
    f"{stream}_attn.norm.{of}_norm.scale": f"attn.norm_{added}{of[0]}.weight"
    for stream, added in (("img", ""), ("txt", "added_"))
    for of in ("query", "key")
}

BLOCKS: tuple[tuple[str, str, Leaves], ...] = (
    # Anima and Cosmos Predict 2
    (
        "blocks.#",
        "transformer_blocks.#",
        {
            **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in _ANIMA.items()},
            **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in _ANIMA.items()},
            "mlp.layer1": "ff.net.0.proj",
            "mlp.layer2": "ff.net.2",
            **{
                f"adaln_modulation_{part}.{layer}": f"norm{number}.linear_{layer}"
                for number, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
                for layer in (1, 2)
            },
        },
    ),
    # Stable Diffusion 3
    (
        "joint_blocks.#",
        "transformer_blocks.#",
        {
            "x_block.attn.qkv": _QKV,
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.proj": "attn2.to_out.0",
            "context_block.attn.qkv": _ADDED,
            "context_block.attn.proj": "attn.to_add_out",
            **{f"x_block.mlp.{theirs}": f"ff.{ours}" for theirs, ours in _MLP.items()},
            **{f"context_block.mlp.{theirs}": f"ff_context.{ours}" for theirs, ours in _MLP.items()},
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        },
    ),
    # Lumina 2 and Z-Image
    *(
        (f"{stack}.#", f"{stack}.#", {"attention.qkv": f"{name}.to_q {name}.to_k {name}.to_v"})
        for stack in ("layers", "noise_refiner", "context_refiner")
        for name in ("attn", "attention")
    ),
    # FLUX.2, and FLUX where it is not known by rule
    (
        "double_blocks.#",
        "transformer_blocks.#",
        {
            **_FLUX_ATTENTION,
            **_FLUX_NORMS,
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    (
        "single_blocks.#",
        "single_transformer_blocks.#",
        {
            "linear1": "attn.to_qkv_mlp_proj",
            "linear2": "attn.to_out",
            "linear1_qkv": _QKV,
            "norm.query_norm.scale": "attn.norm_q.weight",
            "norm.key_norm.scale": "attn.norm_k.weight",
        },
    ),
    # HunyuanVideo
    (
        "double_blocks.#",
        "transformer_blocks.#",
        {
            **{key.replace("attn.", "attn_"): leaves for key, leaves in _FLUX_ATTENTION.items()},
            "img_mod.linear": "norm1.linear",
            "txt_mod.linear": "norm1_context.linear",
            **{f"img_mlp.{theirs}": f"ff.{ours}" for theirs, ours in _MLP.items()},
            **{f"txt_mlp.{theirs}": f"ff_context.{ours}" for theirs, ours in _MLP.items()},
            "img_attn_q_norm": "attn.norm_q",
            "img_attn_k_norm": "attn.norm_k",
            "txt_attn_q_norm": "attn.norm_added_q",
            "txt_attn_k_norm": "attn.norm_added_k",
        },
    ),
    ("single_blocks.#", "single_transformer_blocks.#", {"modulation.linear": "norm.linear"}),
    *(
        (
            "txt_in.individual_token_refiner.blocks.#",
            "context_embedder.token_refiner.refiner_blocks.#",
            {
                f"self_attn{dot}qkv": _QKV,
                f"self_attn{dot}proj": "attn.to_out.0",
                f"mlp.{first}": "ff.net.0.proj",
                f"mlp.{second}": "ff.net.2",
                "adaLN_modulation.1": "norm_out.linear",
            },
        )
        for dot, first, second in (("_", "fc1", "fc2"), (".", "0", "2"))
    ),
    # AuraFlow
    (
        "double_layers.#",
        "joint_transformer_blocks.#",
        {
            **{f"attn.w2{theirs}": f"attn.{ours}" for theirs, ours in _AURA.items()},
            **{f"attn.w1{theirs}": f"attn.{ours}" for theirs, ours in _AURA_ADDED.items()},
            **{f"mlpX.{theirs}": f"ff.{ours}" for theirs, ours in _AURA_MLP.items()},
            **{f"mlpC.{theirs}": f"ff_context.{ours}" for theirs, ours in _AURA_MLP.items()},
            "modX.1": "norm1.linear",
            "modC.1": "norm1_context.linear",
        },
    ),
    (
        "single_layers.#",
        "single_transformer_blocks.#",
        {
            **{f"attn.w1{theirs}": f"attn.{ours}" for theirs, ours in _AURA.items()},
            **{f"mlp.{theirs}": f"ff.{ours}" for theirs, ours in _AURA_MLP.items()},
            "modCX.1": "norm1.linear",
        },
    ),
    # PixArt and Sana
    (
        "blocks.#",
        "transformer_blocks.#",
        {
            **_CROSS,
            **{f"mlp.{theirs}": f"ff.{ours}" for theirs, ours in _MLP.items()},
            "mlp.inverted_conv.conv": "ff.conv_inverted",
            "mlp.depth_conv.conv": "ff.conv_depth",
            "mlp.point_conv.conv": "ff.conv_point",
        },
    ),
    # Wan: norms and modulations
    (
        "blocks.#",
        "blocks.#",
        {
            "modulation": "scale_shift_table",
            "norm3.weight": "norm2.weight",
            "norm3.bias": "norm2.bias",
            **{
                f"{theirs}.norm_{of}.weight": f"{ours}.norm_{of}.weight"
                for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for of in "qk"
            },
        },
    ),
)

TOP: tuple[Leaves, ...] = (
    # Anima
    {
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
    },
    # Stable Diffusion 3, PixArt
    {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    },
    {
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    },
    # Z-Image
    {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
    # FLUX, FLUX.2, HunyuanVideo
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "img_in.proj": "x_embedder.proj",
        **{
            f"{theirs}_in.mlp.{place}": f"time_text_embed.{ours}_embedder.linear_{number}"
            for theirs, ours in (("time", "timestep"), ("guidance", "guidance"))
            for place, number in ((0, 1), (2, 2))
        },
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "txt_in.input_embedder": "context_embedder.proj_in",
        "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
        "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
        "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
        "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    },
    # AuraFlow
    {
        "init_x_linear": "pos_embed.proj",
        "cond_seq_linear": "context_embedder",
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "final_linear": "proj_out",
    },
    # LTX, Wan
    {
        "patchify_proj": "proj_in",
        "adaln_single.linear": "time_embed.linear",
        "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
    },
    {"head.modulation": "scale_shift_table"},
)
_NUMBER = re.compile(r"((?:blocks|layers|refiner)\.)([0-9]+)(?=\.)")


def _both_ways(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    others: dict[str, list[str]] = {}
    for ours, theirs in pairs:
        others.setdefault(ours, []).append(theirs)
        others.setdefault(theirs, []).append(ours)
    return others


def _paths() -> Iterator[tuple[str, tuple[str, ...]]]:
    """(original name, names in diffusers) of all whole paths."""
    for theirs, ours, leaves in BLOCKS:
        for leaf, names in leaves.items():
            yield f"{theirs}.{leaf}", tuple(f"{ours}.{name}" for name in names.split())
    for leaves in TOP:
        for leaf, name in leaves.items():
            yield leaf, (name,)


_OTHER_ENDINGS = _both_ways(ENDINGS)
_OTHER_PATHS = _both_ways((names[0], path) for path, names in _paths() if len(names) == 1)
_FUSED: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
for _path, _parts in _paths():
    if len(_parts) > 1:
        _FUSED.setdefault(_parts[0], []).append((_path, _parts))


def renamed(path: str) -> Iterator[str]:
    """What else a path is called, with another ending or as a whole: the last names are the surest."""
    yield from renamed_ending(path)
    yield from renamed_whole(path)


def renamed_whole(path: str) -> Iterator[str]:
    """What else a whole path of one of the models is called."""
    pattern, number = _pattern(path)
    for other in _OTHER_PATHS.get(pattern, ()):
        if ("#" in other) == bool(number):
            yield other.replace("#", number)


def renamed_ending(path: str) -> Iterator[str]:
    """What a path is called with another ending, whatever model it is of."""
    starts = [0, *(place + 1 for place, character in enumerate(path) if character == ".")]
    for start in starts:
        for other in _OTHER_ENDINGS.get(path[start:], ()):
            yield path[:start] + other


def fused(paths: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The fused weights of original code whose parts are all among the paths of a model: (original name, parts)."""
    for path in paths:
        pattern, number = _pattern(path)
        for whole, parts in _FUSED.get(pattern, ()):
            names = tuple(part.replace("#", number) for part in parts)
            if all(name in paths for name in names):
                yield whole.replace("#", number), names


def _pattern(path: str) -> tuple[str, str]:
    """A path with # for the number of its block, and that number."""
    number = _NUMBER.search(path)
    return (f"{path[: number.end(1)]}#{path[number.end() :]}", number[2]) if number else (path, "")
