"""The fake host as a fixture, of each family, with its LoRAs; after each test, nothing of ours may be left in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.webui.register import register
from tests.support.lora_files import write_lora
from tests.support.pairs import ATTENTION, FEED_FORWARD, TEXT, shapes
from tests.webui.fake_host import FakeHost, Picture, installed

FORCED = "<klora:dog:ink:alpha=0:beta=0>"
TAG = "<klora:dog:ink>"


@cache
def _lora_files() -> dict[str, bytes]:
    """Their content by name, which is computed once."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        names = shapes([*ATTENTION, *FEED_FORWARD])
        trained_on = {"ss_base_model_version": "sd_v1-5"}
        write_lora(folder / "dog.safetensors", names, rank=4, seed=1, metadata=trained_on)
        write_lora(folder / "ink.safetensors", names, rank=8, seed=2)
        write_lora(folder / "ink_peft.safetensors", names, "peft", rank=8, seed=2)
        for name, seed in (("dog_te", 3), ("ink_te", 4)):
            path = write_lora(folder / f"{name}.safetensors", {**names, TEXT: (32, 32)}, rank=4, seed=seed, alpha=2.0)
            tensors = {key.replace("lora_te1_", "lora_te_"): tensor for key, tensor in load_file(path).items()}
            save_file(tensors, path)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["a1111", "forge", "reforge"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeHost]:
    """A host with four LoRAs: dog and ink for attention, dog_te and ink_te for the text encoder too."""
    for name, content in _lora_files().items():
        (tmp_path / name).write_bytes(content)
    with installed(request.param, tmp_path) as found:
        found.start(register)
        # Of what the page needs, a fake host has nothing.
        found.callbacks.swallowed.clear()
        yield found


@pytest.fixture
def plain(host: FakeHost) -> Picture:
    return host.txt2img("a dog")


@pytest.fixture(autouse=True)
def nothing_left(host: FakeHost, plain: Picture) -> Iterator[None]:
    """After every test: no hook; then the plain picture, and the model, as they were."""
    model, weights = host.sd_model, host.sd_model.weights()
    yield
    assert host.sd_model.hooks() == 0
    host.sd_model = model
    host.in_unet, host.before_evaluation = lambda number: None, lambda p, denoiser: None
    assert host.sd_model.hooks() == 0
    assert host.txt2img("a dog").same(plain)
    assert host.loaded == []
    assert all(torch.equal(weight, weights[name]) for name, weight in host.sd_model.weights().items())


def taus(host: FakeHost, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[float]:
    """The τ of every evaluation that K-LoRA follows."""
    from klora.engine.session import Session

    found: list[float] = []
    original = Session.at_level

    def at_level(self: Session, level: float) -> None:
        original(self, level)
        assert self.tau is not None
        found.append(self.tau)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "at_level", at_level)
        run()
    return found
