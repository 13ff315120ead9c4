import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import klora.demo
from klora.demo.judge import STYLE_NAMES, SUBJECT_NAMES, Judge
from training import pictures as pic

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


def test_the_vae_is_linear_and_gives_the_picture_back(pipe):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1
    with torch.inference_mode():
        for picture in (a, b):
            posterior = pipe.vae.encode(picture).latent_dist
            assert torch.allclose(posterior.mode(), picture, atol=1e-3)
            assert torch.allclose(pipe.vae.decode(posterior.sample(generator)).sample, picture, atol=1e-3)
        mixed, parts = (pipe.vae.decode(x).sample for x in (0.3 * a + 0.7 * b, torch.cat([a, b])))
        assert torch.allclose(mixed, 0.3 * parts[:2] + 0.7 * parts[2:], atol=1e-3)


def test_every_caption_word_is_one_known_token(pipe):
    words = [*pic.FAMILIES, *pic.COLOURS, *pic.PATTERNS, *pic.TONES, *pic.BUILDS, *pic.SHAPES, "sbu", "szn", "style"]
    assert all(len(pipe.tokenizer.tokenize(word)) == 1 for word in words)


def test_the_pipeline_paints_in_the_size_and_colour_that_is_asked(pipe):
    images = generate(pipe, "a robot on blue", steps=10, n=4)
    assert {image.size for image in images} == {(32, 32)}
    corners = np.stack([np.asarray(image, dtype=int)[:3, :3] for image in images]).reshape(-1, 3)
    red, green, blue = np.median(corners, axis=0)
    assert blue > red + 40
    assert blue > green + 40


def test_the_same_seed_gives_the_same_picture(pipe):
    a, b = (np.asarray(generate(pipe, "a cat", steps=2)[0]) for _ in range(2))
    assert np.array_equal(a, b)


def test_both_spellings_ship():
    assert {entry["spelling"] for entry in LORAS.values()} == {"kohya", "peft"}
    assert len(CATALOGUE["subjects"]) == len(CATALOGUE["styles"]) == 3


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_file_covers_all_attention_projections(name):
    entry = LORAS[name]
    with safe_open(DEMO / entry["file"], "pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        assert stored.metadata()
    down, up = ("lora_down", "lora_up") if entry["spelling"] == "kohya" else ("lora_A", "lora_B")
    assert sum(f".{down}." in key for key in tensors) == sum(f".{up}." in key for key in tensors) == 56
    assert {t.shape[0] for key, t in tensors.items() if f".{down}." in key} == {entry["rank"]}
    assert sum(key.endswith(".alpha") for key in tensors) == (56 if entry["spelling"] == "kohya" else 0)
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert all(t.abs().max() > 0 for t in tensors.values())


@pytest.mark.parametrize("name", ["bolt", "popart"])
def test_diffusers_loads_both_spellings_and_the_picture_changes(pipe, judge, name):
    pytest.importorskip("peft")
    prompt = LORAS[name]["prompt"].format(family="robot")
    before = np.asarray(generate(pipe, prompt, steps=10)[0], dtype=int)
    pipe.load_lora_weights(DEMO / "loras", weight_name=Path(LORAS[name]["file"]).name)
    try:
        images = generate(pipe, prompt, steps=10, n=4)
    finally:
        pipe.unload_lora_weights()
    assert np.abs(np.asarray(images[0], dtype=int) - before).mean() > 1
    seen = [name in (verdict.subject, verdict.style) for verdict in judge(images)]
    assert sum(seen) >= 2


def test_the_judge_knows_held_out_renders(judge):
    rng = np.random.default_rng(12345)
    pictures, subjects, styles = [], [], []
    for i in range(600):
        name = str(rng.choice(SUBJECT_NAMES))
        subject = pic.SUBJECTS.get(name) or pic.random_subject(rng, name)
        style = pic.random_style(rng, subject) if i % 2 else pic.STYLES[str(rng.choice(list(pic.STYLES)))]
        pictures.append(pic.render(subject, style, int(rng.integers(2**31))))
        subjects.append(name)
        styles.append(next((n for n, s in pic.STYLES.items() if s == style), style.pattern))
    verdicts = judge(np.stack(pictures))
    assert np.mean([v.subject == s for v, s in zip(verdicts, subjects, strict=True)]) >= 0.97
    assert np.mean([v.style == s for v, s in zip(verdicts, styles, strict=True)]) >= 0.97


def test_the_judge_refuses_noise_and_takes_any_size(judge):
    rng = np.random.default_rng(0)
    verdicts = judge(rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8))
    assert np.mean([v.subject is None and v.style is None for v in verdicts]) >= 0.95
    big = Image.fromarray(pic.render(pic.SUBJECTS["bolt"], pic.STYLES["neon"], 5, size=128))
    (verdict,) = judge([big])
    assert (verdict.subject, verdict.style) == ("bolt", "neon")
    assert sum(verdict.subjects.values()) == pytest.approx(1, abs=1e-4)
    assert set(verdict.styles) == set(STYLE_NAMES)
