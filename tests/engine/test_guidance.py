"""Reference guidance: one normalised step against the gradient, in a window, towards references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from klora.engine.guidance import Goal, ReferenceGuidance


def encode(images: Tensor) -> Tensor:
    return images.mean((-1, -2))


def guidance(weight: float = 1.0, step: float = 0.1, start: float = 0.0, stop: float = 1.0) -> ReferenceGuidance:
    references = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0]])
    return ReferenceGuidance([Goal(encode, references, weight)], step, start, stop)


def same(x: Tensor) -> Tensor:
    return x


@given(st.integers(0, 2**31), st.floats(0.001, 10), st.floats(0.1, 10))
def test_every_latent_moves_by_the_step_whatever_the_weights(seed: int, step: float, weight: float) -> None:
    x = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) + 0.1
    shift = guidance(weight, step).shift(x, same, same)
    assert torch.allclose(shift.flatten(1).norm(dim=1), torch.full((3,), step), rtol=1e-4)
    assert not x.requires_grad


def test_steps_lead_to_the_references() -> None:
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rule = guidance(step=0.05)
    losses = []
    for _ in range(30):
        losses.append(float(rule.goals[0].loss(x).sum()))
        x = x - rule.shift(x, same, same)
    assert losses[-1] < 0.5 * losses[0]
    assert losses[1] < losses[0]


def test_the_loss_is_one_minus_the_mean_cosine() -> None:
    image = torch.zeros(1, 3, 2, 2)
    image[:, 0] = 1
    expected = 1 - (1 + 1 / math.sqrt(1.01)) / 2
    assert float(guidance(2.0).goals[0].loss(image)) == pytest.approx(2 * expected, abs=1e-6)


def test_the_gradient_goes_through_x0_with_the_models_output_fixed() -> None:
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)) + 0.1
    output = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    leaf = x.clone().requires_grad_()
    goal = guidance().goals[0]
    goal.loss(leaf - 0.3 * output).sum().backward()
    expected = 0.1 * leaf.grad / leaf.grad.norm()
    assert torch.allclose(guidance().shift(x, lambda x: x - 0.3 * output, same), expected, atol=1e-6)


def test_it_works_without_gradients_and_in_inference_mode() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x, output = torch.rand(1, 3, 4, 4) + 0.1, torch.rand(1, 3, 4, 4)
            shift = guidance().shift(x, lambda x, out=output: x - 0.1 * out, same)
            x.sub_(shift)
            assert torch.isfinite(x).all()


@pytest.mark.parametrize("decode", [torch.zeros_like, lambda x: x * math.inf])
def test_no_gradient_and_a_broken_one_move_nothing(decode: object) -> None:
    x = torch.rand(1, 3, 4, 4)
    shift = guidance().shift(x, same, lambda x: decode(x) + 0 * x)
    assert not shift.any()


def test_the_window_is_closed() -> None:
    rule = guidance(start=0.2, stop=0.8)
    assert [rule.acts(tau) for tau in (0.0, 0.19, 0.2, 0.5, 0.8, 0.81)] == [False, False, True, True, True, False]


def test_the_type_of_the_latents_is_kept() -> None:
    x = (torch.rand(1, 3, 4, 4) + 0.1).half()
    assert guidance().shift(x, same, same).dtype == torch.float16


def test_each_image_has_a_loss_of_its_own() -> None:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    goal = guidance(0.5).goals[0]
    losses = goal.loss(images)
    assert losses.shape == (3,)
    assert torch.allclose(losses, torch.cat([goal.loss(image[None]) for image in images]))


def test_of_several_goals_the_losses_are_added() -> None:
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    one, other = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    both = ReferenceGuidance([Goal(encode, one, 1.0), Goal(encode, other, 3.0)], 0.1, 0.0, 1.0)
    leaf = x.clone().requires_grad_()
    sum(goal.loss(leaf).sum() for goal in both.goals).backward()
    assert torch.allclose(both.shift(x, same, same), 0.1 * leaf.grad / leaf.grad.norm(), atol=1e-6)
