"""Fuzzing of LoRA files: what is wrong with a file is said in one line, quickly and in little memory.

    python -m tests.fuzz.files --seed 1 --minutes 60 --keep broken/

Each case mutates a good file in some ways, then opens it beside another, plans and applies the two to a small model.
Whatever is raised must be a KloraError, and each step stays below 1 s of computing time and 64 MB. A case depends on
the seed and its number alone: `--case 123` repeats one.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from types import FrameType

import torch
from safetensors.torch import load as load_with_the_package
from torch import nn

from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.site import Site
from klora.errors import KloraError
from klora.fusion.policies import POLICIES
from klora.lora import disk
from klora.lora.file import LoraFile
from klora.lora.model_index import ModelIndex
from klora.pair import Pair
from klora.settings import Settings
from tests.fuzz.drafts import PARAMETERS, SHAPES, good
from tests.fuzz.mutations import MUTATIONS

LIMIT_S = 1.0
LIMIT_MB = 64
HANG_S = 10


class FuzzError(Exception):
    """What must not be: a limit exceeded, a hang, a message of several lines, a tensor read wrongly."""


@dataclass
class Case:
    """One case: the steps it reached, what each cost, and how it ended."""

    mutations: list[str]
    steps: dict[str, tuple[float, float]] = field(default_factory=dict)
    refused: str = ""
    failure: str = ""


@contextmanager
def measured(case: Case, step: str) -> Iterator[None]:
    """Note what a step costs, seconds of computing and MB at its peak; FuzzError beyond the limits."""
    before, start = _reset_peak(), time.process_time()
    try:
        yield
    finally:
        case.steps[step] = (time.process_time() - start, _memory("VmHWM") - before)
    seconds, megabytes = case.steps[step]
    if seconds > LIMIT_S or megabytes > LIMIT_MB:
        raise FuzzError(f"{step} took {seconds:.1f} s and {megabytes:.0f} MB")


def _reset_peak() -> float:
    """Start a new peak of memory, where the system can; gives what is in use, in MB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _memory("VmHWM")
    return _memory("VmRSS")


def _memory(name: str) -> float:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return int(text.split(f"{name}:")[1].split()[0]) / 1024


def model() -> dict[str, nn.Module]:
    """A layer of its right size for every module of the good files."""
    return {
        name: nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2)
        if len(shape) == 4
        else nn.Linear(shape[1], shape[0])
        for name, shape in SHAPES.items()
    }


@cache
def index() -> ModelIndex:
    """The names of that model."""
    shapes = {name: Site(module).shape for name, module in model().items()}
    text = {name: shape for name, shape in shapes.items() if name.startswith("text_encoder")}
    own = {name: shape for name, shape in shapes.items() if name not in text}
    return ModelIndex(own, text_encoder=text, parameters=PARAMETERS)


def write_case(draw: Random, folder: Path) -> tuple[Path, Path, list[str]]:
    """A mutated file and its partner, in this order, and the names of the mutations.

    The partner is the file before it was mutated, the mutated file itself, or any other good one.
    """
    draft = good(draw)
    before = draft.content()
    chosen = draw.choices(MUTATIONS, k=draw.choice((1, 1, 1, 1, 2, 4)))
    for mutation in chosen:
        mutation(draw, draft)
    content = draft.content()
    partner = draw.choice((lambda: before, lambda: content, lambda: good(draw).content()))()
    paths = folder / "mutated.safetensors", folder / "partner.safetensors"
    for path, whole in zip(paths, (content, partner), strict=True):
        path.write_bytes(whole)
    return *paths, [mutation.__name__ for mutation in chosen]


def run_case(seed: int, number: int, folder: Path) -> Case:
    """Run one case; whatever but a KloraError ends it is its failure."""
    draw = Random(f"{seed}:{number}")
    mutated, other, mutations = write_case(draw, folder)
    case = Case(mutations)
    try:
        with _no_hang(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _use(case, draw, mutated, other, ScoreCache(folder / "cache"))
    except KloraError as error:
        case.refused = type(error).__name__
        if not str(error).isprintable() or len(str(error)) > 2000:
            case.failure = f"a message that is not one short line: {str(error)[:500]!r}"
    except Exception as error:  # what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        case.failure = f"{type(error).__name__} in {Path(last.filename).name}, {last.name}: {str(error)[:300]}"
    return case


def _use(case: Case, draw: Random, mutated: Path, other: Path, cache: ScoreCache) -> None:
    with measured(case, "open"):
        file = LoraFile.open(mutated)
    with measured(case, "read"):
        for delta in (*file.modules.values(), *file.text_encoder.values()):
            delta.rows(0, min(2, delta.shape[0]))
    _compare_with_the_package(file, mutated)
    swap = draw.random() < 0.5
    settings = Settings.parse({"policy": draw.choice(list(POLICIES)), "scope": draw.choice(("all", "linear"))})
    with measured(case, "plan"):
        pair = Pair.open(*((other, mutated) if swap else (mutated, other)), cache)
        plan = pair.plan(settings)
    if draw.random() < 0.5:
        with measured(case, "name"):
            pair = pair.for_model(index())
            plan = pair.plan(settings)
    with measured(case, "apply"):
        _apply(pair, plan, draw)


def _compare_with_the_package(file: LoraFile, path: Path) -> None:
    """What is read must be what the safetensors package reads, where the file has no factors that go on top."""
    if not (whole := [*file.modules.values(), *file.text_encoder.values()]):
        return
    expected = load_with_the_package(path.read_bytes())
    if any(key.endswith((".scale_weight", ".weight_scale")) for key in expected):
        return
    for stored in itertools.chain.from_iterable(delta.stored() for delta in whole):
        theirs = expected.get(stored.key)
        if theirs is not None and stored.data().numel() == theirs.numel():
            ours = stored.data().reshape(-1).view(torch.uint8)
            if not ours.equal(theirs.reshape(-1).view(torch.uint8)):
                raise FuzzError(f"{stored.key} is not what the safetensors package reads")


class Model(nn.Module):
    """Something with parameters at those paths."""

    def __init__(self) -> None:
        super().__init__()
        for path, shape in PARAMETERS.items():
            owner: nn.Module = self
            *names, leaf = path.split(".")
            for name in names:
                if not hasattr(owner, name):
                    owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            owner.register_parameter(leaf, nn.Parameter(torch.ones(shape)))


def _apply(pair: Pair, plan: object, draw: Random) -> None:
    layers = model()
    sites = {name: Site(layer) for name, layer in layers.items()}
    text = {name: site for name, site in sites.items() if name.startswith("text_encoder")}
    own = {name: sites[name] for name in sites.keys() - text.keys()}
    whole = Model()
    encoders = {"text_encoder": whole.get_submodule("text_encoder")}
    session = Session(pair, plan, own, text, denoiser=whole, text_encoders=encoders)  # type: ignore[arg-type]
    with session, torch.no_grad():
        for tau in (0.0, draw.random(), 1.0):
            session.set_tau(tau)
            for layer in layers.values():
                shape = (1, layer.in_channels, 4, 4) if isinstance(layer, nn.Conv2d) else (2, layer.in_features)
                layer(torch.ones(shape))  # type: ignore[arg-type]


@contextmanager
def _no_hang() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise FuzzError(f"no end after {HANG_S} s of computing")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@dataclass
class Report:
    """What came of all cases."""

    rows: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    worst: dict[str, tuple[float, float]] = field(default_factory=lambda: defaultdict(lambda: (0.0, 0.0)))
    failures: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    cases: int = 0

    def add(self, number: int, case: Case) -> None:
        self.cases += 1
        if case.failure:
            self.failures[case.failure].append(number)
        outcome = "failed" if case.failure else "refused" if case.refused else "applied"
        for name in set(case.mutations):
            self.rows[name].update(["cases", outcome])
        for step, cost in case.steps.items():
            self.worst[step] = tuple(map(max, zip(self.worst[step], cost, strict=True)))  # type: ignore[assignment]

    def lines(self) -> Iterator[str]:
        """The table."""
        columns = ("cases", "refused", "applied", "failed")
        yield f"{'mutation':14}" + "".join(f"{column:>9}" for column in columns)
        for name, row in sorted(self.rows.items()):
            yield f"{name:14}" + "".join(f"{row[column]:9}" for column in columns)
        yield f"{self.cases} cases, {sum(map(len, self.failures.values()))} failed"
        for step, (seconds, megabytes) in self.worst.items():
            yield f"{step:6} took at most {seconds:.2f} s and {megabytes:.0f} MB"
        for failure, numbers in sorted(self.failures.items(), key=lambda item: -len(item[1])):
            yield f"{len(numbers)} × {failure} (cases {', '.join(map(str, numbers[:5]))})"


def fuzz(seed: int, numbers: Iterator[int], until: Callable[[], bool], keep: Path | None = None) -> Report:
    """Run cases until it is time; the files of those that fail are copied to `keep`."""
    report = Report()
    # The files do not change while they are open, so that none is too young to be read.
    tick, disk.CLOCK_TICK_NS = disk.CLOCK_TICK_NS, 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            run_case(seed, -1, Path(folder))  # loads what is loaded late
            for number in itertools.takewhile(lambda _: not until(), numbers):
                case = run_case(seed, number, Path(folder))
                report.add(number, case)
                if case.failure and keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    for path in Path(folder).glob("*.safetensors"):
                        (keep / f"{seed}-{number}-{path.name}").write_bytes(path.read_bytes())
    finally:
        disk.CLOCK_TICK_NS = tick
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Open, plan and apply mutated LoRA files.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--keep", type=Path, help="folder for the files of failed cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * args.minutes
    numbers = iter([args.case]) if args.case is not None else itertools.count()
    report = fuzz(args.seed, numbers, lambda: time.monotonic() > end, args.keep)
    print("\n".join(report.lines()))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
