"""A diffusers pipeline: loaded, on its device, and how it is called."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from klora.errors import KloraError
from klora.generation.request import GenerationRequest
from klora.hub import find_model
from klora.settings import AUTO
from klora.text import first_line

_INDEX = "model_index.json"


def open_pipeline(request: GenerationRequest) -> Any:
    """Load the model of a request and put it on its device; KloraError saying what is wrong with either."""
    device = choose_device(request.device)
    return load_pipeline(request.model, choose_dtype(request.dtype, device, request.model)).to(device)


def choose_device(name: str) -> str:
    """The device to use; KloraError for one that is not there."""
    if name == AUTO:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise KloraError(f"--device {name}: {first_line(error)}; use another, such as cpu") from None
    return name


def choose_dtype(name: str, device: str, model: str) -> torch.dtype:
    """The type of the model's weights: fp32 on a CPU, else fp16, or bf16 for FLUX, whose range fp16 lacks."""
    if name != AUTO:
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if torch.device(device).type == "cpu":
        return torch.float32
    return torch.bfloat16 if "flux" in _pipeline_class(model).lower() else torch.float16


def load_pipeline(model: str, dtype: torch.dtype) -> Any:
    """Load a diffusers pipeline from a folder, or from the hub; KloraError saying what is wrong with it."""
    source = find_model(model, _INDEX)
    folder = Path(source.name)
    if folder.is_dir() and not (folder / _INDEX).is_file():
        raise KloraError(f"{model}: is not a diffusers pipeline, it has no {_INDEX}; give the folder that has")
    try:
        with quiet_libraries():
            from diffusers import DiffusionPipeline

            pipe = source.load(DiffusionPipeline, dtype=dtype)
            # Releases of diffusers that know `dtype` only by its old name load fp32.
            return pipe if pipe.dtype == dtype else pipe.to(dtype=dtype)
    # What is wrong with a model reaches us as errors of any kind, from four libraries.
    except Exception as error:
        detail = f"{type(error).__name__}: {first_line(error)}"
        raise KloraError(f"{model}: cannot be loaded ({detail}); give another folder or hub id") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep what the libraries say while they load off the terminal; what they say while sampling is worth hearing."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity_warning()
        diffusers_logging.set_verbosity_warning()
        hub_logging.set_verbosity_warning()


def _pipeline_class(model: str) -> str:
    """The pipeline's class where its folder tells, else the model's name."""
    try:
        index = json.loads((Path(os.path.expanduser(model)) / _INDEX).read_text(encoding="utf-8"))
        return str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return model


def call_arguments(pipe: Any, request: GenerationRequest) -> dict[str, Any]:
    """The arguments of the pipeline's call; KloraError for one that this kind of pipeline does not take."""
    width, height = request.size or (None, None)
    wanted = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.settings.steps,
        "guidance_scale": request.guidance,
        "width": width,
        "height": height,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    known = inspect.signature(type(pipe).__call__).parameters
    for name in given:
        if name not in known:
            raise KloraError(f"{type(pipe).__name__} takes no {name.replace('_', ' ')}; use a text-to-image pipeline")
    return given


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn the many errors of a full memory into one line."""
    try:
        yield
    except RuntimeError as error:
        if re.search("out of memory|not enough memory", str(error)):
            raise KloraError("out of memory; try a smaller --size, or --dtype float16 on a GPU") from error
        raise


def model_name(model: str) -> str:
    """A hub id, or a folder's name without what leads there."""
    local = Path(os.path.expanduser(model))
    return local.resolve().name if local.exists() else model
