"""The text-encoder part of a LoRA as hosts' own LoRA code is given it."""

from __future__ import annotations

import pytest
import torch

from klora.hosts.text_tensors import host_tensors, text_keys
from klora.lora.file import LoraFile

CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
FLAT = CLIP.replace(".", "_")


@pytest.mark.parametrize(
    ("name", "known", "keys"),
    [
        ("text_encoder", ["te_", "te1_"], ["te1_"]),
        ("text_encoder_2", ["te_", "te1_", "te2_"], ["te2_"]),
        ("text_encoder_2", ["te_", "te1_"], []),
        ("text_encoder_2", ["te_"], ["te_"]),
        ("text_encoder", ["te_"], ["te_"]),
        ("text_encoder", [], []),
    ],
)
def test_a_module_goes_by_the_key_that_the_hosts_map_has_for_its_encoder(
    name: str, known: list[str], keys: list[str]
) -> None:
    assert text_keys(f"{name}.{CLIP}", [f"lora_{key}{FLAT}" for key in known]) == [f"lora_{key}{FLAT}" for key in keys]


def test_a_bias_goes_with_the_whole_weight_which_every_host_reads_beside_it() -> None:
    prefix = f"lora_te1_{FLAT}"
    tensors = {
        f"{prefix}.lora_up.weight": torch.randn(8, 2),
        f"{prefix}.lora_down.weight": torch.randn(2, 8),
        f"{prefix}.diff_b": torch.randn(8),
    }
    given = host_tensors(LoraFile.open(tensors).text_encoder[f"text_encoder.{CLIP}"])
    assert given.keys() == {"diff", "diff_b"}
    torch.testing.assert_close(
        given["diff"], tensors[f"{prefix}.lora_up.weight"] @ tensors[f"{prefix}.lora_down.weight"]
    )
    torch.testing.assert_close(given["diff_b"], tensors[f"{prefix}.diff_b"])
