"""What A1111 does to norms by itself, in their forwards, while a fusion changes them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from klora.cache import ScoreCache
from klora.hosts.webui.a1111 import A1111Host
from klora.pair import Pair
from klora.settings import Settings
from tests.lora.test_beside import Tiny, lora, norms


class Networks(ModuleType):
    """The host's LoRA code: it backs weights up and merges into them when a module is called, and puts them back so."""

    def __init__(self) -> None:
        super().__init__("networks")
        self.loaded_networks: list[Tensor] = []

    @torch.no_grad()
    def network_apply_weights(self, module: Any) -> None:
        wanted = tuple(map(id, self.loaded_networks))
        if wanted and not hasattr(module, "backup"):
            module.backup = module.weight.clone()
        if getattr(module, "network_current_names", ()) != wanted:
            module.weight.copy_(module.backup + sum(self.loaded_networks))
            module.network_current_names = wanted


class Norm(nn.LayerNorm):
    """A norm as the host has it."""

    networks: Networks

    def forward(self, x: Tensor) -> Tensor:
        self.networks.network_apply_weights(self)
        return super().forward(x)


class Model(Tiny):
    @torch.no_grad()
    def weight_in_a_call(self) -> Tensor:
        self(torch.zeros(8))
        return self.found

    def forward(self, x: Tensor) -> Tensor:
        norm = self.blocks[0]["norm"]
        norm(x)
        self.found = norm.weight.detach().clone()
        return super().forward(x)


def test_what_the_host_backs_up_of_a_norm_is_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks, model = Networks(), Model()
    monkeypatch.setitem(sys.modules, "networks", networks)
    norm = Norm(8)
    norm.networks, norm.network_layer_name = networks, "norm"  # type: ignore[assignment]
    model.blocks[0]["norm"] = norm
    host = A1111Host(
        SimpleNamespace(model=SimpleNamespace(diffusion_model=model), sd_checkpoint_info=SimpleNamespace())
    )
    monkeypatch.setattr(A1111Host, "model_name", "a model")
    networks.loaded_networks = [torch.full((8,), 0.5)]
    pair = host.fit(Pair.open(norms(w_norm=torch.full((8,), 2.0)), lora(), ScoreCache(tmp_path)))
    with host.session(pair, pair.plan(Settings(policy="direct"))):
        assert torch.equal(model.weight_in_a_call(), torch.full((8,), 3.5))
    assert torch.equal(model.weight_in_a_call(), torch.full((8,), 1.5))
    networks.loaded_networks = []
    assert torch.equal(model.weight_in_a_call(), torch.ones(8))
