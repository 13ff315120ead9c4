"""What was really called is seen, whatever the cause; and a model that is compiled is fused all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from klora.cache import ScoreCache
from klora.engine.bypass import HookedLayer
from klora.engine.held import HeldLayer
from klora.engine.session import Session
from klora.engine.site import Site
from klora.engine.weights import Room
from klora.errors import KloraError
from klora.pair import Pair
from klora.settings import Settings
from tests.support.lora_files import write_lora

SIZE = 16
NAMES = [f"down_blocks.0.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in range(3)]
LEVELS = [4.0, 3.0, 2.0, 1.0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Model(nn.Module):
    """A few blocks, one after another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in NAMES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x

    def sites(self) -> dict[str, Site]:
        return {name: Site(block.layer) for name, block in zip(NAMES, self.blocks, strict=True)}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    shapes = dict.fromkeys(NAMES, (SIZE, SIZE))
    files = [write_lora(tmp_path / f"{i}.safetensors", shapes, rank=4, seed=i, strength=0.5) for i in (1, 2)]
    return Pair.open(*files, ScoreCache(tmp_path / "cache"))


@pytest.fixture
def said() -> list[str]:
    return []


def session_of(pair: Pair, model: Model, said: list[str], running: nn.Module | None = None, **settings: Any) -> Session:
    plan = pair.plan(Settings.parse({"steps": 4, "policy": "direct", **settings}))
    return Session(pair, plan, model.sites(), denoiser=model if running is None else running, say=said.append)


@torch.no_grad()
def sample(session: Session, running: nn.Module, levels: list[float] = LEVELS) -> Tensor:
    """A picture as a host makes it: told the level, then called."""
    x = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(1))
    session.start_pass(levels, running)
    for level in levels:
        session.at_level(level)
        x = x - 0.1 * running(x)
    return x


@torch.no_grad()
def plain(model: nn.Module) -> Tensor:
    x = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(1))
    for _ in LEVELS:
        x = x - 0.1 * model(x)
    return x


@pytest.mark.parametrize("engine", ["bypass", "held"])
def test_what_is_called_is_not_complained_of_and_costs_nothing_later(pair: Pair, said: list[str], engine: str) -> None:
    model = Model()
    with session_of(pair, model, said, engine=engine) as session:
        for _ in range(2):
            sample(session, model)
            hooks = [len(block.layer._forward_hooks) for block in model.blocks]
            assert hooks == len(NAMES) * [int(engine == "bypass")]
    assert not said


@pytest.mark.parametrize("engine", ["bypass", "held"])
def test_modules_that_were_exchanged_are_told_by_name_and_number(pair: Pair, said: list[str], engine: str) -> None:
    model = Model()
    with session_of(pair, model, said, engine=engine) as session:
        model.blocks[1].layer = nn.Linear(SIZE, SIZE)
        sample(session, model)
    (text,) = said
    assert f"1 of the LoRAs' 3 modules, such as {NAMES[1]}, were not called" in text


@pytest.mark.parametrize("engine", ["bypass", "held"])
@pytest.mark.parametrize("levels", [LEVELS, LEVELS[:1]], ids=["several steps", "one step"])
def test_where_nothing_was_called_it_is_an_error_in_the_words_of_the_cause(
    pair: Pair, said: list[str], engine: str, levels: list[float]
) -> None:
    model = Model()

    def exchanged() -> None:
        with session_of(pair, model, said, engine=engine) as session:
            for block in model.blocks:
                block.layer = nn.Linear(SIZE, SIZE)
            sample(session, model, levels)

    def another() -> None:
        with session_of(pair, model, said, engine=engine) as session:
            session.start_pass(levels)
            for level in levels:
                session.at_level(level)
                Model()(torch.zeros(1, SIZE))

    with pytest.raises(KloraError, match=r"none of the 3 modules .* is not the one that was fused"):
        another()
    with pytest.raises(KloraError, match=r"none of the 3 modules .* were exchanged after the fusion began"):
        exchanged()
    assert not any(block.layer._forward_hooks for block in model.blocks)


def test_an_error_of_the_sampling_itself_is_not_hidden(pair: Pair, said: list[str]) -> None:
    def fails() -> None:
        with session_of(pair, Model(), said) as session:
            session.start_pass(LEVELS)
            session.at_level(LEVELS[0])
            raise RuntimeError("of the host")

    with pytest.raises(RuntimeError, match="of the host"):
        fails()


def test_a_level_that_is_told_twice_is_one_evaluation(pair: Pair, said: list[str]) -> None:
    model = Model()
    with session_of(pair, model, said) as session:
        session.start_pass(LEVELS)
        session.at_level(LEVELS[0])
        session.at_level(LEVELS[0])
        model(torch.zeros(1, SIZE))


def blocks(model: Model) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    return model


def whole(model: Model) -> nn.Module:
    model.compile(backend="eager")
    return model


def optimized(model: Model) -> nn.Module:
    return torch.compile(model, backend="eager", fullgraph=True)


def optimized_blocks(model: Model) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    return model


WAYS = pytest.mark.parametrize("compiled", [blocks, whole, optimized, optimized_blocks], ids=lambda way: way.__name__)


@pytest.fixture
def fused(pair: Pair, said: list[str]) -> Tensor:
    """The eager picture."""
    model = Model()
    with session_of(pair, model, said) as session:
        return sample(session, model)


@WAYS
@pytest.mark.parametrize("warm", [True, False], ids=["after a plain picture", "at once"])
def test_a_model_that_was_compiled_before_takes_held_weights(
    pair: Pair, said: list[str], fused: Tensor, compiled: Callable[[Model], nn.Module], warm: bool
) -> None:
    torch._dynamo.reset()
    expected, model = plain(Model()), Model()
    running = compiled(model)
    if warm:
        torch.testing.assert_close(plain(running), expected)
    with session_of(pair, model, said, running) as session:
        torch.testing.assert_close(sample(session, running), fused)
        torch.testing.assert_close(sample(session, running), fused)
        assert {type(layer) for layer in session._layers._layers.values()} == {HeldLayer}
    assert not torch.allclose(fused, expected, atol=1e-3)
    torch.testing.assert_close(plain(running), expected)
    assert not said


@pytest.mark.parametrize(
    "settings", [{"policy": "k-lora"}, {"policy": "ties", "density": 0.5}], ids=lambda it: it["policy"]
)
@pytest.mark.parametrize("compiled", [None, blocks, whole])
def test_windows_and_blocks_act_in_held_weights_compiled_or_not(
    pair: Pair, said: list[str], settings: dict[str, Any], compiled: Callable[[Model], nn.Module] | None
) -> None:
    torch._dynamo.reset()
    part = {"subject_to": 0.5, "style_from": 0.25, "style_blocks": "down_blocks.0: 0.5", **settings}
    model = Model()
    with session_of(pair, model, said, engine="bypass", **settings) as session:
        always = sample(session, model)
    with session_of(pair, model, said, engine="bypass", **part) as session:
        expected = sample(session, model)
    assert not torch.allclose(always, expected, atol=1e-3)
    running = compiled(Model()) if compiled else Model()
    with session_of(pair, running, said, engine="held", **part) as session:
        torch.testing.assert_close(sample(session, running), expected)
        assert {type(layer) for layer in session._layers._layers.values()} == {HeldLayer}
    torch.testing.assert_close(plain(running), plain(Model()))
    assert not said


@pytest.mark.parametrize("compiled", [None, blocks])
def test_a_policy_that_measures_acts_where_weights_should_be_held(
    pair: Pair, said: list[str], compiled: Callable[[Model], nn.Module] | None
) -> None:
    torch._dynamo.reset()
    model = Model()
    with session_of(pair, model, said, policy="dynamic") as session:
        expected = sample(session, model)
    running = compiled(Model()) if compiled else Model()
    with session_of(pair, running, said, policy="dynamic", engine="held", style_blocks="down_blocks.0: 1") as session:
        torch.testing.assert_close(sample(session, running), expected)
        assert len(session.decisions) == len(NAMES)
    assert bool(said) is bool(compiled)


@WAYS
def test_a_model_may_be_compiled_while_it_is_fused(
    pair: Pair, said: list[str], fused: Tensor, compiled: Callable[[Model], nn.Module]
) -> None:
    torch._dynamo.reset()
    expected, model = plain(Model()), Model()
    with session_of(pair, model, said) as session:
        torch.testing.assert_close(sample(session, model), fused)
        running = compiled(model)
        torch.testing.assert_close(sample(session, running), fused)
    torch.testing.assert_close(plain(running), expected)
    assert not said


@WAYS
def test_without_room_what_is_compiled_runs_eagerly_and_that_is_said(
    pair: Pair, said: list[str], fused: Tensor, compiled: Callable[[Model], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(Room, "on", classmethod(lambda cls, device: Room(0)))
    expected, model = plain(Model()), Model()
    running = compiled(model)
    before = dict(vars(running))
    with session_of(pair, model, said, running) as session:
        torch.testing.assert_close(sample(session, running), fused)
        assert {type(layer) for layer in session._layers._layers.values()} == {HookedLayer}
    assert said
    assert all("runs eagerly as long as it is fused" in text for text in said)
    assert vars(running).keys() == before.keys()
    assert getattr(running, "_compiled_call_impl", None) is before.get("_compiled_call_impl")
    torch.testing.assert_close(plain(running), expected)


def test_where_torch_keeps_the_parameters_of_what_is_compiled_that_runs_eagerly(
    pair: Pair, said: list[str], fused: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("klora.engine.layers.exchange_is_seen", lambda: False)
    model = Model()
    running = blocks(model)
    with session_of(pair, model, said, running) as session:
        torch.testing.assert_close(sample(session, running), fused)
    assert len(said) == len(NAMES)


def test_without_room_a_whole_model_compiled_too_late_is_an_error_that_says_so(
    pair: Pair, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Room, "on", classmethod(lambda cls, device: Room(0)))
    model = Model()
    with session_of(pair, model, said) as session, pytest.raises(KloraError, match="compile it before the fusion"):
        sample(session, optimized(model))


def test_something_compiled_that_holds_no_module_of_the_files_stays_so(pair: Pair, said: list[str]) -> None:
    model = Model()
    model.extra = nn.Linear(SIZE, SIZE)
    model.extra.compile(backend="eager")
    compiled = model.extra._compiled_call_impl
    with session_of(pair, model, said) as session:
        sample(session, model)
        assert model.extra._compiled_call_impl is compiled
        assert {type(layer) for layer in session._layers._layers.values()} == {HookedLayer}
    assert not said


def test_nothing_is_left_where_attaching_is_interrupted(pair: Pair, said: list[str]) -> None:
    class Interrupted(nn.Linear):
        def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
            super().register_forward_hook(*args, **kwargs)
            raise KeyboardInterrupt

    model = Model()
    model.blocks[2].layer = Interrupted(SIZE, SIZE)
    session = session_of(pair, model, said)
    with pytest.raises(KeyboardInterrupt), session:
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.blocks[2].layer.__class__ = nn.Linear
    with session:
        sample(session, model)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_text_encoder_may_be_compiled_before_and_while_it_is_fused(tmp_path: Path, said: list[str]) -> None:
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    shapes = dict.fromkeys((*NAMES, text), (SIZE, SIZE))
    files = [write_lora(tmp_path / f"{i}.safetensors", shapes, rank=4, seed=i, strength=0.5) for i in (1, 2)]
    pair, model, x = Pair.open(*files, ScoreCache(tmp_path / "cache")), Model(), torch.ones(1, SIZE)

    def fusing(encoder: Block) -> Session:
        plan = pair.plan(Settings(policy="direct"))
        sites = {text: Site(encoder.layer)}
        return Session(
            pair, plan, model.sites(), sites, denoiser=model, text_encoders={"text_encoder": encoder}, say=said.append
        )

    for before in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        encoder = Block()
        with torch.no_grad():
            plain = encoder(x)
            with fusing(encoder):
                fused = encoder(x)
            if before:
                encoder.compile(backend="eager")
                assert torch.equal(encoder(x), plain)
            with fusing(encoder):
                if not before:
                    encoder.compile(backend="eager")
                torch.testing.assert_close(encoder(x), fused)
            assert torch.equal(encoder(x), plain)
        assert not torch.allclose(fused, plain, atol=1e-3)
