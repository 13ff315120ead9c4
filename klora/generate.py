"""The work of `klora generate`: pictures from a diffusers pipeline, each with all that made it in its PNG."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from klora import __version__
from klora.api import fuse
from klora.engine.session import Session
from klora.errors import KloraError
from klora.hosts.diffusers import DiffusersHost
from klora.pair import Pair
from klora.report.files import OutputFile, output_folder, png_bytes
from klora.report.summary import notices
from klora.settings import AUTO, Settings, options

if TYPE_CHECKING:
    from PIL.Image import Image

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NUMBERED = re.compile(r"(\d{5,})-.*\.png")


@dataclass(frozen=True)
class Request:
    """What `klora generate` was asked for; None and "auto" leave the choice to the pipeline or the machine."""

    model: str
    subject: str
    style: str
    prompt: str
    out: Path
    settings: Settings
    negative_prompt: str | None = None
    seed: int = 0
    images: int = 1
    size: tuple[int, int] | None = None
    guidance: float | None = None
    device: str = AUTO
    dtype: str = AUTO
    map: bool = False


@dataclass(frozen=True)
class Painted:
    """One picture: all that made it, how long the pipeline took, and how often the denoiser ran for each step."""

    image: Image
    facts: dict[str, Any]
    seconds: float
    forwards: float
    session: Session


def generate_pictures(request: Request, warn: Callable[[str], None]) -> Iterator[Path]:
    """Make the pictures one after the other and give the path of each file as it is written.

    Raises KloraError for a model, a file or a setting that does not do, before anything is sampled.
    """
    # The files first: they are checked in an instant, and a model may take minutes.
    Pair.open(request.subject, request.style)
    pipe = open_pipeline(request)
    call_arguments(pipe, request)
    folder = output_folder(request.out)

    def announce(number: int, session: Session) -> None:
        for notice in session_notices(session) if number == 1 else ():
            warn(notice)
        forwards = session.plan.policy.forwards
        cost = f" ({forwards} forwards per step)" if forwards > 1 else ""
        pipe.set_progress_bar_config(desc=f"picture {number} of {request.images}{cost}")

    for painted in paint(pipe, request, range(request.seed, request.seed + request.images), announce):
        yield from _save(painted, folder, request.map)


def open_pipeline(request: Request) -> Any:
    """Load the model of a request and put it on its device; KloraError saying what is wrong with either."""
    device = choose_device(request.device)
    return load_pipeline(request.model, choose_dtype(request.dtype, device, request.model)).to(device)


def paint(
    pipe: Any, request: Request, seeds: Sequence[int], announce: Callable[[int, Session], None]
) -> Generator[Painted, None, None]:
    """Fuse the pair of a request in `pipe` and paint one picture for each seed.

    `announce` hears the number of each picture, from 1, before it is begun. Raises KloraError for a pair or a setting
    that does not do, and where memory does not suffice. Closing the generator leaves the pipeline as it was.
    """
    call = call_arguments(pipe, request)
    with memory_errors(), fuse(pipe, request.subject, request.style, **request.settings.to_dict()) as session:
        for number, seed in enumerate(seeds, 1):
            announce(number, session)
            # On the CPU whatever the device, so that a seed means the same noise everywhere.
            generator = torch.Generator("cpu").manual_seed(seed)
            with _counted(DiffusersHost(pipe).denoiser) as calls:
                start = time.perf_counter()
                image = pipe(**call, generator=generator).images[0]
                seconds = time.perf_counter() - start
            facts = _facts(request, pipe, session, image, seed)
            yield Painted(image, facts, seconds, len(calls) / session.plan.steps, session)


@contextmanager
def _counted(denoiser: torch.nn.Module) -> Iterator[list[None]]:
    """Count the runs of a denoiser at its first layer, where no way of calling it goes unseen."""
    calls: list[None] = []
    first: Any = getattr(denoiser, "conv_in", None) or getattr(denoiser, "x_embedder", denoiser)
    hook = first.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def session_notices(session: Session) -> list[str]:
    """Give what a person should know of a fusion: about the pair, and about what the model lacks."""
    missing = session.missing
    lacking = [f"the model lacks {len(missing)} modules of the files, such as {missing[0]}"] if missing else []
    return [*notices(session.pair, session.plan), *lacking]


def choose_device(name: str) -> str:
    """Give the device to use; KloraError for one that is not there."""
    if name == AUTO:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise KloraError(f"--device {name}: {first_line(error)}; use another, such as cpu") from None
    return name


def choose_dtype(name: str, device: str, model: str) -> torch.dtype:
    """Give the type of the model's weights: fp32 on a CPU, else fp16, or bf16 for FLUX, whose range fp16 lacks."""
    if name != AUTO:
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if "flux" in _pipeline_class(model).lower() else torch.float16


def load_pipeline(model: str, dtype: torch.dtype) -> Any:
    """Load a diffusers pipeline from a folder, or from the hub; KloraError saying what is wrong with it."""
    folder = Path(model).expanduser()
    local = folder.exists()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise KloraError(f"{model}: is no diffusers pipeline, it has no model_index.json; give the folder that has")
    if folder.is_file():
        raise KloraError(f"{model}: is a file; --model takes a diffusers folder or a hub id")
    if not local and not _HUB_ID.fullmatch(model):
        raise KloraError(f"{model}: there is no such folder, and it is no hub id (owner/name) either")
    try:
        with quiet_libraries():
            from diffusers import DiffusionPipeline

            pipe = DiffusionPipeline.from_pretrained(
                str(folder) if local else model, dtype=dtype, local_files_only=local
            )
            # Releases of diffusers that know `dtype` only by its old name load fp32.
            return pipe if pipe.dtype == dtype else pipe.to(dtype=dtype)
    # What is wrong with a model reaches us as errors of any kind, from four libraries.
    except Exception as error:
        detail = f"{type(error).__name__}: {first_line(error)}"
        if local:
            raise KloraError(f"{model}: cannot be loaded ({detail})") from error
        cure = "check the name and the connection, or give a folder"
        raise KloraError(f"{model}: there is no such folder, and the hub did not give it ({detail}); {cure}") from error


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
    """Give the pipeline's class where its folder tells, else the model's name."""
    try:
        index = json.loads((Path(model).expanduser() / "model_index.json").read_text(encoding="utf-8"))
        return str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return model


def call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """Give the arguments of the pipeline's call; KloraError for one that this kind of pipeline does not take."""
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


def _facts(request: Request, pipe: Any, session: Session, image: Image, seed: int) -> dict[str, Any]:
    """Give all that made a picture, ready for JSON. Files and folders go by name: a path may tell who made it."""
    pair, plan = session.pair, session.observed
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return {
        "klora": __version__,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": seed,
        "steps": plan.steps,
        "size": list(image.size),
        "guidance_scale": request.guidance if request.guidance is not None or default is None else default.default,
        "model": model_name(request.model),
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "subject": {"file": pair.subject.path.name, "sha256": pair.cache.sha256(pair.subject.path)},
        "style": {"file": pair.style.path.name, "sha256": pair.cache.sha256(pair.style.path)},
        "settings": _without_paths(plan.settings.to_dict()),
        "gamma": plan.gamma,
        "balance": plan.balance,
        "share": plan.share,
    }


def model_name(model: str) -> str:
    """Give a hub id, or a folder's name without what leads there."""
    local = Path(model).expanduser()
    return local.resolve().name if local.exists() else model


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    known = options()
    return {
        name: ";".join(Path(part).name if Path(part).is_absolute() else part for part in value.split(";"))
        if known[name].free
        else value
        for name, value in settings.items()
    }


def parameters(facts: dict[str, Any]) -> str:
    """Write the facts as people and image viewers read them: prompt, negative prompt, one line of the rest."""
    settings = facts["settings"]
    rows = {
        "Steps": facts["steps"],
        "Sampler": facts["scheduler"],
        "CFG scale": facts["guidance_scale"],
        "Seed": facts["seed"],
        "Size": "x".join(map(str, facts["size"])),
        "Model": facts["model"],
        "K-LoRA subject": Path(facts["subject"]["file"]).stem,
        "K-LoRA style": Path(facts["style"]["file"]).stem,
        **{f"K-LoRA {name.replace('_', ' ')}": value for name, value in settings.items() if value not in (None, "")},
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in rows.items())
    negative = [f"Negative prompt: {facts['negative_prompt']}"] if facts["negative_prompt"] else []
    return "\n".join([facts["prompt"], *negative, line])


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


def _save(painted: Painted, folder: Path, with_map: bool) -> Iterator[Path]:
    facts, session = painted.facts, painted.session
    stem = f"{next_number(folder):05d}-{facts['seed']}"
    yield write_picture(painted.image, folder / f"{stem}.png", facts)
    if with_map:
        from klora.report.picture import selection_map

        title = f"{session.pair.subject.name} × {session.pair.style.name}"
        yield write_picture(selection_map(session.observed, title), folder / f"{stem}-map.png", facts)


def next_number(folder: Path) -> int:
    """Give the number after the highest in use, so that no picture is ever overwritten."""
    taken = [int(match[1]) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    return max(taken, default=-1) + 1


def write_picture(image: Image, path: Path, facts: dict[str, Any]) -> Path:
    """Write a PNG that carries its facts, for people and for programs; KloraError where that fails."""
    texts = {"parameters": parameters(facts), "klora": json.dumps(facts)}
    OutputFile.check(path).write(png_bytes(image, texts))
    return path


def first_line(error: BaseException) -> str:
    """Give the first line of an error's text, which is enough for one of ours."""
    line = next(iter(str(error).strip().splitlines()), "no further message")
    return line if len(line) <= 200 else f"{line[:199]}…"
