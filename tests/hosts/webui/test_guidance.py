"""Reference guidance in WebUIs: the sampler's latents move in place, whichever way its denoiser answers."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from klora.engine.guidance import Goal, ReferenceGuidance
from klora.hosts.webui.a1111 import A1111Host
from klora.hosts.webui.forge import ForgeHost
from klora.hosts.webui.guidance import DenoiserGuidance

SCALE = 0.18215


class Vae(nn.Module):
    """A decoder with the methods of both hosts' VAEs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3, padding=1)

    def process_out(self, latent: Tensor) -> Tensor:
        return latent / SCALE

    def decode(self, latents: Tensor) -> Tensor:
        return torch.tanh(self.conv(latents))


def host_of(kind: str) -> Any:
    if kind == "a1111":
        torch.manual_seed(0)
        return A1111Host(types.SimpleNamespace(first_stage_model=Vae(), scale_factor=SCALE))
    with torch.inference_mode():
        # Forge loads its models so.
        torch.manual_seed(0)
        vae = Vae()
    return ForgeHost(
        types.SimpleNamespace(forge_objects=types.SimpleNamespace(vae=types.SimpleNamespace(first_stage_model=vae)))
    )


class Denoiser(nn.Module):
    """k-diffusion's: gives x0. With `alphas`, for timesteps: gives the noise."""

    def forward(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        return 0.5 * x


def guidance(step: float = 0.3) -> ReferenceGuidance:
    reference = torch.tensor([[1.0, 0.2, 0.0]])
    return ReferenceGuidance([Goal(lambda images: images.mean((-1, -2)), reference, 1.0)], step, 0.2, 0.8)


def session_at(tau: float | None) -> Any:
    return types.SimpleNamespace(tau=tau)


def test_both_hosts_decode_alike() -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = (host_of(kind).decode_latents(latents) for kind in ("a1111", "forge"))
    assert torch.allclose(a, b, atol=1e-6)
    assert a.shape == (2, 3, 8, 8)
    assert 0 <= float(a.detach().min()) <= float(a.detach().max()) <= 1


@pytest.mark.parametrize("kind", ["a1111", "forge"])
@pytest.mark.parametrize("answer", ["x0", "noise", "forge noise"])
def test_latents_move_in_place_and_an_x0_moves_with_them(kind: str, answer: str) -> None:
    denoiser, host = Denoiser(), host_of(kind)
    alphas = torch.linspace(0.99, 0.01, 1000)
    if answer == "noise":
        denoiser.alphas = alphas
    if answer == "forge noise":
        denoiser.classic_ddim_eps_estimation = True
        denoiser.inner_model = types.SimpleNamespace(inner_model=types.SimpleNamespace(alphas_cumprod=alphas))
    before = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = torch.full((2,), 300.0)
    attached = DenoiserGuidance(host, session_at(0.5), guidance(), denoiser)
    with torch.inference_mode() if kind == "forge" else torch.no_grad():
        x = before.clone()
        output = denoiser(x, sigma, cond=None)
    shift = before - x
    assert torch.allclose(shift.flatten(1).norm(dim=1), torch.full((2,), 0.3), atol=1e-4)
    expected = 0.5 * before - (shift if answer == "x0" else 0)
    assert torch.allclose(output, expected, atol=1e-6)
    attached.remove()
    attached.remove()
    assert torch.equal(denoiser(before.clone(), sigma), 0.5 * before)
    assert not denoiser._forward_hooks


@pytest.mark.parametrize("tau", [None, 0.0, 0.9])
def test_outside_the_window_nothing_moves(tau: float | None) -> None:
    denoiser = Denoiser()
    x = torch.randn(1, 4, 8, 8)
    before = x.clone()
    DenoiserGuidance(host_of("a1111"), session_at(tau), guidance(), denoiser)
    assert torch.equal(denoiser(x, torch.ones(1)), 0.5 * before)
    assert torch.equal(x, before)


def test_repeated_steps_come_nearer_to_the_references() -> None:
    host, denoiser, rule = host_of("a1111"), Denoiser(), guidance(0.5)
    DenoiserGuidance(host, session_at(0.5), rule, denoiser)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    losses = []
    with torch.no_grad():
        for _ in range(10):
            losses.append(float(rule.goals[0].loss(host.decode_latents(0.5 * x))))
            denoiser(x, torch.ones(1))
    assert losses[-1] < losses[0]
