"""What is written has the keys that other programs look for, and factors that no dtype overflows."""

from __future__ import annotations

import pytest
import torch

from klora.lora.deltas.computed import FactorDelta
from klora.lora.write import file_tensors

UNET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CLIP = "text_model.encoder.layers.0.mlp.fc1"
T5 = "text_encoder_2.encoder.block.3.layer.0.SelfAttention.q"


def delta(
    out: int = 6, width: int = 4, rank: int = 2, up: float = 1.0, down: float = 1.0, scale: float = 1.0
) -> FactorDelta:
    factors = torch.randn(out, rank) * up, torch.randn(rank, width) * down
    return FactorDelta("x.safetensors", "key", rank, rank * scale, scale, (out, width), *factors)


def prefixes(*names: str, spelling: str = "kohya", flux: bool = False) -> set[str]:
    """The prefixes of the keys of a file with these modules."""
    ups, downs = ("lora_up", "lora_down") if spelling == "kohya" else ("lora_B", "lora_A")
    keys = file_tensors({name: delta(4, 4) for name in names}, spelling, (), torch.float32, flux)
    assert {key.rpartition(".lora_")[2] for key in keys} == {
        f"{end.removeprefix('lora_')}.weight" for end in (ups, downs)
    }
    return {key.rpartition(".lora_")[0] for key in keys}


@pytest.mark.parametrize(
    ("names", "kohya"),
    [
        ([UNET], {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"}),
        ([f"text_encoder.{CLIP}"], {"lora_te_text_model_encoder_layers_0_mlp_fc1"}),
        (
            [f"text_encoder.{CLIP}", f"text_encoder_2.{CLIP}"],
            {"lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"},
        ),
        (
            ["transformer_blocks.0.ff.net.2", f"text_encoder.{CLIP}", T5],
            {
                "lora_unet_double_blocks_0_img_mlp_2",
                "lora_te1_text_model_encoder_layers_0_mlp_fc1",
                "lora_te3_encoder_block_3_layer_0_SelfAttention_q",
            },
        ),
        (
            ["transformer_blocks.0.ff.net.2", f"text_encoder.{CLIP}"],
            {"lora_unet_double_blocks_0_img_mlp_2", "lora_te1_text_model_encoder_layers_0_mlp_fc1"},
        ),
        (["norm_out.linear", "proj_out"], {"lora_unet_norm_out_linear", "lora_unet_final_layer_linear"}),
    ],
)
def test_kohyas_keys_number_the_text_encoders_where_a_model_has_several(names: list[str], kohya: set[str]) -> None:
    assert prefixes(*names, flux=True) == kohya


def test_names_that_a_model_shares_with_flux_stay_its_own() -> None:
    tensors = file_tensors({"transformer_blocks.0.ff.net.2": delta()}, "kohya", (), torch.float32)
    assert {key.partition(".")[0] for key in tensors} == {"lora_unet_transformer_blocks_0_ff_net_2"}


def test_diffusers_keys_are_paths_in_the_pipeline() -> None:
    names = [UNET, "transformer_blocks.0.ff.net.2", f"text_encoder.{CLIP}", T5]
    assert prefixes(*names, spelling="diffusers") == {
        f"unet.{UNET}",
        "transformer.transformer_blocks.0.ff.net.2",
        f"text_encoder.{CLIP}",
        T5,
    }


@pytest.mark.parametrize(("up", "down", "scale"), [(1e6, 1e-6, 1.0), (1e-6, 1e6, 1.0), (1.0, 1.0, -1e4)])
def test_both_factors_are_written_in_like_size(up: float, down: float, scale: float) -> None:
    made = delta(up=up, down=down, scale=scale)
    first, second = file_tensors({UNET: made}, "diffusers", (), torch.float16).values()
    assert float(first.norm()) == pytest.approx(float(second.norm()), rel=1e-2)
    product = second.float() @ first.float() if first.shape[1] == 4 else first.float() @ second.float()
    torch.testing.assert_close(product, made.matrix(), rtol=1e-2, atol=1e-2 * float(made.matrix().abs().max()))


@pytest.mark.parametrize(("up", "down"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_difference_of_nothing_is_written_as_nothing(up: float, down: float) -> None:
    first, second = file_tensors({UNET: delta(up=up, down=down)}, "kohya", (), torch.float32).values()
    assert bool(first.isfinite().all() and second.isfinite().all())
    assert not (first.any() and second.any())


def test_the_parts_of_a_fused_weight_lie_below_one_another_in_order() -> None:
    parts = {f"transformer_blocks.0.attn.to_{part}": delta(4, 4) for part in "vk"}
    tensors = file_tensors(parts, "kohya", (), torch.float32, flux=True)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    whole = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    k, v = (parts[f"transformer_blocks.0.attn.to_{part}"].matrix() for part in "kv")
    torch.testing.assert_close(whole, torch.cat([torch.zeros(4, 4), k, v]))


def test_a_convolutions_factors_have_its_kernel() -> None:
    up, down = torch.randn(6, 2), torch.randn(2, 3, 3, 3)
    conv = FactorDelta("x.safetensors", "conv", 2, 2.0, 1.0, (6, 3, 3, 3), up, down)
    shapes = [tensor.shape for tensor in file_tensors({"conv_in": conv}, "diffusers", (), torch.float32).values()]
    assert sorted(shapes) == [(2, 3, 3, 3), (6, 2, 1, 1)]
    point = [t.shape for t in file_tensors({UNET: delta()}, "kohya", {"key"}, torch.float32).values()]
    assert sorted(point) == [(2, 4, 1, 1), (6, 2, 1, 1)]
