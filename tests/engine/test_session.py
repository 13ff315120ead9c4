"""A session on bare linear layers: what is active at which τ, how it is attached, and that it leaves nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from klora.cache import ScoreCache
from klora.engine.dynamic import BatchRows
from klora.engine.progress import SamplingPass
from klora.engine.session import Session
from klora.engine.site import Site
from klora.engine.state import selection_of
from klora.errors import LoraValueError, MismatchError, SettingsError
from klora.fusion.policies.base import BOTH, SUBJECT, Active, Moment
from klora.fusion.policies.np_lora import NpLora
from klora.lora.container import TensorFile
from klora.pair import Pair
from klora.settings import Settings
from tests.support.lora_files import write_lora

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TO_Q, TO_K, FF = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", f"{BLOCK}.ff.net.2"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SIZE = 16
ALWAYS_SUBJECT = {"alpha": 0.0, "beta": 0.0}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A subject with to_q, to_k, a feed-forward and a text-encoder module; a style with to_q, to_k and text encoder."""
    shape = (SIZE, SIZE)
    subject = write_lora(tmp_path / "dog.safetensors", dict.fromkeys((TO_Q, TO_K, FF, TEXT), shape), rank=4, seed=1)
    style = write_lora(tmp_path / "ink.safetensors", dict.fromkeys((TO_Q, TO_K, TEXT), shape), rank=2, seed=2)
    return Pair.open(subject, style, ScoreCache(tmp_path / "cache"))


def model(*names: str) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {name: nn.Linear(SIZE, SIZE) for name in names}


def session_of(
    pair: Pair, layers: Mapping[str, nn.Linear], text: Mapping[str, nn.Linear] | None = None, **settings: Any
) -> Session:
    def sites(modules: Mapping[str, nn.Linear] | None) -> dict[str, Site]:
        return {name: Site(module) for name, module in (modules or {}).items()}

    plan = pair.plan(Settings.parse({"steps": 4, **settings}))
    return Session(pair, plan, sites(layers), sites(text), "the test model")


@torch.no_grad()
def change(layer: nn.Linear) -> Tensor:
    """What the hooks of a layer add to its weight."""
    return layer(torch.eye(SIZE)).T - (layer.weight + layer.bias[:, None])


def acts(layer: nn.Linear, *expected: tuple[Tensor, float]) -> bool:
    wanted = sum((strength * matrix for matrix, strength in expected), torch.zeros(SIZE, SIZE))
    return torch.allclose(change(layer), wanted, atol=1e-6)


def test_what_the_plan_decides_is_active_at_every_level(pair: Pair) -> None:
    layers = model(TO_Q, TO_K, FF)
    session = session_of(pair, layers)
    subject, style = pair.subject.modules, pair.style.modules
    with session:
        session.start_pass([900.0, 600.0, 300.0, 100.0])
        for step, level in enumerate([900.0, 600.0, 300.0, 100.0]):
            session.at_level(level)
            assert session.tau == step / 4
            for name in (TO_Q, TO_K):
                winner = subject if session.plan.selection(name)[step] == "c" else style
                assert acts(layers[name], (winner[name].matrix(), 1.0))
            assert acts(layers[FF], (subject[FF].matrix(), 1.0))


def test_strengths_multiply_what_is_active(pair: Pair) -> None:
    layers = model(TO_Q)
    with session_of(pair, layers, subject_strength=0.5, style_strength=-2.0, policy="direct"):
        assert acts(layers[TO_Q], (pair.subject.modules[TO_Q].matrix(), 0.5), (pair.style.modules[TO_Q].matrix(), -2.0))


def test_only_the_loras_asked_for_are_active(pair: Pair) -> None:
    layers = model(TO_Q, FF)
    with session_of(pair, layers, policy="direct") as session:
        session.set_active(SUBJECT)
        assert acts(layers[TO_Q], (pair.subject.modules[TO_Q].matrix(), 1.0))
        session.set_active(Active(0.0, 1.0))
        assert acts(layers[FF])
        session.set_active(BOTH)
        assert not acts(layers[TO_Q], (pair.subject.modules[TO_Q].matrix(), 1.0))


def test_text_encoders_are_changed_for_the_whole_session(pair: Pair) -> None:
    text = model(TEXT)
    subject, style = pair.subject.text_encoder[TEXT].matrix(), pair.style.text_encoder[TEXT].matrix()
    for who, expected in {
        "both": ((subject, 1.0), (style, 0.5)),
        "subject": ((subject, 1.0),),
        "style": ((style, 0.5),),
        "none": (),
    }.items():
        with session_of(pair, model(TO_Q), text, text_encoder=who, style_strength=0.5) as session:
            session.set_tau(0.9)
            assert acts(text[TEXT], *expected)
        assert not text[TEXT]._forward_hooks


def test_a_text_encoder_of_another_size_is_refused_by_file_and_key(pair: Pair) -> None:
    # A module that is larger, and one that is smaller in one direction alone.
    for shape in ((SIZE, 2 * SIZE), (2 * SIZE, SIZE), (SIZE - 1, SIZE)):
        text = {TEXT: nn.Linear(shape[1], shape[0])}
        with pytest.raises(MismatchError, match=r"dog\.safetensors: lora_te.*does not fit the text encoder's"):
            session_of(pair, model(TO_Q), text, text_encoder="none")


def test_hooks_come_off_with_the_outermost_block_whatever_ended_it(pair: Pair) -> None:
    layers = model(TO_Q)
    session = session_of(pair, layers)

    def fails() -> None:
        with session:
            with session:
                assert len(layers[TO_Q]._forward_hooks) == 1
            assert len(layers[TO_Q]._forward_hooks) == 1
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        fails()
    assert not layers[TO_Q]._forward_hooks
    session.attach()
    session.attach()
    assert len(layers[TO_Q]._forward_hooks) == 1
    session.detach()
    session.detach()
    assert not layers[TO_Q]._forward_hooks


def test_modules_that_the_model_lacks_are_listed(pair: Pair) -> None:
    assert set(session_of(pair, model(TO_Q)).missing) == {TO_K, FF}
    assert session_of(pair, model(TO_Q, TO_K, FF)).missing == ()


def test_a_level_needs_a_pass_first(pair: Pair) -> None:
    with pytest.raises(RuntimeError, match="start_pass"):
        session_of(pair, model(TO_Q)).at_level(1.0)


def test_a_pass_has_its_own_number_of_steps_and_begins_anew(pair: Pair) -> None:
    layers = model(TO_Q)
    session = session_of(pair, layers, balance=0.75)
    session.start_pass([3.0, 2.0, 1.0])
    assert session.plan.steps == 3
    assert session.moment.tau == 0.0
    with pytest.raises(RuntimeError, match="set_tau"):
        session.set_active(BOTH)
    with session:
        session.at_level(1.0)
        assert session.moment == Moment(2 / 3, 3, 0.75)
        change(layers[TO_Q])
    session.start_pass([2.0, 1.0])
    assert (session.plan.steps, session.moment.tau) == (2, 0.0)


def test_a_pass_may_go_on_in_another_session(pair: Pair) -> None:
    begun = SamplingPass([4.0, 3.0, 2.0, 1.0], relative=True)
    begun.tau(3.0)
    layers = model(TO_Q)
    with session_of(pair, layers) as other:
        other.follow(begun)
        other.at_level(3.0)
        assert other.tau == 0.0
        change(layers[TO_Q])
        other.at_level(2.0)
        assert other.tau == pytest.approx(1 / 3)


def test_progress_relative_begins_at_0_wherever_the_pass_does(pair: Pair) -> None:
    levels = [4.0, 3.0, 2.0, 1.0]
    for progress, expected in (("absolute", 0.5), ("relative", 0.0)):
        session = session_of(pair, model(TO_Q), progress=progress)
        session.start_pass(levels)
        session.at_level(2.0)
        assert session.tau == expected


def test_a_policy_that_can_do_nothing_with_the_model_says_so(pair: Pair) -> None:
    with pytest.raises(SettingsError, match="SDXL"):
        session_of(pair, model(TO_Q), policy="b-lora")


class Denoiser(nn.Module):
    """Calls one layer, as a model does."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@torch.no_grad()
def test_what_is_decided_while_sampling_is_kept_for_the_reports(pair: Pair) -> None:
    layers = model(TO_Q, TO_K, FF)
    denoiser = Denoiser(layers[TO_Q])
    plan = pair.plan(Settings(policy="dynamic", steps=4))
    seen: list[Tensor] = []

    def rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows:
        seen.append(args[0])
        return BatchRows(1, 2, 2)

    sites = {name: Site(layer) for name, layer in layers.items()}
    session = Session(pair, plan, sites, None, "the test model", denoiser, rows)
    assert session.observed is plan
    with session:
        session.start_pass([4.0, 3.0, 2.0, 1.0])
        for level in (4.0, 2.0):
            session.at_level(level)
            denoiser(torch.randn(2, SIZE))
    assert len(seen) == 2
    assert not denoiser._forward_pre_hooks
    assert [tau for tau, _ in session.decisions[TO_Q]] == [0.0, 0.5]
    first, second = (letter for _, letter in session.decisions[TO_Q])
    assert session.observed.selection(TO_Q) == 2 * first + 2 * second
    assert set(session.observed.record or ()) == {TO_Q}
    assert dataclasses.replace(session.observed, record=None) == session.plan


def test_decisions_of_one_step_count_with_the_last_and_reach_to_both_ends() -> None:
    assert selection_of([(0.5, "s"), (0.6, "c")], 4) == "sscc"
    assert selection_of([(0.25, "c"), (0.75, "s")], 4) == "cccs"
    assert selection_of([(1.0, "s"), (0.0, "c")], 2) == "cc"


@pytest.mark.parametrize("name", [TO_Q, FF, TEXT], ids=["contested", "of one file", "text encoder"])
def test_nan_is_refused_before_anything_is_attached(pair: Pair, tmp_path: Path, name: str) -> None:
    plan = pair.plan(Settings(text_encoder="none"))
    path = tmp_path / "dog.safetensors"
    tensors = load_file(path)
    table = pair.subject.text_encoder if name == TEXT else pair.subject.modules
    key = f"{table[name].key}.lora_up.weight"
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path)
    bad = Pair.open(path, pair.style.loras[0].path, pair.cache)
    with pytest.raises(LoraValueError, match=rf"dog\.safetensors: {key}: holds NaN"):
        Session(bad, plan, {name: Site(layer) for name, layer in model(TO_Q, FF).items()})


@torch.no_grad()
def test_the_next_session_of_a_pair_reads_nothing_and_uses_the_same_weights(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def addresses(session: Session) -> list[int]:
        # bf16, so that they are other tensors than those of the file.
        place = (torch.device("cpu"), torch.bfloat16)
        chains = [op.source.kept(*place) for op in session._parts[TO_Q].operands if op]
        return [weight.data_ptr() for chain in chains if chain for weight in chain.weights]

    first = session_of(pair, model(TO_Q))
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("the file is read again"))
    assert addresses(session_of(pair, model(TO_Q))) == addresses(first)
    assert addresses(session_of(pair, model(TO_Q), policy="direct")) == addresses(first)


def test_what_a_policy_makes_of_a_pair_is_made_once_for_the_same_settings(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    plain = NpLora.combine
    monkeypatch.setattr(NpLora, "combine", lambda *args: made.append(args) or plain(*args))
    for settings, count in (({"mu": 0.5}, 1), ({"mu": 0.5}, 1), ({"mu": 0.25}, 2)):
        session_of(pair, model(TO_Q), policy="np-lora", **settings)
        assert len(made) == count


def test_a_new_session_is_at_the_beginning(pair: Pair) -> None:
    layers = model(TO_Q)
    with session_of(pair, layers, alpha=1e9, beta=0.0) as session:
        assert session.tau == 0.0
        assert acts(layers[TO_Q], (pair.subject.modules[TO_Q].matrix(), 1.0))


def test_only_a_policy_that_measures_watches_the_denoiser(pair: Pair) -> None:
    layers = model(TO_Q)
    denoiser = Denoiser(layers[TO_Q])
    for policy, conditional, hooks in (("k-lora", True, 0), ("dynamic", False, 0), ("dynamic", True, 1)):
        plan = pair.plan(Settings(policy=policy))
        rows = (lambda args, kwargs: None) if conditional else None
        session = Session(pair, plan, {TO_Q: Site(layers[TO_Q])}, None, "m", denoiser, rows)
        for _ in range(2):
            with session:
                assert len(denoiser._forward_pre_hooks) == hooks
            assert not denoiser._forward_pre_hooks
        assert not session.decisions
        assert session.observed is session.plan


def test_what_tells_the_conditional_rows_sees_the_arguments_of_the_call(pair: Pair) -> None:
    layers, seen = model(TO_Q), []
    denoiser = Denoiser(layers[TO_Q])

    def rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    x = torch.zeros(1, SIZE)
    plan = pair.plan(Settings(policy="dynamic"))
    with Session(pair, plan, {TO_Q: Site(layers[TO_Q])}, None, "m", denoiser, rows):
        denoiser(x)
        denoiser(x=x)
    assert seen == [((x,), {}), ((), {"x": x})]


def test_a_file_that_does_not_fit_is_told_with_the_models_name(pair: Pair) -> None:
    with pytest.raises(MismatchError, match="the test model"):
        session_of(pair, {TO_Q: nn.Linear(2 * SIZE, SIZE)})


def test_modules_of_the_model_that_no_file_has_are_left_alone(pair: Pair) -> None:
    other, text = f"{BLOCK}.attn2.to_v", TEXT.replace("q_proj", "v_proj")
    layers, encoder = model(other, TO_Q), model(text, TEXT)
    with session_of(pair, layers, encoder, **ALWAYS_SUBJECT):
        assert not layers[other]._forward_hooks
        assert not encoder[text]._forward_hooks
        assert acts(layers[TO_Q], (pair.subject.modules[TO_Q].matrix(), 1.0))
        assert not acts(encoder[TEXT])


@pytest.mark.parametrize("policy", ["lego", "dare"])
def test_what_a_policy_combines_acts_in_contested_modules_alone_and_with_its_strengths_once(
    pair: Pair, policy: str
) -> None:
    layers = model(TO_Q, FF)
    settings = {"policy": policy, "subject_strength": 2.0, "style_strength": 0.5}
    subject, style = pair.subject.modules, pair.style.modules
    with session_of(pair, layers, **settings) as session:
        merged, nothing = session.plan.policy.combine(TO_Q, subject[TO_Q], style[TO_Q])
        assert nothing is None
        assert merged is not None
        assert acts(layers[TO_Q], (merged.matrix(), 1.0))
        assert acts(layers[FF], (subject[FF].matrix(), 2.0))
    with session_of(pair, layers, **settings, scope="linear", other_layers="both", variant="paper"):
        assert acts(layers[TO_Q], (merged.matrix(), 1.0))


def test_what_is_outside_the_scope_is_not_combined(tmp_path: Path) -> None:
    files = [write_lora(tmp_path / f"{i}.safetensors", {FF: (SIZE, SIZE)}, seed=i) for i in (1, 2)]
    pair, layers = Pair.open(*files, ScoreCache(tmp_path / "cache")), model(FF)
    with session_of(pair, layers, policy="lego", style_strength=0.5, scope="attention", other_layers="both"):
        assert acts(layers[FF], (pair.subject.modules[FF].matrix(), 1.0), (pair.style.modules[FF].matrix(), 0.5))


@torch.no_grad()
def test_dense_differences_of_a_session_share_one_room(tmp_path: Path) -> None:
    layers, names = model(TO_Q, FF), dict.fromkeys((TO_Q, FF), (SIZE, SIZE))
    files = [write_lora(tmp_path / f"{i}.safetensors", names, family="loha", seed=i) for i in (1, 2)]
    pair = Pair.open(*files, ScoreCache(tmp_path / "cache"))
    for room, kept in ((0, 0), (3 * 4 * SIZE * SIZE, 3)):
        session = session_of(pair, layers, policy="direct", engine="bypass")
        session._room.free = room
        with session:
            for layer in layers.values():
                layer(torch.zeros(1, SIZE))
            operands = [operand for part in session._parts.values() for operand in part.operands if operand]
            assert sum(len(operand.source._chains) for operand in operands) == kept
