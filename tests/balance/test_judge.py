"""Judging, on a model in small of which all is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from klora.balance.judge import Denoise, Who, forwards, judge

SHAPE = (1, 2, 8, 8)
BASE, SUBJECT, STYLE = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(5))


class Toy:
    """Sees the same pictures in whatever it is shown: its own, or its own with a LoRA's change."""

    def __init__(self) -> None:
        self.acted: list[Who] = []
        self.noises: dict[tuple[Who, float], list[Tensor]] = {}

    @contextmanager
    def acting(self, who: Who) -> Iterator[Denoise]:
        self.acted.append(who)
        seen = {"base": BASE, "subject": BASE + SUBJECT, "style": BASE + STYLE}[who]

        def denoise(_clean: Tensor, noise: Tensor, tau: float) -> Tensor:
            self.noises.setdefault((who, tau), []).append(noise)
            return seen

        yield denoise


def test_parts_are_those_of_each_change_in_a_picture() -> None:
    pictures = [BASE, BASE + SUBJECT, BASE + 0.25 * SUBJECT]
    found = judge(Toy(), pictures, (0.3, 0.6))
    assert [parts.subject for parts in found] == pytest.approx([0, 1, 0.25], abs=1e-5)


def test_pictures_are_compared_under_the_same_noise_which_is_another_at_each_place() -> None:
    toy = Toy()
    judge(toy, [BASE, BASE + STYLE], (0.3, 0.6))
    first = toy.noises["base", 0.3][0]
    assert all(torch.equal(noise, first) for (_, tau), found in toy.noises.items() if tau == 0.3 for noise in found)
    assert not torch.equal(first, toy.noises["base", 0.6][0])
    assert first.shape == SHAPE


def test_each_acts_once_and_every_forward_is_told() -> None:
    toy, told = Toy(), []
    judge(toy, [BASE] * 3, (0.3, 0.6), lambda done, total: told.append((done, total)))
    assert toy.acted == ["base", "subject", "style"]
    assert told == [(number, forwards(3, 2)) for number in range(1, forwards(3, 2) + 1)]
