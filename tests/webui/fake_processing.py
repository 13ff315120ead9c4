"""A job of the WebUI in small: its prompts, its conditionings, its sampler."""

from __future__ import annotations

import re
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.webui.fake_model import SIZE

if TYPE_CHECKING:
    from tests.webui.fake_host import FakeHost

_TAG = re.compile(r"<(\w+):([^>]+)>")


class ExtraNetworkParams:
    """One tag, in pieces."""

    def __init__(self, items: list[str]) -> None:
        self.items = items
        self.positional = [item for item in items if "=" not in item]
        self.named = dict(item.split("=", 1) for item in items if "=" in item)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExtraNetworkParams) and self.items == other.items

    __hash__ = None  # type: ignore[assignment]


Data = dict[str, list[ExtraNetworkParams]]


def parse_prompts(prompts: list[str]) -> tuple[list[str], Data]:
    """Take the tags out; those of the first prompt count."""
    data: Data = {}
    for kind, pieces in _TAG.findall(prompts[0]):
        data.setdefault(kind, []).append(ExtraNetworkParams(pieces.split(":")))
    return [_TAG.sub("", prompt) for prompt in prompts], data


class Interrupted(BaseException):
    """How a sampler stops when a user asks for it."""


class Sampler:
    """Euler or Heun, with the noise levels of a Karras-like schedule."""

    def __init__(self, host: FakeHost, p: Processing, order: int) -> None:
        self.host = host
        self.order = order
        self.denoiser = types.SimpleNamespace(p=p, sampler=self, step=0, total_steps=0)

    def get_sigmas(self, p: Processing, steps: int) -> Tensor:
        """σ of every step, and 0."""
        return torch.cat([torch.linspace(10, 0.1, steps) ** 1.5, torch.zeros(1)])

    def sample(self, p: Processing, x: Tensor) -> Tensor:
        """From noise to picture."""
        return self._launch(p, x, self.get_sigmas(p, p.steps))

    def sample_img2img(self, p: Processing, x: Tensor, steps: int | None = None) -> Tensor:
        """The end of a schedule."""
        steps, t_enc = setup_img2img_steps(p, steps)
        return self._launch(p, x, self.get_sigmas(p, steps)[steps - t_enc - 1 :])

    def _launch(self, p: Processing, x: Tensor, sigmas: Tensor) -> Tensor:
        self.denoiser.total_steps = (len(sigmas) - 1) * self.order
        self.denoiser.step = 0
        if hasattr(self.host.sd_model, "forge_objects"):
            self.host.sampling_prepare()
        last = x
        try:
            for i in range(len(sigmas) - 1):
                last = x
                x = x - 0.05 * self._evaluate(p, x, sigmas[i])
                if self.order == 2 and sigmas[i + 1] > 0:
                    x = x - 0.01 * self._evaluate(p, x, sigmas[i + 1])
        except Interrupted:
            return last
        return x

    def _evaluate(self, p: Processing, x: Tensor, sigma: Tensor) -> Tensor:
        if self.host.interrupted:
            raise Interrupted
        self.host.before_evaluation(p, self.denoiser)
        params = types.SimpleNamespace(denoiser=self.denoiser, sigma=sigma.reshape(1).expand(2), x=x)
        self.host.callbacks.call("cfg_denoiser", params)
        self.host.evaluations += 1
        self.host.in_unet(self.host.evaluations)
        noise = self.host.sd_model.diffusion(x, p.hr_c if p.is_hr_pass else p.c)
        self.denoiser.step += 1
        return noise


def setup_img2img_steps(p: Processing, steps: int | None = None) -> tuple[int, int]:
    """How many steps a schedule has, and how many of its end are made."""
    if steps is not None:
        return (int(steps / min(p.denoising_strength, 0.999)) if p.denoising_strength > 0 else 0), steps - 1
    return p.steps, int(min(p.denoising_strength, 0.999) * p.steps)


class Processing:
    """A job: one picture or more, from a prompt or from another picture."""

    cached_c: Any = None
    cached_hr_c: Any = None

    def __init__(self, host: FakeHost, prompt: str, hr_prompt: str | None = None, **values: Any) -> None:
        self.host = host
        self.steps, self.n_iter, self.denoising_strength = 6, 1, 0.6
        self.hr_second_pass_steps = 0
        self.order = 1
        self.all_prompts = [prompt]
        self.enable_hr = hr_prompt is not None
        self.all_hr_prompts = [prompt if hr_prompt in (None, "") else hr_prompt]
        self.is_hr_pass = False
        self.init_images: Any = None
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: list[str] = []
        self.c = self.hr_c = None
        self.prompts: Any = None
        vars(self).update(values)

    def comment(self, text: str) -> None:
        """Say something under the image."""
        self.comments.append(text)

    def close(self) -> None:
        """The last thing that is called, whatever happened."""

    def parse(self) -> None:
        """Take the tags out of the prompts."""
        self.prompts, self.extra_network_data = parse_prompts(self.all_prompts)
        if self.enable_hr:
            self.hr_prompts, self.hr_extra_network_data = parse_prompts(self.all_hr_prompts)

    def cached_params(self, prompt: str, data: Data) -> tuple[Any, ...]:
        """What a conditioning is cached by: what the user wrote, not what the text encoder has merged."""
        return prompt, data, self.host.sd_model

    def _cached(self, name: str, prompt: str, data: Data) -> Tensor:
        key = self.cached_params(prompt, data)
        cached = getattr(type(self), name)
        if cached is None or cached[0] != key:
            cached = (key, self.host.sd_model.encode(prompt))
            setattr(type(self), name, cached)
        return cached[1]

    def setup_conds(self) -> None:
        """Run the text encoder, unless it has run on the same."""
        self.c = self._cached("cached_c", self.prompts[0], self.extra_network_data)
        if self.enable_hr and self.host.opts.hires_fix_use_firstpass_conds:
            self.calculate_hr_conds()
        elif self.enable_hr and self.host.family != "a1111":
            self.host.activate(self, self.hr_extra_network_data)
            self.calculate_hr_conds()
            self.host.activate(self, self.extra_network_data)

    def calculate_hr_conds(self) -> None:
        """The same for the second pass."""
        if self.hr_c is None:
            self.hr_c = self._cached("cached_hr_c", self.hr_prompts[0], self.hr_extra_network_data)

    def sample(self) -> Tensor:
        """One batch, both passes."""
        sampler = self.sampler = Sampler(self.host, self, self.order)
        if self.init_images is not None:
            return sampler.sample_img2img(self, self.init_images + torch.full((1, SIZE), 0.5))
        generator = torch.Generator().manual_seed(1)
        x = sampler.sample(self, torch.randn(1, SIZE, generator=generator))
        if not self.enable_hr:
            return x
        self.is_hr_pass = True
        self.sampler = Sampler(self.host, self, self.order)
        self.host.activate(self, self.hr_extra_network_data)
        self.calculate_hr_conds()
        x = self.sampler.sample_img2img(self, 2 * x, steps=self.hr_second_pass_steps or self.steps)
        self.is_hr_pass = False
        return x
