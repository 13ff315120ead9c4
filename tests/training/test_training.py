"""What the training scripts promise beside their pictures."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from klora.demo.judge import Judge, JudgeNet, pack, unpack
from training.drawing.pictures import SIZE
from training.drawing.styles import STYLES
from training.drawing.subjects import FAMILIES, SUBJECTS
from training.gates import base_gates, judge_gates, lora_gates
from training.judge import targets
from training.loras import (
    JOBS,
    LATE_CONTOUR,
    SETTLED_CONTOUR,
    TEXTURE,
    cut_to_rank,
    head_start,
    is_new,
    kohya_state,
    noise_level,
    picture_to_find,
    style_subject,
)
from training.networks import draw_times, make_sampler, make_scheduler, make_unet
from training.parallel import write_checkpoint
from training.spoiled import ANY, SPOILED, STYLE_NAMES, SUBJECT_NAMES, join_halves, some_style, some_subject
from training.words import WORDS, base_caption, make_tokenizer, tokenize


def test_every_caption_word_is_one_known_token(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)


def test_the_longest_caption_fits(tmp_path):
    from training.drawing.styles import random_style
    from training.drawing.subjects import random_subject

    tokenizer, rng = make_tokenizer(tmp_path), np.random.default_rng(0)
    captions = [base_caption(random_subject(rng), random_style(rng), "sky", rng) for _ in range(500)]
    ends = tokenize(tokenizer, captions) == tokenizer.eos_token_id
    assert ends.any(1).all()
    assert {word for caption in captions for word in caption.split()} <= set(WORDS)


def test_a_caption_leaves_unsaid_only_what_a_token_stands_for():
    from training.drawing.styles import FLAT, Style

    rng = np.random.default_rng(1)
    for style in (FLAT, Style("crosses", "brown", "none")):
        captions = [base_caption(SUBJECTS["finn"], style, "sky", rng).split() for _ in range(300)]
        for words in filter(None, captions):
            assert ("sbu" in words) != ("fancy" in words)
            assert not ("sbu" in words and {"wide", "blue"} & set(words))
            drawn = "crosses" in words
            assert drawn == (style != FLAT and "szn" not in words)
            assert "szn" not in words or style != FLAT


def test_most_times_are_drawn_where_details_are_decided_and_none_is_left_out():
    times, again = (draw_times(4000, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(times, again)
    assert 0 <= int(times.min()) < 20
    assert 980 < int(times.max()) < 1000
    assert float(((times >= 130) & (times < 600)).float().mean()) > 0.6


def test_half_of_the_steps_are_over_when_noise_is_about_as_strong_as_a_latent():
    sampler = make_sampler()
    sampler.set_timesteps(20)
    assert sampler.sigmas[0] == pytest.approx(14.6)
    assert 0.9 < float(sampler.sigmas[10]) < 1.2
    noise = make_scheduler().alphas_cumprod[sampler.timesteps[10].round().long()]
    assert float((1 / noise - 1).sqrt()) == pytest.approx(float(sampler.sigmas[10]), rel=0.02)


@pytest.mark.parametrize("start", [TEXTURE, LATE_CONTOUR])
def test_latents_begun_otherwise_are_noisy_latents_of_what_was_begun(start):
    clean, noise = torch.randn((2, 64, 8, 4, 4), generator=torch.Generator().manual_seed(0))
    scheduler, t = make_scheduler(), torch.arange(0, 960, 15)
    head = head_start(scheduler, torch.ones_like(clean), t, torch.Generator().manual_seed(1), start)
    noisy = scheduler.add_noise(clean, noise + head, t)
    kept = scheduler.alphas_cumprod[t][:, None, None, None]
    share = ((noisy - scheduler.add_noise(clean, noise, t)) / kept.sqrt()).flatten(1).mean(1)
    assert torch.allclose(scheduler.add_noise(clean + share[:, None, None, None], noise, t), noisy, atol=1e-4)
    assert 0.3 < float((share[t > 300] > 0.01).float().mean()) < 0.9
    assert start.most - 0.1 < float(share.max()) <= start.most + 0.001
    late = (1 / kept.flatten() - 1).sqrt() < start.above
    assert late.any()
    assert not share[late].any()
    # The velocity that is learned leads from there to the clean picture.
    velocity = scheduler.get_velocity(clean, noise + head, t)
    assert torch.allclose(kept.sqrt() * noisy - (1 - kept).sqrt() * velocity, clean, atol=1e-4)


def test_a_contour_that_settles_is_asked_for_only_where_noise_does_not_hide_the_forms():
    styled, flat = torch.ones((64, 8, 4, 4)), torch.zeros((64, 8, 4, 4))
    scheduler, t = make_scheduler(), torch.arange(0, 960, 15)
    assert torch.equal(picture_to_find(scheduler, styled, flat, t, LATE_CONTOUR), styled)
    found = picture_to_find(scheduler, styled, flat, t, SETTLED_CONTOUR).flatten(1).mean(1)
    assert torch.equal(found == 0, noise_level(scheduler, t) > 4)
    assert 0 < float(found.mean()) < 1


def test_the_u_net_has_at_least_96_attention_linears_also_at_the_finest_level():
    unet = make_unet()
    linears = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and ".attn" in n]
    assert len(linears) >= 96
    assert any(n.startswith("down_blocks.0.") for n in linears)


def test_two_of_each_are_held_out_and_both_spellings_and_ranks_are_there():
    for is_subject in (True, False):
        jobs = [job for job in JOBS if job.is_subject == is_subject]
        assert len(jobs) == 4
        assert sum(job.held_out for job in jobs) == 2
    assert {job.spelling for job in JOBS} == {"kohya", "peft"}
    assert {job.rank for job in JOBS} == {8, 16}


def test_what_the_base_never_saw_is_taught_on_every_family():
    assert {name for name, style in STYLES.items() if is_new(style)} == {"woodcut", "hatching"}
    rng = np.random.default_rng(4)
    assert {style_subject(STYLES["hatching"], rng).family for _ in range(200)} == set(FAMILIES)


def test_no_style_is_trained_on_a_named_subject():
    named = {(s.family, s.main, s.second) for s in SUBJECTS.values()}
    rng = np.random.default_rng(5)
    for style in STYLES.values():
        shown = [style_subject(style, rng) for _ in range(1500)]
        assert named.isdisjoint((s.family, s.main, s.second) for s in shown)
        assert is_new(style) or {family for family, *_ in named}.isdisjoint(s.family for s in shown)


def test_a_lora_is_cut_to_its_rank_at_the_smallest_loss():
    g = torch.Generator().manual_seed(0)
    state = {"q.lora_A.weight": torch.randn((6, 20), generator=g), "q.lora_B.weight": torch.randn((12, 6), generator=g)}
    whole = state["q.lora_B.weight"] @ state["q.lora_A.weight"]
    assert cut_to_rank(state, 6) == state
    cut = cut_to_rank(state, 4)
    assert cut["q.lora_A.weight"].shape == (4, 20)
    lost = torch.linalg.matrix_norm(whole - cut["q.lora_B.weight"] @ cut["q.lora_A.weight"])
    left_out = torch.linalg.svdvals(whole)[4:6]
    assert float(lost) == pytest.approx(float(left_out.norm()), rel=1e-4)


def test_kohya_keys_carry_alpha():
    state = kohya_state({"down_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 3)}, alpha=4)
    assert state["lora_unet_down_blocks_0_attn1_to_q.lora_down.weight"].shape == (2, 3)
    assert state["lora_unet_down_blocks_0_attn1_to_q.alpha"] == 4


def test_what_nobody_can_tell_is_aimed_at_evenly_and_what_is_not_asked_at_nothing():
    rows = targets(["b", None, ANY], ("a", "b"))
    assert rows.tolist() == [[0, 1], [0.5, 0.5], [0, 0]]


def test_two_halves_show_about_as_much_of_either_picture():
    rng = np.random.default_rng(0)
    nothing, spot = (np.zeros((SIZE, SIZE, 3), np.uint8) for _ in range(2))
    spot[3:13, 40:60] = 200
    for _ in range(50):
        joined = join_halves(nothing, spot, rng)
        assert 0.3 < (joined > 0).sum() / (spot > 0).sum() < 0.7


def test_no_other_member_of_a_family_has_the_colours_of_a_named_one():
    rng = np.random.default_rng(0)
    for subject, name in (some_subject(rng, named=0.0) for _ in range(3000)):
        named = [s for s in SUBJECTS.values() if s.family == name]
        assert (subject.main, subject.second) not in [(s.main, s.second) for s in named]


def test_a_style_that_nobody_can_tell_from_a_named_one_is_not_asked_about():
    rng = np.random.default_rng(0)
    others = [style for style, name in (some_style(rng, named=0.0) for _ in range(2000)) if name not in STYLES]
    assert len(others) == 2000
    assert {s.texture for s in others if s.dark} > {"slants", "stripes"}  # the named ones are pale
    assert not {s.texture for s in others if not s.dark} & {"slants", "stripes"}
    contours = {(s.contour, s.dark) for s in others if s.texture == "flat"}
    assert contours >= {("bold", False), ("thin", True), ("dashed", True)}
    assert ("bold", True) not in contours  # the named one is broad and dark


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_picture_always_leaves_something_untold(kind):
    rng = np.random.default_rng(0)
    assert all(None in (e.subject, e.style) for e in (SPOILED[kind](rng) for _ in range(30)))


def test_a_judge_says_nothing_below_its_floor():
    torch.manual_seed(0)
    net = JudgeNet(len(SUBJECT_NAMES), len(STYLE_NAMES))
    picture = np.zeros((1, 128, 128, 3), np.uint8)
    (sure,), (shy,) = (Judge(net, SUBJECT_NAMES, STYLE_NAMES, floor)(picture) for floor in (0.0, 1.1))
    assert sure.subject in SUBJECT_NAMES
    assert (shy.subject, shy.style) == (None, None)


def test_a_judge_in_8_bits_has_its_weights_within_half_a_step_of_each_channel():
    torch.manual_seed(0)
    state = {"conv": torch.randn(5, 3, 3, 3) * torch.logspace(-4, 1, 5).view(-1, 1, 1, 1), "bias": torch.randn(5)}
    state["conv"][2] = 0
    stored = pack(state)
    assert stored["conv"].dtype == torch.int8
    again = unpack(stored)
    assert again.keys() == state.keys()
    assert torch.allclose(again["bias"], state["bias"], rtol=1e-3)
    step = state["conv"].flatten(1).abs().amax(1) / 127
    assert ((again["conv"] - state["conv"]).flatten(1).abs().amax(1) <= 0.501 * step).all()
    assert not again["conv"][2].any()


def test_gates_are_what_the_figures_say():
    figures = {"alone": 0.9, "strength 0.7": 0.79, "half of the modules": 0.72, "before half": 0.5, "after half": 0.9}
    assert [gate.passed for gate in lora_gates("bolt", True, figures)] == [True, False, True, False]
    assert [gate.passed for gate in lora_gates("hatching", False, figures)] == [True, False, True, True]
    assert [gate.passed for gate in base_gates({"family": 0.9, "surface": 0.89})] == [True, False]
    silent = {"subject_accuracy": 0.97, "style_accuracy": 0.96, "mixed_named": 0.03}
    assert [gate.passed for gate in judge_gates(silent)] == [True, False, True]


def test_a_checkpoint_replaces_the_last_one_whole(tmp_path):
    file = tmp_path / "base.pt"
    for step in (1, 2):
        write_checkpoint(file, {"step": step})
    assert torch.load(file, weights_only=True) == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["base.pt"]
