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
from klora.errors import KloraError
from klora.evaluation.identity import code_digest, file_digest, identity_of
from klora.evaluation.metrics import Scorer
from klora.evaluation.records import PictureFiles, Record, digest_of
from klora.evaluation.study import Concept, StudyPair
from klora.evaluation.table import markdown, picture_lines, summarise, summary_lines
from klora.evaluation.teaching import SIDES, Teaching
from klora.fusion.scores import OnScored
from klora.generation.generate import generate
from klora.generation.methods import Method
from klora.generation.pipeline import call_arguments, choose_device, choose_dtype, model_name, open_pipeline
from klora.generation.request import GenerationRequest
from klora.hosts.guidance import reference_files
from klora.pair import Pair
from klora.report.files import OutputFile, csv_bytes, output_folder
from klora.settings import Settings
from klora.text import count_of

TABLES = ("results.md", "results.csv", "pictures.csv")


@dataclass(frozen=True)
class Evaluation:
    """What `klora evaluate` was asked for.

    `request` holds what is the same for every picture; its pair and prompt are each pair's in turn. `teaching` has the
    pairs, and the references that reference guidance looks at. `scorer` makes what scores, on a device.
    """

    title: str
    request: GenerationRequest
    teaching: Teaching
    methods: Sequence[Method]
    scorer: Callable[[str], Scorer]
    notes: Sequence[str] = ()

    @property
    def pairs(self) -> Sequence[StudyPair]:
        """The pairs, each with the references that score it."""
        return self.teaching.pairs

    @property
    def seeds(self) -> range:
        """The seeds of each pair's pictures."""
        return range(self.request.seed, self.request.seed + self.request.images)


class Batch(NamedTuple):
    """The pictures of one pair by one method, as far as they fall to this process."""

    pair: StudyPair
    method: Method
    seeds: tuple[int, ...]


def evaluate_study(asked: Evaluation, on_scored: OnScored | None = None) -> Iterator[str]:
    """Generate and score what is not on disk yet, then write the tables and say where (the first process only).

    `on_scored` is told how many modules of a pair of LoRAs have been scored, of how many (in the first process only).
    Raises KloraError for a model, a file or a setting that does not do, and where no method runs.
    """
    for pair in asked.pairs:
        Pair.open(pair.subject.lora, pair.style.lora)
    output_folder(asked.request.out)
    state = _process_state(asked.request.device)
    device = str(state.device) if state.num_processes > 1 else choose_device(asked.request.device)
    asked = dataclasses.replace(asked, request=dataclasses.replace(asked.request, device=device))
    worker = _Worker(asked, asked.scorer(device), on_scored if state.is_main_process else None)
    with state.split_between_processes(list(itertools.product(asked.pairs, asked.methods, asked.seeds))) as mine:
        worker.run(_batches(mine), show=state.is_main_process)
    state.wait_for_everyone()
    records, left_out = _gathered(state, worker)
    if state.is_main_process:
        yield from _write_tables(asked, worker.scorer, records, left_out)


def _process_state(device: str) -> Any:
    """Accelerate's view of the processes; one, unless `accelerate launch` started more."""
    from accelerate import PartialState

    return PartialState(cpu=True) if device == "cpu" else PartialState()


def _batches(jobs: Sequence[tuple[StudyPair, Method, int]]) -> list[Batch]:
    # A pair is fused once for all its seeds.
    found = itertools.groupby(jobs, key=lambda job: (job[0], job[1].name))
    together = [list(batch) for _, batch in found]
    return [Batch(batch[0][0], batch[0][1], tuple(seed for *_, seed in batch)) for batch in together]


def _gathered(state: Any, worker: _Worker) -> tuple[list[Record], dict[str, str]]:
    from accelerate.utils import gather_object

    if state.num_processes == 1:
        return worker.records, worker.left_out
    records: list[Record] = gather_object(worker.records)
    return records, dict(gather_object(list(worker.left_out.items())))


class _Worker:
    """One process at work. The model is loaded when the first picture is to be generated, if there is one."""

    def __init__(self, asked: Evaluation, scorer: Scorer, on_scored: OnScored | None) -> None:
        self.asked, self.scorer, self._on_scored = asked, scorer, on_scored
        self.records: list[Record] = []
        self.left_out: dict[str, str] = {}
        self._pipe: Any = None
        self._cache = ScoreCache()
        self._common = self._common_facts()

    def run(self, batches: Sequence[Batch], show: bool) -> None:
        total = sum(len(batch.seeds) for batch in batches)
        with tqdm(total=total, unit="picture", leave=False, disable=not show) as bar:
            for batch in batches:
                cost = count_of(batch.method.forwards, "forward")
                bar.set_description(f"{batch.pair.name}, {batch.method.name}, {cost} per step")
                self._batch(batch, bar.update)

    def _batch(self, batch: Batch, done: Callable[[], Any]) -> None:
        scorer_key = self.scorer.key(batch.pair)
        wanted = [self._files(batch, seed) for seed in batch.seeds]
        missing = []
        for files in wanted:
            record = files.read_record(scorer_key)
            if record is None and (found := files.read_picture()) is not None:
                record = files.write_record(scorer_key, found[1], self.scorer(found[0], batch.pair))
            if record is None:
                missing.append(files)
                continue
            self.records.append(record)
            done()
        if missing and batch.method.name not in self.left_out:
            self._generate(batch, missing, scorer_key, done)

    def _generate(self, batch: Batch, wanted: Sequence[PictureFiles], scorer_key: str, done: Callable[[], Any]) -> None:
        request = self._request(batch)
        if self._pipe is None:
            self._pipe = open_pipeline(request)
            self._pipe.set_progress_bar_config(disable=True)
            call_arguments(self._pipe, request)
        seeds = [files.seed for files in wanted]
        pictures = generate(self._pipe, request, seeds, lambda *_: None, self._on_scored)
        with closing(pictures):
            for files in wanted:
                try:
                    generated = next(pictures)
                except KloraError as error:
                    self.left_out[batch.method.name] = f"{batch.pair.name}: {error}"
                    return
                image, facts = files.write_picture(generated)
                self.records.append(files.write_record(scorer_key, facts, self.scorer(image, batch.pair)))
                done()

    def _request(self, batch: Batch) -> GenerationRequest:
        return dataclasses.replace(
            self.asked.request,
            subject=batch.pair.subject.lora,
            style=batch.pair.style.lora,
            prompt=batch.pair.prompt,
            settings=self.asked.teaching.settings(batch.method, batch.pair),
        )

    def _common_facts(self) -> dict[str, Any]:
        """What decides a picture and is the same for all of them."""
        import diffusers
        import transformers

        request = self.asked.request
        return {
            "klora": code_digest(),
            "libraries": [torch.__version__, diffusers.__version__, transformers.__version__],
            "model": identity_of(request.model),
            "dtype": str(choose_dtype(request.dtype, request.device, request.model)),
            "device": torch.device(request.device).type,
            "size": request.size,
            "guidance": request.guidance,
            "negative_prompt": request.negative_prompt,
        }

    def _digest(self, concept: Concept) -> Any:
        if isinstance(concept.lora, Path):
            return self._cache.sha256(concept.lora)
        return [(self._cache.sha256(path), weight) for path, weight in concept.lora]

    def _files(self, batch: Batch, seed: int) -> PictureFiles:
        pair = batch.pair
        facts = {
            **self._common,
            "subject": self._digest(pair.subject),
            "style": self._digest(pair.style),
            "prompt": pair.prompt,
            "settings": _known_by_contents(self.asked.teaching.settings(batch.method, pair)),
            "seed": seed,
        }
        out = Path(self.asked.request.out)
        return PictureFiles(out, batch.method.name, pair.subject.name, pair.style.name, seed, digest_of(facts))


def _known_by_contents(settings: Settings) -> dict[str, Any]:
    """Settings with the contents of what they name: of reference pictures, and of the models that look at them."""
    facts = settings.to_dict()
    for side in SIDES:
        files = reference_files(side.refs, facts[side.refs]) if facts[side.refs] else []
        facts[side.refs] = [file_digest(file) for file in files]
        facts[side.encoder] = identity_of(facts[side.encoder]) if files else None
    return facts


def _how(asked: Evaluation) -> str:
    """Say in one line what all pictures were generated with."""
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
    text = markdown(results, asked.title, [_how(asked), *asked.teaching.notes, *asked.notes])
    parts = (text.encode(), csv_bytes(summary_lines(results)), csv_bytes(picture_lines(kept, list(scorer.metrics))))
    for name, data in zip(TABLES, parts, strict=True):
        OutputFile.check(folder / name).write(data)
    yield text
    for name in TABLES:
        yield f"{folder / name}"
