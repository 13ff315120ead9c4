"""What a host has to give, said in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from klora.engine.dynamic import BatchRows
from klora.engine.layers import Say
from klora.engine.session import Session, logger
from klora.engine.site import Site
from klora.fusion.plan import FusionPlan
from klora.lora.checks import check_model
from klora.lora.model_index import ModelIndex
from klora.pair import Pair


class Host(ABC):
    """A program with a model loaded, in which a pair can be fused.

    It gives modules by name (`sites`, `text_sites`), the names that files may have for them (`index`), and of a call
    of the model the rows that follow the prompt (`conditional_rows`). The noise level is told to the session that
    `session` makes: `start_pass` with the levels of a schedule, then `at_level` before each call of the model.
    """

    @property
    @abstractmethod
    def model_name(self) -> str:
        """How messages call the model."""

    @property
    @abstractmethod
    def diffusion_model(self) -> nn.Module:
        """The UNet or transformer that denoises."""

    @property
    def running(self) -> nn.Module:
        """What is called to denoise: the diffusion model, or what torch.compile has made of it."""
        return self.diffusion_model

    @property
    def text_encoders(self) -> Mapping[str, nn.Module]:
        """The text encoders that the text sites lie in, by the names that these begin with."""
        return {}

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where scores are computed."""

    @property
    @abstractmethod
    def index(self) -> ModelIndex:
        """The names under which files may mean the diffusion model's and the text encoders' modules."""

    @abstractmethod
    def sites(self) -> Mapping[str, Site]:
        """The diffusion model's modules by canonical name."""

    def text_sites(self) -> Mapping[str, Site]:
        """The text encoders' modules by canonical name; none where the host's own LoRA code applies those parts."""
        return {}

    @abstractmethod
    def conditional_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows | None:
        """The rows that follow the prompt in a call of the diffusion model with these arguments; None for all."""

    def fit(self, pair: Pair) -> Pair:
        """The pair under the names of the model; MismatchError where one of its files is for another."""
        index = self.index
        pair = pair.for_model(index)
        for lora in pair.loras:
            check_model(lora, index.shapes, self.model_name)
        return pair

    def session(self, pair: Pair, plan: FusionPlan, say: Say = logger.warning) -> Session:
        """A session of a pair that fits, not yet attached; `say` hears what a user should know.

        Raises what `Session` does.
        """
        return Session(
            pair,
            plan,
            self.sites(),
            self.text_sites(),
            self.model_name,
            self.running,
            self.conditional_rows,
            self.text_encoders,
            say,
            self.sites,
        )
