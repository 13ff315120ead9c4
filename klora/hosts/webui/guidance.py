"""Reference guidance in a WebUI: around the denoiser that its sampler calls, on the instance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from klora.engine.guidance import ReferenceGuidance
from klora.engine.session import Session
from klora.hosts.webui.host import WebuiHost


class DenoiserGuidance:
    """Moves the sampler's latents in place, before it makes its step with what the denoiser says of them.

    A denoiser gives x0 (k-diffusion samplers) or the noise (DDIM and its kin). The noise is held fixed, so that an x0
    moves with the latents.
    """

    def __init__(self, host: WebuiHost, session: Session, guidance: ReferenceGuidance, denoiser: nn.Module) -> None:
        self._host, self._session, self._guidance = host, session, guidance
        self._hook = denoiser.register_forward_hook(self._on_denoised, with_kwargs=True)

    def remove(self) -> None:
        """Take it off; does nothing when it is off."""
        self._hook.remove()

    def _on_denoised(
        self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        tau = self._session.tau
        if tau is None or not self._guidance.acts(tau):
            return None
        x = args[0] if args else kwargs["x"]
        sigma = args[1] if len(args) > 1 else kwargs["sigma"]
        fixed, start = output.detach().clone().float(), x.detach().clone().float()
        gives_noise = _gives_noise(denoiser)

        def x0_of(moved: Tensor) -> Tensor:
            return _x0_of_noise(denoiser, moved, fixed, sigma) if gives_noise else fixed + (moved - start)

        shift = self._guidance.shift(x, x0_of, self._host.decode_latents)
        x.sub_(shift)
        return None if gives_noise else output - shift.to(output.dtype)


def _gives_noise(denoiser: Any) -> bool:
    """Whether a denoiser predicts the noise: A1111's for timesteps, Forge's in its DDIM mode."""
    return hasattr(denoiser, "alphas") or bool(getattr(denoiser, "classic_ddim_eps_estimation", False))


def _x0_of_noise(denoiser: Any, x: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """x0 = (x − √(1−ᾱ)·noise) / √ᾱ of a variance-preserving sampler."""
    alphas = getattr(denoiser, "alphas", None)
    if alphas is None:
        alphas = denoiser.inner_model.inner_model.alphas_cumprod
    index = timestep.detach().round().long().clamp(0, len(alphas) - 1).to(alphas.device)
    alpha = torch.as_tensor(alphas)[index].to(x.device, x.dtype).view(-1, 1, 1, 1)
    x0: Tensor = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    return x0
