"""Sides that are several LoRAs, one node after another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from klora.comfyui.nodes import KLoraAnalyse, KLoraSave, KLoraSide
from klora.comfyui.sides import Listed
from klora.errors import KloraError, SettingsError
from tests.comfyui.fake_comfyui import Clip, Patcher
from tests.comfyui.test_fusing import fuse, near, sampled

TEXT = "text.safetensors"


def side(*parts: tuple[str, float]) -> Listed:
    """What a chain of nodes gives."""
    more: Listed = ()
    for lora, weight in parts:
        (more,) = KLoraSide().add(lora, weight, more)
    return more


@pytest.mark.parametrize(("share", "name"), [(1.0, "subject"), (0.0, "style")])
def test_a_side_of_two_that_has_it_all_is_two_loaders(model: Patcher, loras: Path, share: float, name: str) -> None:
    both = model.lora(loras / f"{name}.safetensors", 0.5).lora(loras / TEXT, -0.2)
    strengths = {"subject_strength": 0.5, "style_strength": 0.5}
    fused, _, plan = fuse(model, share=share, **strengths, **{f"more_{name}": side((TEXT, -0.4))})
    near(sampled(fused), sampled(both))
    assert f"{name} + text*-0.4" in plan.title


def test_three_of_a_side_are_in_it_in_the_order_of_their_nodes(model: Patcher) -> None:
    plan = fuse(model, subject="style", style="subject", more_subject=side((TEXT, 0.5), ("subject.safetensors", 2)))[2]
    assert plan.title == "style + text*0.5 + subject*2 × subject"


def test_the_text_encoder_part_of_an_added_lora_acts_with_its_weight(model: Patcher) -> None:
    def acting(weight: float) -> Tensor:
        _, clip, _ = fuse(model, clip=Clip(), more_style=side((TEXT, weight)))
        ((patches, strength),) = clip.added
        key = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
        up, down, alpha = (patches["q"][f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        return strength * alpha * up @ down

    torch.testing.assert_close(acting(0.5), 0.5 * acting(1.0))


def test_a_weight_that_is_none_and_a_lora_that_is_gone_are_named(model: Patcher) -> None:
    with pytest.raises(SettingsError, match="style: 11"):
        fuse(model, more_style=side((TEXT, 11)))
    with pytest.raises(KloraError, match=r"gone\.safetensors"):
        fuse(model, more_style=side(("gone.safetensors", 1)))


def test_what_is_kept_of_a_side_depends_on_its_file(loras: Path) -> None:
    before = KLoraSide.IS_CHANGED(lora=TEXT, weight=1.0)
    assert KLoraSide.IS_CHANGED(lora=TEXT, weight=1.0) == before
    shutil.copy(loras / "style.safetensors", loras / TEXT)
    assert KLoraSide.IS_CHANGED(lora=TEXT, weight=1.0) != before


def test_an_analysis_and_a_saved_file_are_of_all_of_a_side(model: Patcher, loras: Path) -> None:
    more = side((TEXT, 0.5))
    told = KLoraAnalyse().analyse(
        "subject.safetensors", "style.safetensors", 8, balance=0.0, policy="k-lora", more_subject=more
    )
    assert "text.safetensors*0.5" in told["result"][0]
    fused, _, plan = fuse(model, policy="direct", more_subject=more)
    KLoraSave().save(plan, "loras/fused", 0, "float32")
    near(sampled(model.lora(loras.parent / "output" / "loras" / "fused_00001_.safetensors")), sampled(fused))
