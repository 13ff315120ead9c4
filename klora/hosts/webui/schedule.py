"""The noise levels of the schedule that a WebUI's sampler is in."""

from __future__ import annotations

import importlib
from typing import Any


def schedule_of(denoiser: Any) -> list[float]:
    """The noise levels of the whole schedule that a sampler's denoiser is in.

    Asks the sampler as its own `sample` and `sample_img2img` do, so that any scheduler and override counts. For
    img2img and hires this is the schedule of which the pass runs the end.
    """
    p, sampler = denoiser.p, denoiser.sampler
    steps = p.steps
    if getattr(p, "is_hr_pass", False):
        steps = _img2img_steps(p, p.hr_second_pass_steps or p.steps)
    elif getattr(p, "init_images", None) is not None:
        steps = _img2img_steps(p, None)
    if hasattr(sampler, "get_timesteps"):
        timesteps = sampler.get_timesteps(p, steps)
        if getattr(denoiser, "classic_ddim_eps_estimation", False):
            # Forge's denoiser turns a timestep into the noise level that it stands for, before it tells anyone.
            products = denoiser.inner_model.inner_model.alphas_cumprod
            levels = ((1 - products) / products) ** 0.5
            timesteps = levels[timesteps.round().long().to(levels.device).clip(0, len(levels) - 1)]
        return [float(level) for level in timesteps]
    # The last σ is where the schedule ends, not a step.
    return [float(level) for level in sampler.get_sigmas(p, steps)[:-1]]


def _img2img_steps(p: Any, steps: int | None) -> int:
    common = importlib.import_module("modules.sd_samplers_common")
    of_the_schedule: int = common.setup_img2img_steps(p, steps)[0]
    return of_the_schedule
