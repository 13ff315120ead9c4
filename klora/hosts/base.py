"""What the engine asks of a host: where the modules are, and what the model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from klora.engine.bypass import Site
from klora.engine.dynamic import Rows


class Host(Protocol):
    """A program that samples with a diffusion model."""

    @property
    def model_name(self) -> str:
        """How messages call the model."""

    @property
    def architecture(self) -> str | None:
        """SD1, SD2, SDXL or FLUX; None when unknown."""

    def sites(self) -> Mapping[str, Site]:
        """Give the diffusion model's modules by canonical name."""

    def text_sites(self) -> Mapping[str, Site]:
        """Give the text encoders' modules by canonical name."""

    def conditional_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows | None:
        """Give the rows that follow the prompt in a call of the denoiser; None for all of them."""
