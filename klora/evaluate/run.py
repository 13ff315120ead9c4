"""The loop of an evaluation: pairs × methods × seeds, shared out by accelerate, resumed where it was stopped."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from klora import __version__
from klora.cache import ScoreCache
from klora.compare import count_of, csv_bytes
from klora.errors import KloraError
from klora.evaluate.identity import identity_of
from klora.evaluate.metrics import Scorer
from klora.evaluate.records import Place, Record, digest_of
from klora.evaluate.study import StudyPair
from klora.evaluate.table import markdown, picture_lines, summarise, summary_lines
from klora.generate import Request, call_arguments, choose_device, choose_dtype, model_name, open_pipeline, paint
from klora.methods import Method
from klora.pair import Pair
from klora.report.files import OutputFile, output_folder

TABLES = ("results.md", "results.csv", "pictures.csv")


@dataclass(frozen=True)
class Evaluation:
    """What `klora evaluate` was asked for.

    `request` holds what is the same for every picture; its pair and prompt are each pair's in turn. `scorer` makes
    what scores, on a device.
    """

    title: str
    request: Request
    pairs: Sequence[StudyPair]
    methods: Sequence[Method]
    scorer: Callable[[str], Scorer]
    notes: Sequence[str] = ()

    @property
    def seeds(self) -> range:
        """The seeds of each pair's pictures."""
        return range(self.request.seed, self.request.seed + self.request.images)


class Group(NamedTuple):
    """The pictures of one pair by one method, as far as they fall to this process."""

    pair: StudyPair
    method: Method
    seeds: tuple[int, ...]


def evaluate_study(asked: Evaluation) -> Iterator[str]:
    """Paint and score what is not on disk yet, then write the tables and say where (the first process only).

    Raises KloraError for a model, a file or a setting that does not do, and where no method runs.
    """
    for pair in asked.pairs:
        Pair.open(pair.subject.lora, pair.style.lora)
    output_folder(asked.request.out)
    state = _process_state(asked.request.device)
    device = str(state.device) if state.num_processes > 1 else choose_device(asked.request.device)
    asked = dataclasses.replace(asked, request=dataclasses.replace(asked.request, device=device))
    worker = _Worker(asked, asked.scorer(device))
    with state.split_between_processes(list(itertools.product(asked.pairs, asked.methods, asked.seeds))) as mine:
        worker.run(_groups(mine), show=state.is_main_process)
    state.wait_for_everyone()
    records, left_out = _gathered(state, worker)
    if state.is_main_process:
        yield from _write_tables(asked, worker.scorer, records, left_out)


def _process_state(device: str) -> Any:
    """Give accelerate's view of the processes; one, unless `accelerate launch` started more."""
    from accelerate import PartialState

    return PartialState(cpu=True) if device == "cpu" else PartialState()


def _groups(jobs: Sequence[tuple[StudyPair, Method, int]]) -> list[Group]:
    # A pair is fused once for all its seeds.
    found = itertools.groupby(jobs, key=lambda job: (job[0], job[1].name))
    together = [list(group) for _, group in found]
    return [Group(group[0][0], group[0][1], tuple(seed for *_, seed in group)) for group in together]


def _gathered(state: Any, worker: _Worker) -> tuple[list[Record], dict[str, str]]:
    from accelerate.utils import gather_object

    if state.num_processes == 1:
        return worker.records, worker.left_out
    records: list[Record] = gather_object(worker.records)
    return records, dict(gather_object(list(worker.left_out.items())))


class _Worker:
    """One process at work. The model is loaded when the first picture is to be painted, if there is one."""

    def __init__(self, asked: Evaluation, scorer: Scorer) -> None:
        self.asked, self.scorer = asked, scorer
        self.records: list[Record] = []
        self.left_out: dict[str, str] = {}
        self._pipe: Any = None
        self._cache = ScoreCache()
        self._common = self._common_facts()

    def run(self, groups: Sequence[Group], show: bool) -> None:
        total = sum(len(group.seeds) for group in groups)
        with tqdm(total=total, unit="picture", leave=False, disable=not show) as bar:
            for group in groups:
                cost = count_of(group.method.forwards, "forward")
                bar.set_description(f"{group.pair.name}, {group.method.name}, {cost} per step")
                self._group(group, bar.update)

    def _group(self, group: Group, done: Callable[[], Any]) -> None:
        scorer_key = self.scorer.key(group.pair)
        places = [self._place(group, seed) for seed in group.seeds]
        unpainted = []
        for place in places:
            record = place.read_record(scorer_key)
            if record is None and (found := place.read_picture()) is not None:
                record = place.write_record(scorer_key, found[1], self.scorer(found[0], group.pair))
            if record is None:
                unpainted.append(place)
                continue
            self.records.append(record)
            done()
        if unpainted and group.method.name not in self.left_out:
            self._paint(group, unpainted, scorer_key, done)

    def _paint(self, group: Group, places: Sequence[Place], scorer_key: str, done: Callable[[], Any]) -> None:
        request = self._request(group)
        if self._pipe is None:
            self._pipe = open_pipeline(request)
            self._pipe.set_progress_bar_config(disable=True)
            call_arguments(self._pipe, request)
        pictures = paint(self._pipe, request, [place.seed for place in places], lambda *_: None)
        with closing(pictures):
            for place in places:
                try:
                    painted = next(pictures)
                except KloraError as error:
                    self.left_out[group.method.name] = f"{group.pair.name}: {error}"
                    return
                image, facts = place.write_picture(painted)
                self.records.append(place.write_record(scorer_key, facts, self.scorer(image, group.pair)))
                done()

    def _request(self, group: Group) -> Request:
        return dataclasses.replace(
            self.asked.request,
            subject=str(group.pair.subject.lora),
            style=str(group.pair.style.lora),
            prompt=group.pair.prompt,
            settings=group.method.settings,
        )

    def _common_facts(self) -> dict[str, Any]:
        """Give what decides a picture and is the same for all of them."""
        import diffusers
        import transformers

        request = self.asked.request
        return {
            "klora": __version__,
            "libraries": [torch.__version__, diffusers.__version__, transformers.__version__],
            "model": identity_of(request.model),
            "dtype": str(choose_dtype(request.dtype, request.device, request.model)),
            "device": torch.device(request.device).type,
            "size": request.size,
            "guidance": request.guidance,
            "negative_prompt": request.negative_prompt,
        }

    def _place(self, group: Group, seed: int) -> Place:
        pair = group.pair
        facts = {
            **self._common,
            "subject": self._cache.sha256(pair.subject.lora),
            "style": self._cache.sha256(pair.style.lora),
            "prompt": pair.prompt,
            "settings": group.method.settings.to_dict(),
            "seed": seed,
        }
        out = Path(self.asked.request.out)
        return Place(out, group.method.name, pair.subject.name, pair.style.name, seed, digest_of(facts))


def _how(asked: Evaluation) -> str:
    """Say in one line what all pictures were painted with."""
    request, seeds = asked.request, asked.seeds
    steps = " or ".join(str(steps) for steps in sorted({method.settings.steps for method in asked.methods}))
    dtype = str(choose_dtype(request.dtype, request.device, request.model)).removeprefix("torch.")
    where = f"{dtype} on {torch.device(request.device).type}"
    model = f"model {model_name(request.model)}, {steps} steps, seeds {seeds[0]} to {seeds[-1]}"
    return f"{model}, {where}, klora {__version__}"


def _write_tables(
    asked: Evaluation, scorer: Scorer, records: Sequence[Record], left_out: dict[str, str]
) -> Iterator[str]:
    ran = [method.name for method in asked.methods if method.name not in left_out]
    if not ran:
        name, reason = next(iter(left_out.items()))
        raise KloraError(f"none of the policies runs here; {name}: {reason}")
    folder = Path(asked.request.out)
    kept = [record for record in records if record.method in ran]
    results = summarise(kept, ran, scorer, left_out)
    text = markdown(results, asked.title, [_how(asked), *asked.notes])
    parts = (text.encode(), csv_bytes(summary_lines(results)), csv_bytes(picture_lines(kept, list(scorer.metrics))))
    for name, data in zip(TABLES, parts, strict=True):
        OutputFile.check(folder / name).write(data)
    yield text
    for name in TABLES:
        yield f"{folder / name}"
