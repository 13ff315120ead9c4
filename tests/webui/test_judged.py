"""Pictures judged by the pair's own LoRAs in a fake host of each family, and a grid of them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from klora.balance.found import MAX_SHARES, Found, FoundShares
from klora.balance.parts import Parts
from klora.hosts.webui.loaded_model import host_of
from klora.pair import Pair
from klora.webui.judged import CELL, JUDGED, Cell, Judged, Judgement, with_figures
from tests.webui.fake_host import FakeHost, Picture
from tests.webui.fake_processing import Processing
from tests.webui.hosts import TAG, host, nothing_left, plain

__all__ = ["host", "nothing_left", "plain"]

FOUND = Found("a", "b", "c")


@pytest.fixture(autouse=True)
def predicts_noise(host: FakeHost) -> None:
    """Have the model say what it predicts, as each family does."""
    model = host.sd_model
    if host.family == "a1111":
        model.parameterization = "eps"  # type: ignore[attr-defined]
    elif host.family == "forge":
        model.forge_objects.unet.model.predictor = types.SimpleNamespace(prediction_type="epsilon")
    else:
        model.forge_objects.unet.model.model_sampling = type("EPS", (), {})()


def judged(host: FakeHost, **values: Any) -> Processing:
    p = Processing(host, f"a dog {TAG}", steps=8, **values)
    setattr(p, CELL, Cell(0.5, (0.5, 0.7)))
    host.process(p)
    return p


def test_a_judged_picture_is_the_same_picture_with_the_parts_of_both(host: FakeHost, plain: Picture) -> None:
    p = Processing(host, f"a dog {TAG}", steps=8)
    without = host.process(p)
    assert not hasattr(p, JUDGED)
    p = Processing(host, f"a dog {TAG}", steps=8)
    setattr(p, CELL, Cell(0.5, (0.5, 0.7)))
    assert host.process(p).same(without)
    found: Judged = getattr(p, JUDGED)
    assert all(torch.isfinite(torch.tensor([found.parts.subject, found.parts.style])))
    assert found.parts.subject != found.parts.style
    assert len(found.found.subject) == len(found.found.style) == 64 + len(":1")
    assert p.comments == []


def test_one_lora_alone_has_more_of_its_part_than_the_other(host: FakeHost, plain: Picture) -> None:
    parts = {}
    for side, tag in (("subject", "<klora:dog:ink:alpha=0:beta=0>"), ("style", "<klora:dog:ink:beta=1e9>")):
        p = Processing(host, f"a dog {tag}", steps=8)
        setattr(p, CELL, Cell(0.5, (0.5,)))
        host.process(p)
        parts[side] = getattr(p, JUDGED).parts
    assert parts["subject"].subject > parts["style"].subject
    assert parts["style"].style > parts["subject"].style


def test_an_interrupt_ends_judging_and_leaves_the_picture(host: FakeHost, plain: Picture) -> None:
    calls: list[int] = []
    p = Processing(host, f"a dog {TAG}", steps=8)
    setattr(p, CELL, Cell(0.5, (0.5,)))
    state: Any = sys.modules["modules.shared"].state  # type: ignore[attr-defined]

    def stop(*_: Any) -> None:
        calls.append(1)
        # The ninth call of the model is the first of judging.
        state.interrupted = len(calls) > 10

    hook = host.sd_model.diffusion.register_forward_pre_hook(stop)
    try:
        host.process(p)
    finally:
        hook.remove()
        state.interrupted = False
    assert getattr(p, JUDGED) is None
    assert len(calls) < 8 + 12
    assert p.comments == []


def test_what_goes_wrong_in_judging_is_said_and_the_picture_stays(host: FakeHost, plain: Picture) -> None:
    if host.family == "a1111":
        pytest.skip("A1111 has no kind of prediction that is not known")
    model = host.sd_model.forge_objects.unet.model
    model.predictor = types.SimpleNamespace(prediction_type="edm")
    p = judged(host)
    assert getattr(p, JUDGED) is None
    assert any("edm" in text for text in p.comments)


def test_a_picture_that_begins_in_the_middle_is_not_judged_and_says_so(host: FakeHost, plain: Picture) -> None:
    p = judged(host, init_images=torch.zeros(1, 32), denoising_strength=0.3)
    assert getattr(p, JUDGED) is None
    assert any("not judged" in text for text in p.comments)


def test_a_cell_that_nobody_judges_says_so(host: FakeHost) -> None:
    said: list[str] = []
    p = types.SimpleNamespace(comment=said.append, enable_hr=True)
    setattr(p, CELL, Cell(0.5, (0.5,)))
    picture = Image.new("RGB", (96, 64))
    processed = types.SimpleNamespace(images=[picture])
    Judgement().take(p, processed)
    assert processed.images == [picture]
    assert said[0].startswith("K-LoRA: not judged")


def grid(shares: tuple[float, ...], parts: list[Parts]) -> tuple[list[Image.Image], list[str]]:
    judgement, pictures, said = Judgement(), [], []
    for share, one in zip(shares, parts, strict=True):
        p = types.SimpleNamespace(comment=said.append)
        setattr(p, CELL, Cell(share, shares))
        setattr(p, JUDGED, Judged(one, FOUND))
        processed = types.SimpleNamespace(images=[Image.new("RGB", (96, 64), "navy")])
        judgement.take(p, processed)
        pictures += processed.images
    return pictures, said


def test_every_cell_has_its_figures_below_and_the_best_is_marked_after_the_last(host: FakeHost) -> None:
    pictures, said = grid((0.4, 0.6, 0.8), [Parts(0.2, 0.9), Parts(0.5, 0.7), Parts(0.6, 0.1)])
    assert len({picture.size for picture in pictures}) == 1
    assert all(picture.height > 64 and picture.getpixel((5, 5)) == (0, 0, 128) for picture in pictures)
    bars = [picture.getpixel((0, picture.height - 1)) for picture in pictures]
    assert bars[0] == bars[2] != bars[1]
    assert said == ["K-LoRA: share 0.6 has most of both: subject kept 50 %, style 70 %"]


def test_the_best_share_is_kept_for_the_pair(host: FakeHost) -> None:
    from klora.webui.judged import found_shares

    grid((0.4, 0.6, 0.8), [Parts(0.2, 0.9), Parts(0.5, 0.7), Parts(0.6, 0.1)])
    assert found_shares().get(FOUND) == 0.6


def test_a_grid_with_nothing_of_one_lora_says_so(host: FakeHost) -> None:
    _, said = grid((0.4, 0.6), [Parts(-0.1, 0.9), Parts(0.0, 0.7)])
    assert "the subject's LoRA" in said[0]


def test_what_a_share_is_found_for_tells_checkpoints_apart(host: FakeHost) -> None:
    pair = Pair.open(host.folder / "dog.safetensors", host.folder / "ink.safetensors")
    found = host_of(host.sd_model).found_for(pair)
    host.sd_model.sd_checkpoint_info.name, before = "another", host.sd_model.sd_checkpoint_info.name
    assert host_of(host.sd_model).found_for(pair) != found
    host.sd_model.sd_checkpoint_info.name = before


def test_a_figure_is_written_below_small_pictures_too() -> None:
    assert with_figures(Image.new("RGB", (16, 16)), Parts(0.5, 0.5)).height > 16


def test_found_shares_last_in_their_file_up_to_a_limit(tmp_path: Path) -> None:
    shares = FoundShares(tmp_path / "new")
    assert shares.get(FOUND) is None
    for number in range(3):
        shares.keep(Found(str(number), "b", "c"), 0.5)
    shares.keep(FOUND, 0.7)
    assert FoundShares(tmp_path / "new").get(FOUND) == 0.7
    (file,) = (tmp_path / "new").iterdir()
    assert MAX_SHARES > 3
    file.write_text("{ damaged")
    assert shares.get(FOUND) is None
    shares.keep(FOUND, 0.6)
    assert shares.get(FOUND) == 0.6
