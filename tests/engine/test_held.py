"""Held weights: in calls of the model a module has W0 + Σ s·ΔW in the place of W0, which is never touched."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from klora.cache import ScoreCache
from klora.engine.bypass import HookedLayer, Part
from klora.engine.held import FormedLayer, HeldLayer
from klora.engine.products import product_of
from klora.engine.session import Session
from klora.engine.site import Site
from klora.engine.ways import layer_of
from klora.engine.weights import KEPT, Room
from klora.errors import KloraError
from klora.lora.deltas.computed import FactorDelta
from klora.pair import Pair
from klora.settings import Settings
from tests.support.lora_files import write_lora

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR, CONV = f"{BLOCK}.attn1.to_q", "down_blocks.0.resnets.0.conv1"
SHAPES: dict[str, tuple[int, ...]] = {LINEAR: (24, 16), CONV: (12, 8, 3, 3)}
INPUTS = {LINEAR: (2, 5, 16), CONV: (2, 8, 6, 6)}
FAMILIES = ("lora", "loha", "lokr", "dora", "full")


class Model(nn.Module):
    """A linear layer and a convolution, by the names that files have for them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = nn.Linear(16, 24), nn.Conv2d(8, 12, 3, padding=1)
        self.to(dtype)

    def sites(self) -> dict[str, Site]:
        return {LINEAR: Site(self.linear), CONV: Site(self.conv)}

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return self(**{name: torch.randn(shape, generator=generator) for name, shape in INPUTS.items()})

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        sites = self.sites()
        return {name: sites[name].module(x.to(sites[name].module.weight.dtype)) for name, x in inputs.items()}

    def on_linear(self, x: Tensor) -> Tensor:
        return self(**{LINEAR: x})[LINEAR]

    def weight_in_a_call(self) -> Tensor:
        """What its linear layer has for a weight while it is called."""
        found = []
        hook = self.linear.register_forward_pre_hook(lambda module, args: found.append(module.weight))
        self.outputs()
        hook.remove()
        return found[0]


Kept = dict[str, tuple[nn.Parameter, int, Tensor]]


def storage(model: nn.Module) -> Kept:
    return {name: (value, value.data_ptr(), value.detach().clone()) for name, value in model.named_parameters()}


def assert_untouched(model: nn.Module, before: Kept) -> None:
    for name, value in model.named_parameters():
        assert value is before[name][0]
        assert value.data_ptr() == before[name][1]
        assert torch.equal(value, before[name][2])
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._state_dict_hooks)
        assert not any((*hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called))


def pair_of(folder: Path, family: str, **options: Any) -> Pair:
    options = {"rank": 4, "strength": 0.3, **options}
    files = [write_lora(folder / f"{i}.safetensors", SHAPES, family=family, seed=i, **options) for i in (1, 2)]
    return Pair.open(*files, ScoreCache(folder / "cache"))


def session_of(pair: Pair, model: Model, **settings: Any) -> Session:
    plan = pair.plan(Settings.parse({"steps": 4, "engine": "held", **settings}))
    return Session(pair, plan, model.sites(), denoiser=model)


def ways(session: Session) -> list[type]:
    return [type(layer) for layer in session._layers._layers.values()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["k-lora", "direct"])
def test_held_weights_give_what_products_give_and_leave_every_byte_and_pointer(
    tmp_path: Path, family: str, policy: str
) -> None:
    pair, model = pair_of(tmp_path, family), Model()
    before, plain, found = storage(model), model.outputs(), {}
    for engine, way in (("bypass", HookedLayer), ("held", HeldLayer)):
        session = session_of(pair, model, engine=engine, policy=policy, style_strength=0.5)
        assert ways(session) == [way, way]
        with session:
            found[engine] = []
            for tau in (0.0, 0.95, 0.0):
                session.set_tau(tau)
                found[engine].append(model.outputs())
        assert_untouched(model, before)
    for one, other in zip(*found.values(), strict=True):
        for name in SHAPES:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(one[name], plain[name], atol=1e-3)
    assert all(torch.equal(plain[name], value) for name, value in model.outputs().items())


@pytest.mark.parametrize("grad", [False, True])
def test_a_module_that_is_called_by_itself_before_the_model_is_has_what_acts(tmp_path: Path, grad: bool) -> None:
    pair, model = pair_of(tmp_path, "loha"), Model()
    x = torch.randn(INPUTS[LINEAR])
    with torch.set_grad_enabled(grad):
        plain = model.linear(x)
        session = session_of(pair, model, policy="direct")
        assert ways(session) == [HeldLayer, HeldLayer]
        wanted = plain + x @ sum(file.modules[LINEAR].matrix() for file in (pair.subject, pair.style)).T
        with session:
            torch.testing.assert_close(model.linear(x), wanted, rtol=1e-4, atol=1e-4)
            session.start_pass([1.0, 0.5, 0.0])
            session.at_level(1.0)
            for _ in range(2):
                torch.testing.assert_close(model.linear(x), wanted, rtol=1e-4, atol=1e-4)
            model.outputs()
        assert torch.equal(model.linear(x), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_held_weight_is_formed_in_full_precision_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    pair, model = pair_of(tmp_path, "loha"), Model(dtype)
    base = model.linear.weight.detach().clone()
    with session_of(pair, model, policy="direct"):
        changes = [file.modules[LINEAR].matrix() for file in (pair.subject, pair.style)]
        assert torch.equal(model.weight_in_a_call(), (base.float() + changes[0] + changes[1]).to(dtype))
    assert torch.equal(model.linear.weight, base)


def test_where_nothing_acts_the_weight_is_the_models_own(tmp_path: Path) -> None:
    pair, model = pair_of(tmp_path, "full"), Model()
    with session_of(pair, model, policy="direct", subject_strength=0, style_strength=0):
        assert model.weight_in_a_call() is model.linear.weight


def test_between_calls_the_weights_are_the_models_own(tmp_path: Path) -> None:
    pair, model = pair_of(tmp_path, "full"), Model()
    before = storage(model)
    with session_of(pair, model) as session:
        for tau in (0.0, 0.95):
            session.set_tau(tau)
            assert not torch.equal(model.weight_in_a_call(), model.linear.weight)
            for name, value in model.named_parameters():
                assert value is before[name][0]
        with pytest.raises(RuntimeError):
            model(**{LINEAR: torch.zeros(1, 3)})
        assert model.linear.weight is before["linear.weight"][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_room_a_weight_is_formed_for_each_forward_and_gone_after_it(tmp_path: Path, family: str) -> None:
    pair, model = pair_of(tmp_path, family), Model()
    before = storage(model)
    with session_of(pair, model, engine="bypass", policy="direct"):
        expected = model.outputs()
    session = session_of(pair, model, policy="direct")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Room, "on", classmethod(lambda cls, device: Room(0)))
        session = session_of(pair, model, policy="direct")
    assert ways(session) == [FormedLayer, FormedLayer]
    with session:
        for name, value in model.outputs().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
        assert model.linear.weight is before["linear.weight"][0]
        with pytest.raises(RuntimeError):
            model.linear(torch.zeros(1, 3))
        assert model.linear.weight is before["linear.weight"][0]
    assert_untouched(model, before)


def test_each_module_goes_the_way_that_costs_less(tmp_path: Path) -> None:
    model = Model()
    for family, rank, way in (
        ("lora", 4, HookedLayer),
        ("lora", 64, HeldLayer),
        ("loha", 4, HeldLayer),
        ("full", 4, HeldLayer),
        ("dora", 4, HeldLayer),
    ):
        assert ways(session_of(pair_of(tmp_path, family, rank=rank), model, engine="auto")) == [way, way]
    # Of a kernel's LoKr a whole ΔW has to be formed.
    assert ways(session_of(pair_of(tmp_path, "lokr"), model, engine="auto")) == [HookedLayer, HeldLayer]
    # Several forwards a step, each with other LoRAs, would form them again and again.
    assert set(ways(session_of(pair_of(tmp_path, "loha"), model, engine="auto", policy="composite"))) == {HookedLayer}
    assert set(ways(session_of(pair_of(tmp_path, "loha"), model, engine="held", policy="dynamic"))) == {HookedLayer}


@pytest.mark.parametrize(("width", "rank"), [(320, 64), (640, 64), (1280, 80), (3072, 192)])
def test_a_low_rank_is_held_from_64_and_a_sixteenth_of_the_layers_width_on(width: int, rank: int) -> None:
    layer = nn.Linear(width, width, bias=False, device="meta")
    for number, way in ((rank, HeldLayer), (rank - 1, HookedLayer)):
        factors = torch.zeros(width, number), torch.zeros(number, width)
        delta = FactorDelta("f.safetensors", "k", number, number, 1.0, (width, width), *factors)
        part = Part((product_of(delta, Site(layer)), None))
        assert type(layer_of(layer, [part], "auto", plain=True, room=Room())) is way


@pytest.mark.parametrize("family", ["loha", "dora", "full"])
def test_without_room_what_is_cheaper_is_taken(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "on", classmethod(lambda cls, device: Room(0)))
    pair = pair_of(tmp_path, family)
    assert set(ways(session_of(pair, Model(), engine="auto"))) == {FormedLayer}
    half = HookedLayer if family == "dora" else FormedLayer
    assert set(ways(session_of(pair, Model(torch.bfloat16), engine="auto"))) == {half}


def test_there_are_no_more_held_weights_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    monkeypatch.setattr(Room, "on", classmethod(lambda cls, device: Room(model.linear.weight.nbytes)))
    assert ways(session_of(pair_of(tmp_path, "loha"), model, engine="auto")) == [HeldLayer, FormedLayer]


def offloaded(model: Model) -> None:
    model._hf_hook = object()


def cast(model: Model) -> None:
    model.linear._diffusers_hook = object()
    model.conv._diffusers_hook = object()


def wrapped(model: Model) -> None:
    model.forward = lambda: None  # type: ignore[method-assign]


def fp8(model: Model) -> None:
    for module in (model.linear, model.conv):
        module.weight.data = module.weight.data.to(torch.float8_e4m3fn)


class Packed(nn.Parameter):
    """A weight of a kind of its own."""


def packed(model: Model) -> None:
    for module in (model.linear, model.conv):
        module.weight = Packed(module.weight.data)


@pytest.mark.parametrize("spoil", [offloaded, cast, wrapped, fp8, packed], ids=lambda spoil: spoil.__name__)
def test_a_weight_that_others_move_cast_or_pack_is_not_held(tmp_path: Path, spoil: Callable[[Model], None]) -> None:
    model = Model()
    spoil(model)
    assert set(ways(session_of(pair_of(tmp_path, "lora"), model))) == {HookedLayer}


def test_where_a_host_has_put_a_forward_of_its_own_into_torch_nothing_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert set(ways(session_of(pair_of(tmp_path, "loha"), Model()))) == {HookedLayer}


def test_a_weight_that_two_modules_share_is_not_held(tmp_path: Path) -> None:
    model = Model()
    model.twin = nn.Linear(16, 24)
    model.twin.weight = model.linear.weight
    assert ways(session_of(pair_of(tmp_path, "loha"), model)) == [HookedLayer, HeldLayer]


@pytest.mark.parametrize("engine", ["bypass", "held"])
def test_a_model_at_work_is_not_copied_and_says_so(tmp_path: Path, engine: str) -> None:
    model = Model()
    with session_of(pair_of(tmp_path, "loha"), model, engine=engine):
        for copied in (copy.deepcopy, pickle.dumps, lambda it: torch.save(it, io.BytesIO())):
            with pytest.raises(KloraError, match="copy or save the model before or after"):
                copied(model)
    assert torch.equal(copy.deepcopy(model).linear.weight, model.linear.weight)


def test_what_is_saved_of_a_model_at_work_is_its_own_weights(tmp_path: Path) -> None:
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with session_of(pair_of(tmp_path, "loha"), model):
        model.outputs()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_loaded_meanwhile_are_the_models_own_from_then_on(tmp_path: Path) -> None:
    model, other = Model(), Model()
    loaded = {name: 2 * value for name, value in other.state_dict().items()}
    with session_of(pair_of(tmp_path, "loha"), model) as session:
        model.load_state_dict(loaded)
        session.set_tau(0.95)
        model.outputs()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_a_model_that_is_moved_meanwhile_stays_where_it_is_put(tmp_path: Path) -> None:
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with session_of(pair_of(tmp_path, "loha"), model) as session:
        fused = model.outputs()
        model.double()
        moved = model.outputs()
        session.set_tau(0.95)
        model.outputs()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name].double())
    torch.testing.assert_close(moved[LINEAR].float(), fused[LINEAR], rtol=1e-4, atol=1e-4)


def test_a_weight_that_somebody_has_exchanged_is_the_models_own_from_then_on(tmp_path: Path) -> None:
    pair, model, other = pair_of(tmp_path, "full"), Model(), Model()
    theirs = nn.Parameter(torch.ones(24, 16))
    other.linear.weight = nn.Parameter(theirs.detach().clone())
    with session_of(pair, other):
        expected = other.outputs()
    with session_of(pair, model):
        model.outputs()
        model.linear.weight = theirs
        torch.testing.assert_close(model.outputs()[LINEAR], expected[LINEAR])
    assert model.linear.weight is theirs
    assert torch.equal(theirs, torch.ones(24, 16))


def test_where_the_memory_is_wanted_held_weights_go_first_and_the_fusion_goes_on(tmp_path: Path) -> None:
    pair, model = pair_of(tmp_path, "loha"), Model()
    before = storage(model)
    with session_of(pair, model) as session:
        fused = model.outputs()
        KEPT.clear()
        assert set(ways(session)) == {HookedLayer}
        for name, value in model.outputs().items():
            torch.testing.assert_close(value, fused[name], rtol=1e-4, atol=1e-5)
    assert_untouched(model, before)
    assert not KEPT.at_work


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt])
def test_held_weights_are_put_back_whatever_ends_the_block(tmp_path: Path, ending: type[BaseException]) -> None:
    pair, model = pair_of(tmp_path, "loha"), Model()
    before = storage(model)

    def fails() -> None:
        with session_of(pair, model):
            raise ending("enough")

    with pytest.raises(ending):
        fails()
    assert_untouched(model, before)


@pytest.mark.parametrize("engine", ["bypass", "held"])
def test_what_is_made_in_inference_mode_serves_gradients_later(tmp_path: Path, engine: str) -> None:
    pair, model = pair_of(tmp_path, "loha"), Model().requires_grad_(False)
    x = torch.randn(2, 16, requires_grad=True)
    with session_of(pair, model, engine=engine):
        with torch.inference_mode():
            model.outputs()
        model.on_linear(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("room", [2**20, 0], ids=["held", "formed"])
def test_gradients_are_those_of_the_merged_weight(tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "on", classmethod(lambda cls, device: Room(room)))
    pair, model, x = pair_of(tmp_path, "full"), Model(), torch.randn(3, 16, requires_grad=True)
    change = sum(file.modules[LINEAR].matrix() for file in (pair.subject, pair.style))
    expected = (model.linear.weight.detach() + change).sum(0).expand(3, 16)
    with session_of(pair, model, policy="direct"):
        model.on_linear(x).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_comes_later_is_that_of_the_forward(tmp_path: Path) -> None:
    pair, model, x = pair_of(tmp_path, "full"), Model(), torch.randn(3, 16, requires_grad=True)
    with session_of(pair, model, policy="direct"):
        change = sum(file.modules[LINEAR].matrix() for file in (pair.subject, pair.style))
        y = model.on_linear(x).sum()
        model.outputs()
    y.backward()
    expected = (model.linear.weight.detach() + change).sum(0).expand(3, 16)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_two_fusions_on_one_model_both_act_and_both_come_off(tmp_path: Path) -> None:
    pair, model = pair_of(tmp_path, "full"), Model()
    before, plain = storage(model), model.outputs()
    with session_of(pair, model) as outer:
        once = model.outputs()
        with session_of(pair, model) as inner:
            for session in (outer, inner):
                session.set_tau(0.95)
                session.set_tau(0.0)
            for name, value in model.outputs().items():
                torch.testing.assert_close(value - plain[name], 2 * (once[name] - plain[name]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.outputs()[LINEAR], once[LINEAR])
    assert_untouched(model, before)
