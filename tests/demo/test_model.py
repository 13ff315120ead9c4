"""The set that ships: its model, its LoRAs and its judge."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import klora.demo
from klora.demo.judge import Judge
from training.drawing.pictures import render
from training.drawing.styles import GROUNDS, STYLES
from training.drawing.subjects import SUBJECTS
from training.judge import measure
from training.networks import as_pictures, as_tensor
from training.words import WORDS

diffusers = pytest.importorskip("diffusers")

DEMO = Path(klora.demo.__file__).parent
CATALOGUE = json.loads((DEMO / "catalogue.json").read_text(encoding="utf-8"))
LORAS = CATALOGUE["subjects"] | CATALOGUE["styles"]


@pytest.fixture(scope="module")
def pipe():
    pipe = diffusers.DiffusionPipeline.from_pretrained(DEMO / "model").to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


def generate(pipe, prompt, steps, seed=0, n=1):
    noise = torch.Generator().manual_seed(seed)
    scale = CATALOGUE["recommended"]["guidance_scale"]
    return pipe([prompt] * n, num_inference_steps=steps, guidance_scale=scale, generator=noise).images


def test_the_folder_stays_within_twelve_megabytes():
    files = [f for f in DEMO.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= 12e6


def test_no_configuration_says_where_the_model_was_made():
    for file in DEMO.rglob("*.json"):
        assert "_name_or_path" not in file.read_text(encoding="utf-8")


def test_the_autoencoder_gives_the_picture_back(pipe):
    pictures = np.stack([render(s, t, "sky", 1) for s, t in zip(SUBJECTS.values(), STYLES.values(), strict=True)])
    with torch.inference_mode():
        latents = pipe.vae.encode(as_tensor(pictures)).latent_dist.mode()
        again = as_pictures(pipe.vae.decode(latents).sample)
    assert latents.shape == (4, 8, 16, 16)
    error = np.mean((pictures.astype(float) - again) ** 2)
    assert 10 * np.log10(255**2 / error) > 20  # dB


def test_every_caption_word_is_one_known_token(pipe):
    assert all(len(pipe.tokenizer.tokenize(word)) == 1 for word in WORDS)


def test_the_model_generates_in_the_size_and_on_the_ground_that_is_asked(pipe):
    images = generate(pipe, "a robot on rose", steps=5, n=2)
    assert {image.size for image in images} == {(64, 64)}
    corners = np.stack([np.asarray(image, dtype=int)[:6, :6] for image in images]).reshape(-1, 3)
    nearest = min(GROUNDS, key=lambda name: np.abs(np.median(corners, axis=0) - GROUNDS[name]).sum())
    assert nearest == "rose"


def test_the_same_seed_gives_the_same_picture(pipe):
    a, b = (np.asarray(generate(pipe, "a cat", steps=2)[0]) for _ in range(2))
    assert np.array_equal(a, b)


def test_two_of_each_are_held_out_and_both_spellings_ship():
    assert {entry["spelling"] for entry in LORAS.values()} == {"kohya", "peft"}
    for kind in ("subjects", "styles"):
        assert [entry["held_out"] for entry in CATALOGUE[kind].values()] == [False, False, True, True]


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_file_covers_all_attention_projections(name):
    entry = LORAS[name]
    with safe_open(DEMO / entry["file"], "pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        assert stored.metadata()
    down, up = ("lora_down", "lora_up") if entry["spelling"] == "kohya" else ("lora_A", "lora_B")
    assert sum(f".{down}." in key for key in tensors) == sum(f".{up}." in key for key in tensors) == 112
    assert {t.shape[0] for key, t in tensors.items() if f".{down}." in key} == {entry["rank"]}
    assert sum(key.endswith(".alpha") for key in tensors) == (112 if entry["spelling"] == "kohya" else 0)
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert all(t.abs().max() > 0 for t in tensors.values())


@pytest.mark.parametrize("name", ["bolt", "mimi"])
def test_diffusers_loads_both_spellings_and_the_judge_sees_what_they_learned(pipe, judge, name):
    pytest.importorskip("peft")
    prompt = LORAS[name]["prompt"].format(family="robot")
    pipe.load_lora_weights(DEMO / "loras", weight_name=Path(LORAS[name]["file"]).name)
    try:
        with_lora = generate(pipe, prompt, steps=6, n=4)
    finally:
        pipe.unload_lora_weights()
    without = generate(pipe, prompt, steps=6, n=4)
    named = [sum(name in (v.subject, v.style) for v in judge(images)) for images in (with_lora, without)]
    assert named[0] >= 2
    assert named[1] == 0


def test_the_judge_is_as_good_as_the_catalogue_says(judge):
    said = CATALOGUE["figures"]["judge"]
    assert said["subject_accuracy"] >= 0.97
    assert measure(judge, n=80, seed=12345) == pytest.approx(said, abs=0.05)


def test_the_judge_refuses_noise_and_takes_any_size(judge):
    rng = np.random.default_rng(0)
    verdicts = judge(rng.integers(0, 256, (50, 64, 64, 3), dtype=np.uint8))
    assert np.mean([v.subject is None and v.style is None for v in verdicts]) >= 0.95
    small = Image.fromarray(render(SUBJECTS["bolt"], STYLES["engraving"], "sky", 5))
    (verdict,) = judge([small.resize((256, 256), Image.Resampling.NEAREST)])
    assert (verdict.subject, verdict.style) == ("bolt", "engraving")
    assert sum(verdict.subjects.values()) == pytest.approx(1, abs=1e-4)
    assert set(verdict.styles) == set(judge.styles)
