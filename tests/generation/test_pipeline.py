"""A pipeline: its device, its numbers, the arguments of its call; and what is wrong with it in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from klora.errors import KloraError
from klora.generation.pipeline import (
    call_arguments,
    choose_device,
    choose_dtype,
    load_pipeline,
    memory_errors,
    model_name,
    open_pipeline,
)
from klora.generation.request import GenerationRequest
from klora.settings import Settings
from tests.support.studies import write_model


def request(model: str = "m", **more: object) -> GenerationRequest:
    return GenerationRequest(model, "dog", "ink", "a dog", Path("out"), Settings(steps=3), **more)  # type: ignore[arg-type]


class TextToPicture:
    def __call__(self, prompt: str, num_inference_steps: int, guidance_scale: float = 5.0, width: int = 8) -> None:
        """Take some of what can be asked for."""


def test_a_folder_is_loaded_in_the_numbers_that_are_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path)
    pipe = open_pipeline(request(str(tmp_path / "model"), device="cpu", dtype="bfloat16"))
    assert pipe.dtype == pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16
    assert pipe.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("index", "named"),
    [(None, "has no model_index.json"), ("{", "cannot be loaded"), ('{"_class_name": "Nothing"}', "cannot be loaded")],
)
def test_a_folder_that_is_no_pipeline_is_named(index: str | None, named: str, tmp_path: Path) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(KloraError, match=named) as caught:
        load_pipeline(str(tmp_path), torch.float32)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_named_with_one_that_is() -> None:
    with pytest.raises(KloraError, match=r"--device toaster: .*use another, such as cpu"):
        choose_device("toaster")


def test_weights_are_fp32_on_a_cpu_and_fp16_elsewhere_but_for_flux(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert choose_dtype("auto", "cpu", "m") is torch.float32
    assert choose_dtype("auto", "cuda", "m") is torch.float16
    assert choose_dtype("auto", "cuda", "owner/FLUX.1-dev") is torch.bfloat16
    assert choose_dtype("auto", "cuda", str(tmp_path)) is torch.bfloat16
    assert choose_dtype("auto", "cuda", "~nobody-here/flux") is torch.bfloat16
    assert choose_dtype("float16", "cpu", "m") is torch.float16


def test_what_is_not_asked_for_is_left_to_the_pipeline() -> None:
    assert call_arguments(TextToPicture(), request()) == {"prompt": "a dog", "num_inference_steps": 3}
    assert call_arguments(TextToPicture(), request(guidance=0.0))["guidance_scale"] == 0.0


def test_what_a_pipeline_does_not_take_is_named() -> None:
    with pytest.raises(KloraError, match="TextToPicture takes no negative prompt"):
        call_arguments(TextToPicture(), request(negative_prompt="bad"))
    with pytest.raises(KloraError, match="TextToPicture takes no height"):
        call_arguments(TextToPicture(), request(size=(8, 8)))


def test_only_a_full_memory_is_told_as_one() -> None:
    with pytest.raises(KloraError, match="smaller --size"), memory_errors():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="shapes"), memory_errors():
        raise RuntimeError("shapes do not match")


def test_a_model_is_named_without_the_way_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path / "toy")
    assert model_name(str(tmp_path / "toy")) == model_name(".") == "toy"
    assert model_name("owner/name") == "owner/name"
    assert model_name("~nobody-here/toy") == "~nobody-here/toy"
