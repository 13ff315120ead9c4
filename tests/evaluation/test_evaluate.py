"""`klora evaluate`: what it reads, what it writes, and that nothing is redone or lost."""

from __future__ import annotations

import csv
import json
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file

from klora import cli
from klora.errors import KloraError
from klora.evaluation import run as evaluation
from klora.evaluation.study import read_study
from tests.support.lora_files import write_lora
from tests.support.processes import end_of, start
from tests.support.studies import noise, write_encoders, write_model, write_study

SCORES = ("style_similarity", "clip_score", "dino_score")
Files = dict[str, tuple[int, bytes]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    attention = write_model(folder)
    dog = write_study(folder / "study", attention) / "subjects/dog"
    write_lora(dog / "coat.safetensors", attention, "peft", rank=2, seed=9)
    (dog / "loras.txt").write_text("lora.safetensors\n coat.safetensors:0.5\n\n")
    write_encoders(folder)
    return folder


@pytest.fixture(scope="module")
def words(home: Path) -> tuple[str, ...]:
    """Arguments for two pairs, two seeds and two policies that run, with scores: eight pictures."""
    models = [word for name in ("model", "clip", "dino") for word in (f"--{name}", str(home / name))]
    return ("evaluate", str(home / "study"), *models, "--steps", "1", "--size", "32", "--seeds", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def done(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation."""
    folder = tmp_path_factory.mktemp("done")
    assert cli.main([*words, "--policies", "k-lora,direct,b-lora", "--out", str(folder)]) == 0
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def files_of(folder: Path) -> Files:
    """Pictures and scores, by name: when they were written, and what they hold."""
    found = (path for path in (folder / "pictures").rglob("*") if path.suffix in (".png", ".json"))
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def forbid_painting(monkeypatch: pytest.MonkeyPatch) -> None:
    def generated(*_: Any) -> Any:
        raise AssertionError("a picture was generated again")

    monkeypatch.setattr(evaluation, "open_pipeline", generated)


class TestStudy:
    def test_a_folder_pairs_all_and_takes_words_from_files_or_names(self, home: Path) -> None:
        pairs = read_study(home / "study")
        assert [(pair.name, pair.prompt) for pair in pairs] == [
            ("dog × ink", "a sbu dog in ink style"),
            ("dog × pop_art", "a sbu dog in pop art style"),
        ]
        assert [path.name for path in pairs[0].style.references] == ["a.png", "b.jpg"]
        assert pairs[0].style.lora == home / "study/styles/ink/lora.safetensors"

    def test_several_loras_are_listed_with_their_weights(self, home: Path, tmp_path: Path) -> None:
        dog = home / "study/subjects/dog"
        expected = ((dog / "lora.safetensors", 1.0), (dog / "coat.safetensors", 0.5))
        assert read_study(home / "study")[0].subject.lora == expected
        noise(0).save(tmp_path / "one.png")
        entry = {"lora": ["dog.safetensors", {"file": "coat.safetensors", "weight": 0.5}], "references": ["one.png"]}
        manifest = tmp_path / "study.json"
        manifest.write_text(json.dumps({"subjects": {"dog": entry}, "styles": {"ink": entry}}))
        [pair] = read_study(manifest)
        assert pair.style.lora == ((tmp_path / "dog.safetensors", 1.0), (tmp_path / "coat.safetensors", 0.5))

    def test_a_template_places_the_words(self, home: Path) -> None:
        assert read_study(home / "study", "{style}: {subject} {here}")[0].prompt == "in ink style: a sbu dog {here}"

    def test_a_manifest_names_files_and_pairs(self, home: Path, tmp_path: Path) -> None:
        for name in ("one.png", "two.png"):
            noise(0).save(tmp_path / name)
        entry = {"lora": "dog.safetensors", "references": ["one.png", "two.png"]}
        styles = {"ink": {**entry, "prompt": "as ink"}, "oil": entry}
        manifest = tmp_path / "study.json"
        manifest.write_text(json.dumps({"subjects": {"dog": entry}, "styles": styles, "pairs": [["dog", "oil"]]}))
        [pair] = read_study(manifest)
        assert (pair.prompt, pair.style.lora) == ("a dog in oil style", tmp_path / "dog.safetensors")
        manifest.write_text(json.dumps({"subjects": {"dog": entry}, "styles": styles}))
        assert [pair.prompt for pair in read_study(manifest)] == ["a dog as ink", "a dog in oil style"]

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("{", "is not the JSON of an evaluation"),
            ('{"subjects": {}}', "'styles'"),
            ('{"subjects": {}, "styles": {}}', "names no pairs"),
            ('{"subjects": {}, "styles": {}, "pairs": [["a", "b"]]}', "'a' is not among"),
            ('{"subjects": {"a": {"lora": "a", "references": ["no.png"]}}, "styles": {}}', "no.png"),
        ],
    )
    def test_a_bad_manifest_is_named(self, tmp_path: Path, text: str, named: str) -> None:
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(KloraError, match=r"study\.json") as caught:
            read_study(tmp_path / "study.json")
        assert named in str(caught.value)

    def test_what_a_folder_lacks_is_named(self, tmp_path: Path) -> None:
        def complaint() -> str:
            with pytest.raises(KloraError) as caught:
                read_study(tmp_path)
            return str(caught.value)

        assert "has no folder subjects" in complaint()
        inside = tmp_path / "subjects" / "dog"
        inside.parent.mkdir()
        assert "is empty" in complaint()
        inside.mkdir()
        assert "no reference pictures" in complaint()
        noise(0).save(inside / "a.png")
        assert "no .safetensors file" in complaint()
        for name in ("a", "b"):
            save_file({"x": torch.zeros(1)}, inside / f"{name}.safetensors")
        assert "2 .safetensors files" in complaint()
        (inside / "loras.txt").write_text("a.safetensors\nb.safetensors:11\n")
        assert "loras.txt: weight: '11' is not a weight" in complaint()
        (inside / "loras.txt").write_text("\n")
        assert "loras.txt: is empty" in complaint()
        (inside / "loras.txt").unlink()
        (inside / "a.safetensors").rename(inside / "lora.safetensors")
        assert "has no folder styles" in complaint()


class TestTables:
    def test_every_picture_has_its_scores_and_its_file(self, done: Path) -> None:
        table = rows(done / "pictures.csv")
        assert len(table) == 8
        assert {(row["method"], row["subject"], row["style"], row["seed"]) for row in table} == {
            (method, "dog", style, seed)
            for method in ("k-lora", "direct")
            for style in ("ink", "pop_art")
            for seed in ("0", "1")
        }
        for row in table:
            with Image.open(done / row["picture"]) as image:
                assert json.loads(image.text["klora"])["settings"]["policy"] == row["method"]
            assert all(-1 <= float(row[name]) <= 1 for name in SCORES)

    def test_a_method_scores_the_mean_of_its_pictures(self, done: Path) -> None:
        table = rows(done / "pictures.csv")
        for found in rows(done / "results.csv")[:2]:
            own = [row for row in table if row["method"] == found["method"]]
            means = [sum(float(row[name]) for row in own) / 4 for name in SCORES]
            assert [float(found[name]) for name in SCORES] == pytest.approx(means, abs=1e-5)
            assert float(found["harmonic"]) == pytest.approx(3 / sum(1 / mean for mean in means), abs=1e-5)
            assert float(found["sum"]) == pytest.approx(means[0] + means[1], abs=1e-5)
            assert float(found["clip_score_low"]) <= float(found["clip_score"]) <= float(found["clip_score_high"])
            assert (found["pictures"], found["forwards_per_step"]) == ("4", "1")

    def test_what_does_not_run_is_left_out_with_its_reason(self, done: Path) -> None:
        last = rows(done / "results.csv")[-1]
        assert (last["method"], last["pictures"], last["clip_score"]) == ("b-lora", "0", "")
        assert "SDXL" in last["note"]

    def test_the_markdown_has_percentages_intervals_and_differences(self, done: Path) -> None:
        text = (done / "results.md").read_text()
        assert (
            "| method | style similarity % | CLIP score % | DINO score % | harmonic mean % | sum of CLIP scores % |"
            in text
        )
        first = next(line for line in text.splitlines() if line.startswith("| `k-lora` |"))
        clip = rows(done / "results.csv")[0]
        assert f"{100 * float(clip['clip_score']):.1f} [{100 * float(clip['clip_score_low']):.1f}, " in first
        assert "Difference from `k-lora`" in text
        assert "- `b-lora`: " in text


class TestResume:
    def test_a_finished_run_is_neither_painted_nor_scored_again(
        self, done: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forbid_painting(monkeypatch)
        before, tables = files_of(done), (done / "results.csv").read_bytes()
        for name in evaluation.TABLES:
            (done / name).unlink()
        assert cli.main([*words, "--policies", "k-lora,direct", "--out", str(done)]) == 0
        assert files_of(done) == before
        assert (done / "results.csv").read_bytes().splitlines()[:3] == tables.splitlines()[:3]

    def test_lost_or_outdated_scores_are_made_anew_from_the_picture(
        self, done: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forbid_painting(monkeypatch)
        before = files_of(done)
        one, two, *_ = sorted((done / "pictures").rglob("*.json"))
        one.unlink()
        found = json.loads(two.read_text())
        two.write_text(json.dumps({**found, "scorer": "another"}))
        assert cli.main([*words, "--policies", "k-lora,direct", "--out", str(done)]) == 0
        after = files_of(done)
        assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
        assert {name for name in after if after[name][0] != before[name][0]} == {one.name, two.name}

    def test_a_damaged_picture_is_painted_again_and_the_others_are_kept(
        self, done: Path, words: tuple[str, ...]
    ) -> None:
        before = files_of(done)
        victim = min((done / "pictures").rglob("*.png"))
        victim.write_bytes(victim.read_bytes()[:100])
        victim.with_suffix(".json").unlink()
        assert cli.main([*words, "--policies", "k-lora,direct", "--out", str(done)]) == 0
        after = files_of(done)
        changed = {name for name in after if after[name][1] != before[name][1]}
        assert after.keys() == before.keys()
        assert changed <= {victim.name, victim.with_suffix(".json").name}
        with Image.open(victim) as image:
            image.load()

    def test_what_decides_a_picture_decides_its_name(self, done: Path, words: tuple[str, ...]) -> None:
        before = files_of(done)
        more = ("--policies", "direct", "--seeds", "1", "--prompt", "{subject}", "--out", str(done))
        assert cli.main([*words, *more]) == 0
        after = files_of(done)
        assert before.items() <= after.items()
        assert len(after) == len(before) + 4
        assert len(rows(done / "pictures.csv")) == 2

    def test_a_killed_run_goes_on_where_it_was(self, words: tuple[str, ...], tmp_path: Path) -> None:
        argv = [*words, "--policies", "k-lora,direct", "--out", str(tmp_path)]
        process = start(cli.main, argv)
        until(lambda: len(list(tmp_path.rglob("*.json"))) >= 2 or not process.is_alive())
        process.kill()
        assert end_of(process) == -signal.SIGKILL
        before = files_of(tmp_path)
        assert 4 <= len(before) < 16
        assert not (tmp_path / "results.csv").exists()
        assert cli.main(argv) == 0
        after = files_of(tmp_path)
        assert before.items() <= after.items()
        assert len(after) == 16
        assert len(rows(tmp_path / "pictures.csv")) == 8


def until(true: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_scoring_of_new_files_is_told(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[int, int]] = []
    monkeypatch.setattr("klora.commands.evaluate.scoring_bar", lambda: lambda *count: heard.append(count))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv = [*words, "--policies", "k-lora", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    totals = [total for done, total in heard if done == total]
    assert len(totals) == 2  # a pair each, of which the second has a subject that is known


def evaluate_as_one_of_two(argv: Sequence[str]) -> int:
    PartialState._reset_state()  # what a fork has of this process, which is the only one
    return cli.main(argv)


def test_accelerate_shares_the_work_out(
    done: Path, words: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # What `accelerate launch` tells each process for GPUs; for CPUs it wants MPI.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    argv = [*words, "--policies", "k-lora,direct,b-lora", "--out", str(tmp_path)]
    processes = [start(evaluate_as_one_of_two, argv, **common, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    ends = [end_of(process) for process in processes]
    out, err = capfd.readouterr()
    assert ends == [0, 0], err
    # Only the first process speaks, of its half of the pictures.
    assert out.count("# Evaluation") == 1
    assert "0/6 [" in err
    assert {row["method"] for row in rows(tmp_path / "results.csv")} == {"k-lora", "direct", "b-lora"}
    table = rows(tmp_path / "pictures.csv")
    assert len(table) == 8
    for row in table:
        alone, shared = (folder / row["picture"] for folder in (done, tmp_path))
        assert scores(alone) == pytest.approx(scores(shared), abs=1e-4)
        with Image.open(alone) as a, Image.open(shared) as b:
            assert a.tobytes() == b.tobytes()


def scores(picture: Path) -> list[float]:
    found = json.loads(picture.with_suffix(".json").read_text())["record"]["scores"]
    return [found[name] for name in SCORES]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--clip", "nowhere"], "--clip nowhere"),
        (["--dino", "nowhere"], "--dino nowhere"),
        (["--policies", "best"], "--policies"),
        (["--policies", "b-lora"], "SDXL"),
        (["--model", "nowhere"], "nowhere"),
        (["--demo"], "--model"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    words: tuple[str, ...], more: list[str], named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, *more, "--out", str(tmp_path)]) == 2
    out, err = capfd.readouterr()
    error = err.splitlines()[-1]
    assert out == ""
    assert "klora: error: " in error
    assert named in error


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--model", "m"], "FOLDER: is needed, or --demo"),
        (["nowhere"], "--model: is needed, or --demo"),
        (["nowhere", "--model", "m"], "nowhere: there is no such file or folder"),
    ],
)
def test_what_is_missing_is_named(argv: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", *argv]) == 2
    assert named in capfd.readouterr().err
