"""A tensor's key is a module's prefix and a slot, in every spelling of the slots, or nothing."""

from __future__ import annotations

import pytest

from klora.lora.keys import FACTOR, refused_family, split_key
from klora.lora.numbered import is_numbered


@pytest.mark.parametrize(
    ("ending", "slot"),
    [
        ("lora_down.weight", "down"),
        ("lora.down.weight", "down"),
        ("lora_linear_layer.down.weight", "down"),
        ("down.weight", "down"),
        ("lora_down", "down"),
        ("lora_A", "down"),
        ("lora_B.default", "up"),
        ("lora_B.bias", "up_bias"),
        ("lora_up.bias", "up_bias"),
        ("lora_A.bias", "down_bias"),
        ("scale", "scale"),
        ("scalar", "scalar"),
        ("magnitude", "magnitude"),
        ("diff_b", "diff_b"),
        ("diff_m", "diff_m"),
        ("set_weight", "set"),
        ("reshape_weight", "reshape"),
        ("w_norm", "w_norm"),
        ("lora_down.scale_weight", "down" + FACTOR),
        ("lora_B.weight_scale", "up" + FACTOR),
        ("diff.scale_weight", "diff" + FACTOR),
        ("lokr_w1.scale_weight", "lokr_w1" + FACTOR),
        ("lora_A.weight", "down"),
        ("lora_A.default.weight", "down"),
        ("lora_up.weight", "up"),
        ("lora_B.style_1.weight", "up"),
        ("lora_mid.weight", "mid"),
        ("alpha", "alpha"),
        ("lora_down.alpha", "alpha"),
        ("dora_scale", "dora_scale"),
        ("lora_magnitude_vector", "magnitude"),
        ("lora_magnitude_vector.default.weight", "magnitude"),
        ("diff", "diff"),
        ("lora.weight", "diff"),
        ("hada_w1_a", "hada_w1_a"),
        ("hada_t2.default", "hada_t2"),
        ("lokr_w2", "lokr_w2"),
        ("lokr_w1_b", "lokr_w1_b"),
    ],
)
def test_every_ending_has_its_slot_behind_any_prefix(ending: str, slot: str) -> None:
    for prefix in ("x", "unet.conv_in", "a." * 200 + "b"):
        assert split_key(f"{prefix}.{ending}") == (prefix, slot)


@pytest.mark.parametrize(
    "key",
    [
        "",
        ".alpha",
        ".lora_down.alpha",
        "alpha",
        "x.weight",
        "x.alpha.more",
        "x.scale_weight",
        "x.lora_A." + "name" * 40 + ".weight",
    ],
)
def test_other_keys_are_of_no_slot(key: str) -> None:
    assert split_key(key) is None


def test_only_four_dimensions_make_oft_blocks_those_of_boft() -> None:
    assert [refused_family("x.oft_blocks", dimensions) for dimensions in (2, 3, 4)] == ["OFT", "OFT", "BOFT"]
    assert refused_family("x.a1.weight", 4) == "GLoRA"
    assert refused_family("x.lora_down.weight", 4) is None


def test_a_numbered_key_is_nothing_but_a_number() -> None:
    assert split_key("unet:12:up") == ("unet:12", "up")
    assert is_numbered("unet:12")
    assert is_numbered("text_encoder:0")
    assert not is_numbered("unet.12")
    assert split_key("unet:12:up.weight") is None
