"""Scores and statistics of `klora evaluate`, against transformers' own models and against hand-computed cases."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from klora.errors import KloraError
from klora.evaluation.identity import identity_of
from klora.evaluation.metrics import ClipDino, features_of, mean_cosine
from klora.evaluation.statistics import estimates, harmonic_mean, resampled_means
from klora.evaluation.study import Concept, StudyPair
from klora.vision import load_clip, load_dino
from tests.support.studies import clip_model, noise, vit_model, write_encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_encoders(tmp_path_factory.mktemp("encoders"))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


class TestFeatures:
    def test_the_mean_cosine_is_over_all_pairs(self) -> None:
        pictures, references = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
        assert mean_cosine(pictures, references) == pytest.approx((0.6 + 0.8 + 0.0 + 1.0) / 4)

    def test_clip_features_are_those_of_transformers(self, encoders: tuple[Path, Path]) -> None:
        from transformers import AutoImageProcessor

        images = [noise(1), noise(2, (50, 34))]
        inputs = AutoImageProcessor.from_pretrained(encoders[0])(images=images, return_tensors="pt")
        with torch.inference_mode():
            model = clip_model()
            pooled = model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
            wanted = model.visual_projection(pooled)
        found = torch.cat([features_of(load_clip(str(encoders[0]), "cpu"), image) for image in images])
        assert torch.allclose(found, wanted, atol=1e-6)

    def test_dino_features_are_the_class_token_of_transformers(self, encoders: tuple[Path, Path]) -> None:
        from transformers import AutoImageProcessor

        images = [noise(1), noise(2, (50, 34))]
        inputs = AutoImageProcessor.from_pretrained(encoders[1])(images=images, return_tensors="pt")
        with torch.inference_mode():
            wanted = vit_model()(**inputs).last_hidden_state[:, 0]
        found = torch.cat([features_of(load_dino(str(encoders[1]), "cpu"), image) for image in images])
        assert torch.allclose(found, wanted, atol=1e-6)

    def test_scores_are_mean_cosines_with_the_references_of_each_side(
        self, encoders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        files = [tmp_path / f"{i}.png" for i in range(5)]
        for i, file in enumerate(files):
            noise(i).save(file)
        subject = Concept("a", files[0], "", tuple(files[:2]))
        style = Concept("b", files[0], "", tuple(files[2:]))
        picture = noise(9)
        scores = ClipDino(*map(str, encoders), "cpu")(picture, StudyPair(subject, style, ""))
        clip, dino = load_clip(str(encoders[0]), "cpu"), load_dino(str(encoders[1]), "cpu")
        rules = (("style_similarity", clip, (2, 3, 4)), ("clip_score", clip, (0, 1)), ("dino_score", dino, (0, 1)))
        for name, encoder, seeds in rules:
            own = features_of(encoder, picture).numpy()[0]
            wanted = np.mean([cosine(own, features_of(encoder, noise(seed)).numpy()[0]) for seed in seeds])
            assert scores[name] == pytest.approx(wanted, abs=1e-5)

    def test_the_key_tells_which_side_a_reference_belongs_to(self, encoders: tuple[Path, Path], tmp_path: Path) -> None:
        files = tuple(tmp_path / f"{i}.png" for i in range(3))
        for i, file in enumerate(files):
            noise(i).save(file)
        scorer = ClipDino(*map(str, encoders), "cpu")

        def key(subject: tuple[Path, ...], style: tuple[Path, ...]) -> str:
            return scorer.key(StudyPair(Concept("a", files[0], "", subject), Concept("b", files[0], "", style), ""))

        assert key(files[:1], files[1:]) == key(files[:1], files[1:])
        assert len({key(files[:1], files[1:]), key(files[:2], files[2:]), key(files[1:2], files[1:])}) == 3

    def test_a_model_that_is_not_there_is_one_line_with_its_option(
        self, encoders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        with pytest.raises(KloraError, match=r"--clip nowhere: cannot be loaded .*give a folder"):
            ClipDino("nowhere", str(encoders[1]), "cpu")
        with pytest.raises(KloraError, match="--dino"):
            ClipDino(str(encoders[0]), str(tmp_path), "cpu")

    def test_a_model_without_its_preprocessing_is_not_guessed_at(
        self, encoders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        bare = shutil.copytree(encoders[0], tmp_path / "bare")
        (bare / "preprocessor_config.json").unlink()
        with pytest.raises(KloraError, match=r"--clip .*bare: has no preprocessor_config\.json"):
            ClipDino(str(bare), str(encoders[1]), "cpu")


class TestIdentity:
    def test_a_model_is_known_by_its_contents_wherever_it_lies(
        self, encoders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        copy = tmp_path / "elsewhere"
        shutil.copytree(encoders[0], copy)
        assert identity_of(str(copy)) == identity_of(str(encoders[0])) != identity_of(str(encoders[1]))
        weights = copy / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        assert identity_of(str(copy)) != identity_of(str(encoders[0]))

    def test_a_large_file_is_sampled_from_end_to_end(self, tmp_path: Path) -> None:
        file = tmp_path / "large.bin"
        data = bytearray(3_000_000)
        found = set()
        for change in (None, 0, 2_999_999):
            if change is not None:
                data[change] ^= 1
            file.write_bytes(data)
            found.add(identity_of(str(tmp_path)))
        assert len(found) == 3

    def test_a_hub_id_is_its_own_name(self) -> None:
        assert identity_of("owner/name") == "owner/name"


class TestStatistics:
    def test_the_harmonic_mean(self) -> None:
        assert harmonic_mean(np.array([1.0, 0.5, 0.25])) == pytest.approx(3 / 7)
        assert harmonic_mean(np.array([[0.5, 0.5], [0.5, 0.0], [0.5, -0.1]])).tolist() == [0.5, 0.0, 0.0]

    def test_an_interval_is_that_of_the_normal_approximation_where_that_holds(self) -> None:
        values = np.random.default_rng(3).normal(0.4, 0.1, size=(1, 400, 1))
        [[found]] = estimates(values, lambda means: means)
        error = 1.96 * values.std() / 20
        assert found.value == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx((values.mean() - error, values.mean() + error), abs=error / 20)

    def test_draws_of_two_units_are_binomial(self) -> None:
        means = resampled_means(np.array([[[0.0], [1.0]]]), 20_000).ravel()
        shares = [float((means == value).mean()) for value in (0.0, 0.5, 1.0)]
        assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.015)

    def test_a_constant_lead_has_no_width_however_wide_each_interval_is(self) -> None:
        one = np.random.default_rng(1).normal(size=(1, 30, 2))
        values = np.concatenate([one, one + 0.25])
        wide = estimates(values, lambda means: means)
        paired = estimates(values, lambda means: means - means[..., :1, :])
        assert wide[0][0].high - wide[0][0].low > 0.3
        assert [tuple(cell) for cell in paired[1]] == [pytest.approx((0.25, 0.25, 0.25))] * 2

    def test_the_same_numbers_give_the_same_interval(self) -> None:
        values = np.random.default_rng(1).normal(size=(2, 9, 1))
        assert estimates(values, harmonic_less) == estimates(values, harmonic_less)


def harmonic_less(means: np.ndarray) -> np.ndarray:
    return means
