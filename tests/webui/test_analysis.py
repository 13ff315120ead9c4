"""The analysis of a pair on a fake host: what it says, and that it never says where files lie."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from klora.errors import KloraError
from klora.fusion.plan import FusionPlan
from klora.webui import analysis, api
from klora.webui.analysis_page import View
from klora.webui.analysis_run import COMPARING, SCORING, CancelledError
from klora.webui.args import read_values
from klora.webui.injection import PLANS
from tests.support.lora_files import write_lora
from tests.support.pairs import ATTENTION, shapes
from tests.webui.fake_host import FakeHost
from tests.webui.fake_model import Checkpoint
from tests.webui.hosts import host

__all__ = ["host"]

PAIR = {"subject": "dog", "style": "ink"}


def test_the_answer_names_files_without_their_folders(host: FakeHost) -> None:
    answer = api.analysis(PAIR)
    assert (answer["subject"]["file"], answer["style"]["file"]) == ("dog.safetensors", "ink.safetensors")
    assert str(host.folder) not in json.dumps(answer)


@pytest.mark.parametrize("fault", ["broken", "empty", "small"])
def test_an_error_names_files_without_their_folders(host: FakeHost, fault: str) -> None:
    path = host.folder / "ink.safetensors"
    if fault == "small":
        write_lora(path, shapes(ATTENTION, 16), rank=2)
    else:
        path.write_bytes(b"" if fault == "empty" else b"\x08\0\0\0\0\0\0\0{broken}")
    for analyse in (api.analysis, lambda values: analysis.plan_of(read_values(values))):
        with pytest.raises(KloraError, match=r"ink\.safetensors") as caught:
            analyse(PAIR)
        assert str(host.folder) not in str(caught.value)


def test_an_analysis_tells_how_far_scoring_and_comparing_are_and_ends_where_it_is_cancelled(host: FakeHost) -> None:
    counts = {}
    for last in (SCORING, COMPARING):
        told: list[tuple[str, int, int]] = []

        def hear(done: int, total: int, doing: str = SCORING, told: Any = told, last: str = last) -> None:
            told.append((doing, done, total))
            if doing == last:
                raise CancelledError

        with pytest.raises(CancelledError):
            analysis.analyse(read_values(PAIR), View(), hear)
        counts[last] = told
    _, plan = analysis.plan_of(read_values(PAIR))
    both = len(plan.contested)
    assert counts[SCORING] == [(SCORING, 1, 2 * both)]
    assert counts[COMPARING] == [*((SCORING, done + 1, 2 * both) for done in range(2 * both)), (COMPARING, 1, both)]


def test_a_path_too_long_for_a_message_is_not_shown_in_part(host: FakeHost) -> None:
    folder: Path = host.folder
    for letter in "abc":
        folder /= letter * 100
    folder.mkdir(parents=True)
    (folder / "far.safetensors").touch()
    host.folder = folder
    with pytest.raises(KloraError) as caught:
        api.analysis({"subject": "far", "style": "far"})
    assert str(caught.value).startswith("far.safetensors: is empty")


def test_the_host_s_temporary_folder_is_there_for_the_map(host: FakeHost) -> None:
    pytest.importorskip("matplotlib")
    host.opts.temp_dir = str(host.folder / "new" / "tmp")
    analysis.gallery_map(analysis.plan_of(read_values(PAIR))[1], None)
    assert Path(host.opts.temp_dir).is_dir()


@pytest.fixture
def stray(host: FakeHost) -> FakeHost:
    """The host with a module in `ink` that fits no table, so that the file alone does not tell its model."""
    tensors = load_file(host.folder / "ink.safetensors")
    tensors |= {
        "lora_unet_stray.lora_down.weight": torch.ones(2, 32),
        "lora_unet_stray.lora_up.weight": torch.ones(32, 2),
    }
    save_file(tensors, host.folder / "ink.safetensors")
    return host


def names(plan: FusionPlan) -> set[str]:
    return {module.name for module in plan.contested}


def test_an_analysis_says_what_the_picture_with_the_loaded_model_will_do(stray: FakeHost) -> None:
    picture = stray.txt2img("a dog <klora:dog:ink>")
    (made,) = getattr(picture.p, PLANS)
    _, plan = analysis.plan_of(read_values(PAIR))
    assert names(plan) == names(made) >= set(ATTENTION)
    assert plan.with_steps(made.steps).selections == made.selections
    (warning,) = plan.warnings
    assert warning == "ink.safetensors: 1 of its 28 modules (such as stray) found no place in the model and do nothing"
    assert f"K-LoRA: {warning}" in picture.comments
    assert api.analysis(PAIR)["warnings"] == [warning]


def test_without_a_loaded_model_an_analysis_goes_by_the_files_and_loads_none(stray: FakeHost) -> None:
    stray.sd_model = None
    _, plan = analysis.plan_of(read_values(PAIR))
    assert names(plan) >= {name.replace(".", "_") for name in ATTENTION}
    assert plan.warnings == ()


@pytest.mark.parametrize("host", ["forge"], indirect=True)
def test_a_model_that_another_is_about_to_replace_is_not_analysed_with(stray: FakeHost) -> None:
    sys.modules["modules.sd_models"].model_data.forge_loading_parameters = {"checkpoint": "other"}
    assert "stray" in analysis.plan_of(read_values(PAIR))[0].style.modules
    assert names(analysis.plan_of(read_values(PAIR))[1]).isdisjoint(ATTENTION)


def test_a_pair_for_another_model_than_the_loaded_one_is_analysed_with_a_warning(host: FakeHost) -> None:
    host.sd_model = Checkpoint(host.family, "other", 2, "SDXL", ["mid_block.attentions.0.proj_in"])
    _, plan = analysis.plan_of(read_values(PAIR))
    assert names(plan) >= set(ATTENTION)
    (warning,) = plan.warnings
    assert warning.startswith("this pair is for SD 1, the checkpoint is SDXL")
    assert "zero modules matched in the SDXL checkpoint other" in warning


def test_what_of_a_file_does_nothing_is_said_under_the_picture_and_in_the_analysis(host: FakeHost) -> None:
    key = f"lora_unet_{ATTENTION[0].replace('.', '_')}"
    tensors = load_file(host.folder / "ink.safetensors") | {
        f"{key}.diff_b": torch.ones(32),
        "lora_unet_empty.lora_down.weight": torch.zeros(0, 32),
        "lora_unet_empty.lora_up.weight": torch.zeros(32, 0),
        "lora_unet_conv_norm_out.w_norm": torch.ones(32),
    }
    save_file(tensors, host.folder / "ink.safetensors")
    places = (
        "1 of its 28 modules (such as empty), 1 change of other parameters (such as lora_unet_conv_norm_out.w_norm)"
    )
    biases = f"1 change of biases (such as that of {ATTENTION[0]})"
    told = [
        "ink.safetensors changes nothing in its modules of rank 0 (1), such as lora_unet_empty",
        f"ink.safetensors: {places}, {biases} found no place in the model and do nothing",
    ]
    assert api.analysis(PAIR)["warnings"] == told
    assert all(f"K-LoRA: {text}" in host.txt2img("a dog <klora:dog:ink>").comments for text in told)


def test_a_norm_of_the_unet_is_changed_while_it_samples(host: FakeHost) -> None:
    model, seen = host.sd_model.diffusion, []
    model.out = nn.Sequential(nn.GroupNorm(4, 32))
    norms = {"lora_unet_conv_norm_out.w_norm": torch.full((32,), 0.5), "lora_unet_out_0.b_norm": torch.ones(32)}
    save_file(load_file(host.folder / "ink.safetensors") | norms, host.folder / "ink.safetensors")
    within = next(iter(model.layers.values())).register_forward_pre_hook(
        lambda *_: seen.append((model.out[0].weight[0].item(), model.out[0].bias[0].item()))
    )
    try:
        picture = host.txt2img("a dog <klora:dog:ink>")
        assert set(seen) == {(1.5, 1.0)}
        assert "found no place" not in picture.comments
        assert torch.equal(model.out[0].weight, torch.ones(32))
    finally:
        within.remove()
        del model.out
