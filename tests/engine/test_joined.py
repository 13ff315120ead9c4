"""Modules of one input share its product with `down`; on the CPU here, which is told to be a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klora.cache import ScoreCache
from klora.engine import joined
from klora.engine.joined import SharedInput, input_of, shared_inputs
from klora.engine.session import Session
from klora.engine.site import Site
from klora.engine.weights import KEPT, JoinedDown
from klora.pair import Pair
from klora.settings import Settings
from tests.support.lora_files import write_lora

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SELF, CROSS = f"{BLOCK}.attn1", f"{BLOCK}.attn2"
WIDTH, CONTEXT = 16, 24
DOWN = torch.arange(3.0 * WIDTH).view(3, WIDTH)


class Attentions(nn.Module):
    """The projections of a self- and a cross-attention, called as a model calls them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"to_q": WIDTH, "to_k": WIDTH, "to_v": WIDTH}
        self.attn1 = nn.ModuleDict({name: nn.Linear(size, WIDTH) for name, size in sizes.items()})
        self.attn2 = nn.ModuleDict({name: nn.Linear(WIDTH if name == "to_q" else CONTEXT, WIDTH) for name in sizes})

    def forward(self, x: Tensor, context: Tensor) -> list[Tensor]:
        first = [layer(x) for layer in self.attn1.values()]
        second = [layer(x if name == "to_q" else context) for name, layer in self.attn2.items()]
        return [*first, *second]

    def sites(self) -> dict[str, Site]:
        return {
            f"{BLOCK}.{attention}.{name}": Site(layer)
            for attention in ("attn1", "attn2")
            for name, layer in getattr(self, attention).items()
        }


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    shapes = {name: site.shape for name, site in Attentions().sites().items()}
    files = [write_lora(tmp_path / f"{seed}.safetensors", shapes, rank=2 + seed, seed=seed) for seed in (1, 2)]
    return Pair.open(*files, ScoreCache(tmp_path / "cache"))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The width of every product that is made of several."""
    made: list[int] = []

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        made.append(len(weight))
        return F.linear(x, weight)

    monkeypatch.setattr(joined, "F", SimpleNamespace(linear=linear))
    return made


def session_of(pair: Pair, model: Attentions, **settings: Any) -> Session:
    return Session(pair, pair.plan(Settings.parse({"steps": 4, **settings})), model.sites())


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 7, WIDTH), torch.randn(2, 5, CONTEXT)


def test_modules_of_one_input_are_told_by_their_names() -> None:
    single, double = "single_transformer_blocks.3", "transformer_blocks.3.attn"
    names = [
        *(f"{SELF}.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"{CROSS}.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"{double}.{leaf}" for leaf in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
        *(f"{single}.{leaf}" for leaf in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")),
    ]
    assert shared_inputs(names) == [
        [f"{SELF}.to_q", f"{SELF}.to_k", f"{SELF}.to_v"],
        [f"{CROSS}.to_k", f"{CROSS}.to_v"],
        [f"{double}.to_q", f"{double}.to_k", f"{double}.to_v"],
        [f"{double}.add_q_proj", f"{double}.add_k_proj", f"{double}.add_v_proj"],
        [f"{single}.attn.to_q", f"{single}.attn.to_k", f"{single}.attn.to_v", f"{single}.proj_mlp"],
    ]
    assert input_of(f"{CROSS}.to_q") is None
    assert not shared_inputs([f"{SELF}.to_q", f"{CROSS}.to_q", f"{CROSS}.to_k"])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "settings", [{"policy": "direct"}, {"policy": "direct", "style_strength": 0.0}, {"policy": "random"}]
)
def test_joined_products_give_what_single_ones_give(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], inference: bool
) -> None:
    model = Attentions()
    seen = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(joined, "JOINING_DEVICES", devices)
        session = session_of(pair, model, **settings)
        with torch.inference_mode(inference), torch.no_grad(), session:
            session.start_pass([4.0, 3.0, 2.0, 1.0])
            outputs = []
            for level in (4.0, 3.0, 2.0, 1.0):
                session.at_level(level)
                outputs += model(*inputs())
            seen.append(outputs)
    for single, together in zip(*seen, strict=True):
        torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_there_is_one_product_for_q_k_and_v_and_nothing_of_it_stays(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, products: list[int]
) -> None:
    monkeypatch.setattr(joined, "JOINING_DEVICES", {"cpu"})
    model = Attentions()
    with session_of(pair, model, policy="direct", style_strength=0.0) as session:
        model(*inputs())
        assert products == [3 * 3, 2 * 3]
        model(*inputs())
        assert products == 2 * [3 * 3, 2 * 3]
        assert all(shared._x is None for shared in session._shared)


@torch.no_grad()
def test_modules_that_take_another_input_after_all_make_their_own_product(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, products: list[int]
) -> None:
    model, (x, _) = Attentions(), inputs()
    expected = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(joined, "JOINING_DEVICES", devices)
        with session_of(pair, model, policy="direct", style_strength=0.0) as session:
            q, k, v = model.attn1.values()
            changed = x.clone()
            outputs = [q(x), k(2 * x), v(x), q(x), q(x), k(changed), v(changed.mul_(3.0))]
            expected.append(outputs)
            session.detach()
        assert all(shared._x is None for shared in session._shared)
    for single, together in zip(*expected, strict=True):
        torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-6)


@pytest.fixture
def shared() -> SharedInput:
    """Two modules of rank 1 and 2, in which the LoRA acts."""
    shared = SharedInput(cast(JoinedDown, SimpleNamespace(ranks=[1, 2], stack=lambda device, dtype: DOWN.to(dtype))))
    shared.set_acting(0, True)
    shared.set_acting(1, True)
    return shared


def test_a_module_that_is_called_again_makes_its_own_product(shared: SharedInput) -> None:
    with torch.inference_mode():  # where a tensor that is changed in place does not tell
        x = torch.ones(1, WIDTH)
        assert torch.equal(shared.product(0, x, x.dtype), x @ DOWN[:1].T)
        x.mul_(2)
        assert torch.equal(shared.product(0, x, x.dtype), x @ DOWN[:1].T)
        assert torch.equal(shared.product(1, x, x.dtype), x @ DOWN[1:].T)


def test_a_product_of_another_precision_is_another_product(shared: SharedInput) -> None:
    x = torch.ones(1, WIDTH)
    assert shared.product(0, x, torch.float32).dtype == torch.float32
    assert shared.product(1, x, torch.float64).dtype == torch.float64


def test_the_weights_are_asked_for_where_the_input_is() -> None:
    asked: list[torch.device] = []
    down = SimpleNamespace(ranks=[1, 2], stack=lambda device, dtype: asked.append(device) or DOWN.to(device, dtype))
    x = torch.ones(1, WIDTH, device="meta")
    assert SharedInput(cast(JoinedDown, down)).product(1, x, x.dtype).is_meta
    assert asked == [x.device]


def test_it_pays_where_the_lora_acts_in_two_modules_and_lasts_until_both_have_their_part(shared: SharedInput) -> None:
    x = torch.ones(1, WIDTH)
    shared.product(1, x, x.dtype)
    assert shared._x is x
    shared.product(0, x, x.dtype)
    assert shared._x is None
    assert shared.pays
    shared.set_acting(1, False)
    assert not shared.pays
    shared.product(0, x, x.dtype)
    assert shared._x is None


@torch.no_grad()
def test_there_are_not_two_of_a_weight_and_the_next_session_makes_none(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "JOINING_DEVICES", {"cpu"})
    model = Attentions().bfloat16()
    x, context = (tensor.bfloat16() for tensor in inputs())
    KEPT.clear()
    storages = []
    for _ in range(2):
        with session_of(pair, model, policy="direct") as session:
            model(x, context)
        operands = [operand for part in session._parts.values() for operand in part.operands if operand]
        kept = [weights.chain(x.device, x.dtype) for weights in KEPT.of(pair)._weights.values()]
        used = [operand.source.kept(x.device, x.dtype) for operand in operands]
        for chains in (kept, used):
            storages.append({chain.weights[0].untyped_storage().data_ptr() for chain in chains if chain})
    # Of either LoRA: one storage for q, k and v, one for k and v, one for the q of the cross-attention.
    assert len(storages[0]) == 6
    assert all(later == storages[0] for later in storages)


@torch.no_grad()
def test_what_is_decided_while_sampling_is_not_joined(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, products: list[int]
) -> None:
    monkeypatch.setattr(joined, "JOINING_DEVICES", {"cpu"})
    model = Attentions()
    with session_of(pair, model, policy="dynamic"):
        model(*inputs())
    assert not products


@torch.no_grad()
def test_where_it_does_not_pay_nothing_is_joined(pair: Pair, products: list[int]) -> None:
    model = Attentions()
    with session_of(pair, model, policy="direct") as session:
        model(*inputs())
        assert not any(shared.down._stacks for shared in session._shared)
    assert not products


@pytest.mark.parametrize("family", ["loha", "lokr", "full"])
@torch.no_grad()
def test_what_is_not_down_and_up_is_not_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, products: list[int], family: str
) -> None:
    monkeypatch.setattr(joined, "JOINING_DEVICES", {"cpu"})
    model = Attentions()
    shapes = {name: site.shape for name, site in model.sites().items()}
    files = [write_lora(tmp_path / f"{kind}.safetensors", shapes, family=kind, rank=2) for kind in (family, "lora")]
    pair = Pair.open(*files, ScoreCache(tmp_path / "cache"))
    with session_of(pair, model, policy="direct", engine="bypass") as session:
        model(*inputs())
        assert [shared.down.ranks for shared in session._shared] == [[2, 2, 2], [2, 2]]
    assert products == [6, 4]


@torch.no_grad()
def test_convolutions_and_modules_of_other_widths_and_one_alone_are_not_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, products: list[int]
) -> None:
    monkeypatch.setattr(joined, "JOINING_DEVICES", {"cpu"})
    wide = {f"{SELF}.{leaf}": nn.Linear(width, WIDTH) for leaf, width in (("to_q", WIDTH), ("to_k", CONTEXT))}
    convs = {f"{CROSS}.{leaf}": nn.Conv2d(WIDTH, WIDTH, 1) for leaf in ("to_k", "to_v")}
    sites = {name: Site(layer) for name, layer in {**wide, **convs}.items()}
    shapes = {name: site.shape for name, site in sites.items()}
    files = [
        write_lora(tmp_path / "both.safetensors", shapes, rank=2),
        write_lora(tmp_path / "one.safetensors", {f"{SELF}.to_q": (WIDTH, WIDTH)}, rank=2),
    ]
    pair = Pair.open(*files, ScoreCache(tmp_path / "cache"))
    with Session(pair, pair.plan(Settings.parse({"policy": "direct"})), sites) as session:
        for name, layer in wide.items():
            layer(torch.zeros(2, shapes[name][1]))
        for conv in convs.values():
            conv(torch.zeros(1, WIDTH, 2, 2))
        assert not session._shared
    assert not products
