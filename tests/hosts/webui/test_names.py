"""Models of other architectures in WebUIs: the host's own map says which weights, and rows of them, a file means."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.hosts.sites import weight_shape, weights_by_host, weights_by_rule
from klora.hosts.webui.host import WebuiHost
from klora.hosts.webui.loaded_model import host_of
from klora.lora.model_index import ModelIndex, Place, slice_name
from klora.pair import Pair
from klora.settings import Settings

SIZE = 8
MODULES = {
    "layers.0.attention.qkv": (3 * SIZE, SIZE),
    "layers.0.attention.out": (SIZE, SIZE),
    "layers.0.feed_forward.w1": (2 * SIZE, SIZE),
    "cap_embedder.1": (SIZE, SIZE),
}
QKV = "diffusion_model.layers.0.attention.qkv.weight"


def diffusion_model(modules: Mapping[str, tuple[int, int]]) -> nn.Module:
    torch.manual_seed(0)
    root = nn.Module()
    for path, (out, width) in modules.items():
        *parents, leaf = path.split(".")
        place = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(leaf, nn.Linear(width, out))
    return root


def forge_model(modules: Mapping[str, tuple[int, int]] = MODULES) -> Any:
    inner = types.SimpleNamespace(diffusion_model=diffusion_model(modules))
    unet = types.SimpleNamespace(model=inner)
    return types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=unet), is_sd1=False, is_sdxl=False)


def lora_keys(model: Any, key_map: dict[str, Any]) -> dict[str, Any]:
    """What Forge Neo says of Z-Image: flat and generic names, and those of diffusers with rows of qkv."""
    for path in MODULES:
        weight = f"diffusion_model.{path}.weight"
        key_map[f"lora_unet_{path.replace('.', '_')}"] = key_map[f"diffusion_model.{path}"] = weight
    for i, leaf in enumerate("qkv"):
        key_map[f"transformer.layers.0.attention.to_{leaf}"] = (QKV, (0, i * SIZE, SIZE))
    key_map["transformer.layers.0.attention.to_out.0"] = "diffusion_model.layers.0.attention.out.weight"
    key_map["transformer.layers.1.attention.to_q"] = ("diffusion_model.layers.1.attention.qkv.weight", (0, 0, SIZE))
    key_map["lora_unet_swapped"] = (QKV, None, lambda weight: weight)
    key_map["diffusion_model.layers.0.attention.qkv.bias"] = "diffusion_model.layers.0.attention.qkv.bias"
    return key_map


@pytest.fixture(params=["backend.patcher.lora", "ldm_patched.modules.lora"])
def forge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> WebuiHost:
    """Forge or Neo, and reForge or Classic, with a model of a kind that has no table."""
    parts = request.param.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
    sys.modules[request.param].model_lora_keys_unet = lora_keys  # type: ignore[attr-defined]
    return host_of(forge_model())


def keys_of(path: str) -> list[str]:
    """Under which prefixes files name a module."""
    flat = path.replace(".", "_")
    return [
        *(f"{root}.{path}" for root in ("transformer", "diffusion_model", "base_model.model")),
        *(f"{root}_{flat}" for root in ("lora_unet", "lora_transformer")),
    ]


def write(path: Path, prefixes: Mapping[str, tuple[int, int]], seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for prefix, (out, width) in prefixes.items():
        tensors[f"{prefix}.lora_down.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{prefix}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
    save_file(tensors, path)
    return path


def pair_of(folder: Path) -> Pair:
    """A subject as kohya's tools write it, with q, k and v in one; a style as diffusers does, with them apart."""
    fused = {f"lora_unet_{path.replace('.', '_')}": shape for path, shape in MODULES.items()}
    split = {f"transformer.layers.0.attention.to_{leaf}": (SIZE, SIZE) for leaf in ("q", "k", "v", "out.0")}
    return Pair.open(
        write(folder / "dog.safetensors", fused, 1),
        write(folder / "ink.safetensors", split, 2),
        ScoreCache(folder / "cache"),
    )


def test_a_fused_file_and_a_split_one_meet_in_the_parts_that_the_host_names(forge: WebuiHost, tmp_path: Path) -> None:
    pair = pair_of(tmp_path).for_model(forge.index)
    parts = [f"layers.0.attention.qkv[{i * SIZE}:{(i + 1) * SIZE}]" for i in range(3)]
    assert set(forge.sites()) == {*parts, *MODULES} - {"layers.0.attention.qkv"}
    assert set(pair.coverage.contested) == {*parts, "layers.0.attention.out"}
    assert set(pair.coverage.subject_only) == {"layers.0.feed_forward.w1", "cap_embedder.1"}
    assert forge.architecture is None
    assert pair.architecture is None


def test_what_acts_on_the_parts_is_what_the_files_hold(forge: WebuiHost, tmp_path: Path) -> None:
    opened = pair_of(tmp_path)
    pair = opened.for_model(forge.index)
    session = Session(pair, pair.plan(Settings(policy="direct", preset="1,1")), forge.sites())
    layer = forge.diffusion_model.get_submodule("layers.0.attention.qkv")
    with session, torch.no_grad():
        changed = layer(torch.eye(SIZE)) - layer.bias
    style = opened.style.modules
    deltas = torch.cat([style[f"layers_0_attention_to_{leaf}"].matrix() for leaf in "qkv"])
    deltas += opened.subject.modules["layers_0_attention_qkv"].matrix()
    torch.testing.assert_close(changed.T, layer.weight + deltas)
    assert session.missing == ()


def test_q_k_and_v_of_grouped_attention_have_the_rows_that_are_left(forge: WebuiHost) -> None:
    host = host_of(forge_model({**MODULES, "layers.0.attention.qkv": (2 * SIZE, SIZE)}))
    half = SIZE // 2
    for leaf, rows in (("q", (0, SIZE)), ("k", (SIZE, SIZE + half)), ("v", (SIZE + half, 2 * SIZE))):
        (place,) = host.index.find(f"transformer.layers.0.attention.to_{leaf}", (rows[1] - rows[0], SIZE)) or ()
        assert place.name == f"layers.0.attention.qkv[{rows[0]}:{rows[1]}]"


def test_slices_that_do_not_cover_a_weight_leave_it_whole(forge: WebuiHost) -> None:
    host = host_of(forge_model({**MODULES, "layers.0.attention.qkv": (5 * SIZE, SIZE)}))
    (whole,) = host.index.find("lora_unet_layers_0_attention_qkv", (5 * SIZE, SIZE)) or ()
    assert (whole.name, whole.rows) == ("layers.0.attention.qkv", None)


def test_a_model_with_names_of_flux_alone_is_flux_and_needs_no_map() -> None:
    modules = {
        "img_in": (SIZE, 4),
        "double_blocks.0.img_attn.qkv": (3 * SIZE, SIZE),
        "single_blocks.0.linear1": (7 * SIZE, SIZE),
        "final_layer.adaLN_modulation.1": (2 * SIZE, SIZE),
    }
    host = host_of(forge_model(modules))
    assert host.architecture == "FLUX"
    assert "single_transformer_blocks.0.proj_mlp" in host.sites()
    assert host_of(forge_model({**modules, "distilled_guidance_layer.in_proj": (4, 4)})).architecture is None


def test_a1111_names_the_modules_of_sd3_by_its_own_map() -> None:
    paths = {"joint_blocks.0.x_block.attn.qkv": (3 * SIZE, SIZE), "joint_blocks.0.x_block.attn.proj": (SIZE, SIZE)}
    inner = diffusion_model(paths)
    for path in paths:
        inner.get_submodule(path).network_layer_name = f"diffusion_model_{path.replace('.', '_')}"
    block = "diffusion_model_joint_blocks_0_x_block_attn"
    mapping = [(f"transformer.transformer_blocks.0.attn.to_{x}", f"{block}_qkv_{x}_proj") for x in "qkv"]
    mapping.append(("transformer.transformer_blocks.0.attn.to_out.0", f"{block}_proj"))
    host = host_of(
        types.SimpleNamespace(
            model=types.SimpleNamespace(diffusion_model=inner),
            diffusers_weight_mapping=lambda: iter(mapping),
            is_sd1=False,
        )
    )
    for i, leaf in enumerate("qkv"):
        (place,) = host.index.find(f"transformer.transformer_blocks.0.attn.to_{leaf}", (SIZE, SIZE)) or ()
        assert place.name == f"joint_blocks.0.x_block.attn.qkv[{i * SIZE}:{(i + 1) * SIZE}]"
    assert len(host.index.find("lora_unet_joint_blocks_0_x_block_attn_qkv", (3 * SIZE, SIZE)) or ()) == 3
    assert host.index.find("transformer.transformer_blocks.0.attn.to_out.0", (SIZE, SIZE))


ANIMA = {
    "blocks.1.self_attn.q_proj": "transformer_blocks.1.attn1.to_q",
    "blocks.1.self_attn.k_proj": "transformer_blocks.1.attn1.to_k",
    "blocks.1.self_attn.v_proj": "transformer_blocks.1.attn1.to_v",
    "blocks.1.self_attn.output_proj": "transformer_blocks.1.attn1.to_out.0",
    "blocks.1.cross_attn.q_proj": "transformer_blocks.1.attn2.to_q",
    "blocks.1.cross_attn.k_proj": "transformer_blocks.1.attn2.to_k",
    "blocks.1.cross_attn.v_proj": "transformer_blocks.1.attn2.to_v",
    "blocks.1.cross_attn.output_proj": "transformer_blocks.1.attn2.to_out.0",
    "blocks.1.mlp.layer1": "transformer_blocks.1.ff.net.0.proj",
    "blocks.1.mlp.layer2": "transformer_blocks.1.ff.net.2",
    "blocks.1.adaln_modulation_self_attn.1": "transformer_blocks.1.norm1.linear_1",
    "blocks.1.adaln_modulation_self_attn.2": "transformer_blocks.1.norm1.linear_2",
    "blocks.1.adaln_modulation_cross_attn.1": "transformer_blocks.1.norm2.linear_1",
    "blocks.1.adaln_modulation_cross_attn.2": "transformer_blocks.1.norm2.linear_2",
    "blocks.1.adaln_modulation_mlp.1": "transformer_blocks.1.norm3.linear_1",
    "blocks.1.adaln_modulation_mlp.2": "transformer_blocks.1.norm3.linear_2",
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
"""Every linear layer of Anima, of which there is a map in no host: in its original code and in diffusers."""


@pytest.mark.parametrize("names", [ANIMA, {theirs: ours for ours, theirs in ANIMA.items()}], ids=["Neo", "diffusers"])
def test_anima_is_found_under_the_names_of_its_original_code_and_of_diffusers(names: dict[str, str]) -> None:
    index = ModelIndex(dict.fromkeys(names, (SIZE, SIZE)))
    for name, other in names.items():
        for spelling in (name, other):
            for prefix in keys_of(spelling):
                assert index.find(prefix, (SIZE, SIZE)) == (Place(name),)
    for stranger in ("blocks.2.self_attn.q_proj", "blocks.1.attn1.to_q", "blocks.1.self_attn.q"):
        assert index.find(f"diffusion_model.{stranger}", (SIZE, SIZE)) is None


def test_a_part_of_a_weight_is_attention_where_the_host_calls_it_so(tmp_path: Path) -> None:
    block, parts = "single_blocks.0.linear1", [(i * SIZE, (i + 1) * SIZE) for i in range(4)]
    slices = [slice_name(block, rows) for rows in parts]
    leaves = [*(f"attn.to_{leaf}" for leaf in "qkv"), "proj_mlp"]
    aliases = {block: slices}
    for leaf, name in zip(leaves, slices, strict=True):
        aliases[f"transformer.single_transformer_blocks.0.{leaf}"] = [name]
    files = [
        write(tmp_path / f"{seed}.safetensors", {f"diffusion_model.{block}": (4 * SIZE, SIZE)}, seed) for seed in (1, 2)
    ]
    pair = Pair.open(*files, ScoreCache(tmp_path / "cache"))
    pair = pair.for_model(ModelIndex(dict.fromkeys(slices, (SIZE, SIZE)), aliases))
    assert [module.name for module in pair.plan(Settings(scope="attention")).contested] == slices[:3]
    assert [module.name for module in pair.plan(Settings(scope="linear")).contested] == slices


LUMINA2 = {
    "layers.0.attention.qkv[0:8]": "layers.0.attn.to_q",
    "layers.0.attention.qkv[8:12]": "layers.0.attn.to_k",
    "layers.0.attention.qkv[12:16]": "layers.0.attn.to_v",
    "layers.0.attention.out": "layers.0.attn.to_out.0",
    "layers.0.feed_forward.w1": "layers.0.feed_forward.linear_1",
    "layers.0.adaLN_modulation.1": "layers.0.norm1.linear",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
}


def test_lumina_2_is_found_under_its_names_in_diffusers_though_the_host_has_those_of_z_image_alone() -> None:
    aliases = {f"transformer.layers.0.attention.to_{x}": [name] for x, name in zip("qkv", LUMINA2, strict=False)}
    index = ModelIndex(dict.fromkeys(LUMINA2, (SIZE, SIZE)), aliases)
    for name, other in LUMINA2.items():
        for prefix in keys_of(other):
            assert index.find(prefix, (SIZE, SIZE)) == (Place(name),)


FLUX2 = {
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}


def test_what_the_host_s_map_of_flux_2_leaves_out_is_found_under_its_names_in_diffusers() -> None:
    index = ModelIndex(dict.fromkeys(FLUX2, (SIZE, SIZE)))
    for name, other in FLUX2.items():
        assert index.find(f"transformer.{other}", (SIZE, SIZE)) == (Place(name),)


def test_a_name_that_the_host_has_under_one_prefix_is_found_under_every_other() -> None:
    """As reForge has SD 3's names in diffusers."""
    name, other = "joint_blocks.0.x_block.attn.proj", "transformer_blocks.0.attn.to_out.0"
    index = ModelIndex({name: (SIZE, SIZE)}, {f"transformer.{other}": [name]})
    for prefix in keys_of(other):
        assert index.find(prefix, (SIZE, SIZE)) == (Place(name),)


def test_the_shape_of_a_quantised_weight_is_of_plain_numbers() -> None:
    class PackedLinear(nn.Module):
        """As Forge loads GGUF with numpy 1.26: of numpy's unsigned numbers, whose products with ints are floats."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.zeros(6, dtype=torch.uint8)
            self.weight.real_shape = (np.uint64(12), np.uint64(4))  # type: ignore[attr-defined]

    shape = weight_shape(PackedLinear())
    assert shape == (12, 4)
    assert all(type(size) is int for size in shape)
    rooted = nn.Module()
    rooted.add_module("double_blocks", nn.ModuleList([nn.Module()]))
    img = rooted.double_blocks[0].img_attn = nn.Module()
    img.qkv = PackedLinear()
    sites = weights_by_rule(rooted).sites
    rows = [site.rows for site in sites.values()]
    assert rows == [(0, 4), (4, 8), (8, 12)]
    assert all(type(bound) is int for bounds in rows if bounds for bound in bounds)


def test_a_compiled_model_has_the_names_of_the_one_that_was_compiled() -> None:
    model = diffusion_model(MODULES)
    expected = weights_by_host(model, {}).sites
    model.layers.get_submodule("0").attention = torch.compile(model.layers.get_submodule("0").attention)
    found = weights_by_host(torch.compile(model), {}).sites
    assert found.keys() == expected.keys()
    assert all(found[name].module is site.module for name, site in expected.items())
