"""References that guide a picture do not score it; references and code decide a picture, and so its name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from klora import cli
from klora.errors import KloraError
from klora.evaluation import identity
from klora.evaluation.identity import code_digest
from klora.evaluation.study import Concept, StudyPair, draw_pairs, read_study
from klora.evaluation.teaching import arrange
from klora.generation.methods import Method, read_methods
from klora.settings import Settings
from tests.support.studies import noise, write_encoders, write_model, write_study

BOTH = "dynamic:style_refs=study:subject_refs=study"
MODELS = {"--clip": Settings().clip_model, "--dino": Settings().dino_model}


def methods(text: str, **settings: Any) -> list[Method]:
    return read_methods(text, Settings(**settings))


def concept(name: str, pictures: int, teachers: int = 0) -> Concept:
    files = [tuple(Path(f"{name}-{kind}{i}.png") for i in range(n)) for kind, n in (("", pictures), ("t", teachers))]
    return Concept(name, Path(f"{name}/lora.safetensors"), name, *files)


def pair(references: int = 4, teachers: int = 0) -> StudyPair:
    return StudyPair(concept("dog", references, teachers), concept("ink", references, teachers), "a dog in ink")


def test_without_a_method_that_asks_for_them_all_references_score() -> None:
    found = arrange([pair()], methods("k-lora,dynamic"), MODELS)
    assert found.pairs == (pair(),)
    assert found.notes == ()
    [_, dynamic] = methods("k-lora,dynamic")
    assert found.settings(dynamic, pair()) == dynamic.settings


def test_under_the_same_encoder_no_picture_teaches_and_scores() -> None:
    [k_lora, guided] = both = methods(f"k-lora,{BOTH}")
    found = arrange([pair(5)], both, MODELS)
    settings = found.settings(guided, found.pairs[0])
    for side, given in (("style", settings.style_refs), ("subject", settings.subject_refs)):
        scoring = {str(path) for path in getattr(found.pairs[0], side).references}
        assert set(given.split(";")).isdisjoint(scoring)
        assert set(given.split(";")) | scoring == {str(path) for path in getattr(pair(5), side).references}
    assert found.settings(k_lora, found.pairs[0]) == k_lora.settings
    assert all("references that do not score" in note for note in found.notes)


def test_another_encoder_may_teach_with_the_pictures_that_score() -> None:
    asked = methods(BOTH, clip_model="owner/another-clip")
    found = arrange(
        [pair(1, teachers=0)], asked[:0] + methods("dynamic:style_refs=study:clip_model=owner/other"), MODELS
    )
    assert found.pairs == (pair(1),)
    assert "another encoder" in found.notes[0]
    mixed = arrange([pair(4)], asked, MODELS)
    assert len(mixed.pairs[0].style.references) == 4
    assert len(mixed.pairs[0].subject.references) == 2


def test_pictures_kept_apart_teach_and_all_others_score() -> None:
    found = arrange([pair(1, teachers=2)], methods(BOTH), MODELS)
    assert [len(side.references) for side in (found.pairs[0].subject, found.pairs[0].style)] == [1, 1]
    assert found.settings(methods(BOTH)[0], found.pairs[0]).style_refs == "ink-t0.png;ink-t1.png"


def test_a_single_reference_cannot_teach_and_score() -> None:
    with pytest.raises(KloraError, match=r"ink: has one reference.*add a second.*--clip"):
        arrange([pair(1)], methods(BOTH), MODELS)
    with pytest.raises(KloraError, match="no reference pictures"):
        arrange([pair(0)], methods(BOTH), {})


def test_only_policies_that_are_guided_take_references() -> None:
    with pytest.raises(KloraError, match="k-lora:style_refs=study: takes no references; use dynamic"):
        arrange([pair()], methods("k-lora:style_refs=study"), MODELS)


def test_pairs_are_drawn_by_seed_each_once_and_in_their_order() -> None:
    pairs = [dataclasses.replace(pair(), prompt=str(i)) for i in range(30)]
    drawn = draw_pairs(pairs, 18, 0)
    numbers = [int(one.prompt) for one in drawn]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 18
    assert drawn == draw_pairs(pairs, 18, 0) != draw_pairs(pairs, 18, 1)
    assert draw_pairs(pairs, 30, 5) == tuple(pairs)
    with pytest.raises(KloraError, match="--pairs: the study has 30 pairs, fewer than 31"):
        draw_pairs(pairs, 31, 0)


def test_the_code_that_makes_a_picture_is_known_by_its_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("engine/session.py", "webui/ui.py"):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_text("old")
    monkeypatch.setattr(identity.klora, "__file__", str(tmp_path / "__init__.py"))
    before = code_digest()
    (tmp_path / "webui/ui.py").write_text("new")
    assert code_digest() == before
    (tmp_path / "engine/session.py").write_text("new")
    assert code_digest() != before


@pytest.fixture
def study(tmp_path: Path) -> tuple[str, ...]:
    """Arguments for one pair and seed, guided towards its own references by the encoders that score."""
    write_study(tmp_path / "study", write_model(tmp_path))
    clip, dino = map(str, write_encoders(tmp_path))
    for style in ("ink", "pop_art"):
        noise(3).save(tmp_path / "study" / "styles" / style / "c.png")
    models = ("--model", str(tmp_path / "model"), "--clip", clip, "--dino", dino)
    taught = f"k-lora,{BOTH}:clip_model={clip}:dino_model={dino}"
    options = ("--policies", taught, "--steps", "1", "--size", "32", "--seeds", "1", "--device", "cpu", "--pairs", "1")
    return ("evaluate", str(tmp_path / "study"), *models, *options, "--out", str(tmp_path / "out"))


def test_a_replaced_reference_makes_the_guided_pictures_anew_and_no_others(
    study: tuple[str, ...], tmp_path: Path
) -> None:
    assert cli.main(study) == 0
    text = (tmp_path / "out" / "results.md").read_text()
    assert "1 of 2 pairs, drawn with seed 0" in text
    assert "guided towards the pair's own references, with references that do not score" in text
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/pictures").rglob("*.png")}
    assert len(first) == 2
    drawn = json.loads(next((tmp_path / "out/pictures").rglob("*.json")).read_text())["record"]["style"]
    noise(99).save(tmp_path / "study" / "styles" / drawn / "a.png")
    assert cli.main(study) == 0
    second = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/pictures").rglob("*.png")}
    assert first.items() <= second.items()
    [new] = second.keys() - first.keys()
    assert "dynamic" in new.parent.name


def test_a_folder_may_keep_teachers_apart(study: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "study/styles/ink/teach").mkdir()
    noise(7).save(tmp_path / "study/styles/ink/teach/t.png")
    [ink] = [found.style for found in read_study(tmp_path / "study") if found.style.name == "ink"]
    assert [path.name for path in ink.teachers] == ["t.png"]
    assert [path.name for path in ink.references] == ["a.png", "b.jpg", "c.png"]
