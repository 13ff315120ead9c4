"""A delta added beside a module equals the delta merged, for every family, layer and type, and comes off again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from klora.engine.bypass import HookedLayer, Part
from klora.engine.products import Factored, Product, product_of
from klora.engine.site import Site, module_shape
from klora.engine.weights import Room, Weights
from klora.errors import MismatchError
from klora.lora.deltas import Delta
from klora.lora.deltas.computed import FactorDelta
from klora.lora.file import LoraFile
from tests.support.lora_files import FAMILIES, write_lora

LAYERS = {
    "linear": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", (24, 16)),
    "conv1x1": ("down_blocks.0.attentions.0.proj_in", (24, 16, 1, 1)),
    "conv3x3": ("down_blocks.0.resnets.0.conv1", (24, 16, 3, 3)),
    "strided": ("down_blocks.0.downsamplers.0.conv", (24, 16, 3, 3)),
}


def _computes(dtype: torch.dtype) -> bool:
    """Tell whether this torch has the type on the CPU: 2.1 lacks products of fp16."""
    try:
        nn.functional.linear(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype))
    except RuntimeError:
        return False
    return True


COMPUTED = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if _computes(dtype)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-6}


def layer_of(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(16, 24).to(dtype)
    if kind == "conv1x1":
        return nn.Conv2d(16, 24, 1).to(dtype)
    return nn.Conv2d(16, 24, 3, padding=1, stride=2 if kind == "strided" else 1).to(dtype)


def input_of(kind: str, dtype: torch.dtype) -> torch.Tensor:
    shape = (2, 5, 16) if kind == "linear" else (2, 16, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def delta_of(folder: Path, kind: str, family: str = "lora", seed: int = 0, **options: object) -> Delta:
    name, shape = LAYERS[kind]
    path = write_lora(folder / f"{seed}.safetensors", {name: shape}, family=family, seed=seed, strength=0.2, **options)
    return LoraFile.open(path).modules[name]


def add(product: Product, x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    return product.adder(y.device, y.dtype, strength)(x, y)


def switch(layer: HookedLayer, strengths: tuple[float, float]) -> None:
    for part in layer.parts:
        part.set(strengths)
    layer.changed()


def places(product: Product) -> set[tuple[torch.device, torch.dtype]]:
    """Where weights are kept of it."""
    kept = product.source.weights if isinstance(product.source, Factored) else product.source
    return set(kept._chains)


def weights_of(product: Product, x: torch.Tensor) -> list[int]:
    chain = product.source.kept(x.device, x.dtype)
    return [weight.data_ptr() for weight in chain.weights] if chain else []


def hooked(module: nn.Module, *deltas: Delta, strengths: tuple[float, float] = (0.0, 0.0)) -> tuple[HookedLayer, Part]:
    operands = [product_of(delta, Site(module)) for delta in deltas]
    part = Part((operands[0], operands[1] if len(operands) > 1 else None), strengths)
    return HookedLayer(module, [part]), part


def merge(module: nn.Module, delta: Delta, strength: float) -> nn.Module:
    twin = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    own = {"_parameters": dict(module._parameters), "_forward_hooks": {}}
    twin.__dict__.update({**module.__dict__, **own})
    weight = module.weight.detach().float()
    matrix = delta.matrix(weight if delta.needs_base else None).reshape(weight.shape)
    twin.weight = nn.Parameter((weight + strength * matrix).to(module.weight.dtype))
    return twin


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize(
    ("kind", "family"),
    # A core tensor exists for kernels larger than 1×1 only.
    [(k, f) for k, (_, shape) in LAYERS.items() for f in FAMILIES if not f.endswith("-cp") or 3 in shape],
)
@torch.no_grad()
def test_bypass_equals_merging(tmp_path: Path, kind: str, family: str, dtype: torch.dtype) -> None:
    module, x = layer_of(kind, dtype), input_of(kind, dtype)
    delta = delta_of(tmp_path, kind, family, dtype=dtype, alpha=2.0)
    plain = module(x)
    layer, _ = hooked(module, delta, strengths=(0.7, 0.0))
    layer.attach()
    active = module(x)
    layer.detach()
    expected = merge(module, delta, 0.7)(x)
    scale = float(expected.abs().max())
    assert (active - expected).abs().max() <= TOLERANCE[dtype] * scale
    assert (active - plain).abs().max() > 10 * TOLERANCE[torch.float32] * scale
    assert torch.equal(module(x), plain)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_file_may_be_stored_in_another_type_than_the_model(tmp_path: Path, stored: torch.dtype) -> None:
    module, x = layer_of("linear", torch.float32), input_of("linear", torch.float32)
    delta = delta_of(tmp_path, "linear", dtype=stored)
    layer, _ = hooked(module, delta, strengths=(1.0, 0.0))
    layer.attach()
    assert torch.allclose(module(x), merge(module, delta, 1.0)(x), atol=1e-5)


@torch.no_grad()
def test_switched_off_is_bitwise_the_plain_module(tmp_path: Path) -> None:
    module, x = layer_of("linear", torch.float32), input_of("linear", torch.float32)
    plain = module(x)
    layer, _ = hooked(module, delta_of(tmp_path, "linear"))
    layer.attach()
    assert torch.equal(module(x), plain)
    switch(layer, (1.0, 0.0))
    assert not torch.equal(module(x), plain)
    switch(layer, (0.0, 0.0))
    assert torch.equal(module(x), plain)


@torch.no_grad()
def test_both_is_the_sum(tmp_path: Path) -> None:
    module, x = layer_of("conv3x3", torch.float32), input_of("conv3x3", torch.float32)
    deltas = [delta_of(tmp_path, "conv3x3", seed=seed) for seed in (1, 2)]
    layer, _ = hooked(module, *deltas, strengths=(0.5, 2.0))
    layer.attach()
    active = module(x)
    layer.detach()
    assert torch.allclose(active, merge(merge(module, deltas[0], 0.5), deltas[1], 2.0)(x), atol=1e-4)


@torch.no_grad()
def test_attaching_twice_acts_once(tmp_path: Path) -> None:
    module, x = layer_of("linear", torch.float32), input_of("linear", torch.float32)
    layer, _ = hooked(module, delta_of(tmp_path, "linear"), strengths=(1.0, 0.0))
    layer.attach()
    once = module(x)
    layer.attach()
    assert torch.equal(module(x), once)
    layer.detach()
    layer.detach()
    assert not module._forward_hooks


@torch.no_grad()
def test_rows_of_a_fused_module_are_addressed_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(16, 3 * 24), input_of("linear", torch.float32)
    delta = delta_of(tmp_path, "linear")
    expected = module(x)
    expected[..., 24:48] += 0.5 * x @ delta.matrix().T
    layer = HookedLayer(module, [Part((product_of(delta, Site(module, rows=(24, 48))), None), (0.5, 0.0))])
    layer.attach()
    assert torch.allclose(module(x), expected, atol=1e-5)
    with torch.enable_grad():
        watched = module(x.clone().requires_grad_())
    assert torch.allclose(watched, expected, atol=1e-5)


@torch.no_grad()
def test_switching_a_factor_pair_allocates_no_weights(tmp_path: Path) -> None:
    module, x = layer_of("linear", torch.bfloat16), input_of("linear", torch.bfloat16)
    layer, part = hooked(module, *(delta_of(tmp_path, "linear", seed=s) for s in (1, 2)), strengths=(1.0, 0.0))
    layer.attach()
    module(x)
    before = [weights_of(operand, x) for operand in part.operands]
    switch(layer, (0.0, 1.0))
    module(x)
    switch(layer, (1.0, 0.0))
    module(x)
    assert [weights_of(operand, x) for operand in part.operands] == before


@torch.no_grad()
def test_a_dense_delta_is_kept_only_while_it_acts(tmp_path: Path) -> None:
    module, x = layer_of("linear", torch.float32), input_of("linear", torch.float32)
    layer, part = hooked(module, delta_of(tmp_path, "linear", "loha"), strengths=(1.0, 0.0))
    layer.attach()
    module(x)
    assert places(part.operands[0])
    switch(layer, (0.0, 0.0))
    module(x)
    assert not places(part.operands[0])


def test_gradients_pass_through(tmp_path: Path) -> None:
    for kind in ("linear", "conv3x3"):
        module, x = layer_of(kind, torch.float32), input_of(kind, torch.float32).requires_grad_()
        delta = delta_of(tmp_path, kind)
        layer, _ = hooked(module, delta, strengths=(1.0, 0.0))
        layer.attach()
        module(x).square().sum().backward()
        layer.detach()
        seen, x.grad = x.grad, None
        merge(module, delta, 1.0)(x).square().sum().backward()
        assert torch.allclose(seen, x.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_batched_and_split_guidance_agree(tmp_path: Path) -> None:
    module, x = layer_of("linear", torch.float32), input_of("linear", torch.float32)
    layer, _ = hooked(module, delta_of(tmp_path, "linear"), strengths=(1.0, 0.0))
    layer.attach()
    assert torch.allclose(module(x), torch.cat([module(x[:1]), module(x[1:])]), atol=1e-6)


@torch.no_grad()
def test_an_input_that_is_not_contiguous_or_passed_by_name_works(tmp_path: Path) -> None:
    module, x = layer_of("linear", torch.float32), torch.randn(16, 5, 2).permute(2, 1, 0)
    delta = delta_of(tmp_path, "linear")
    layer, _ = hooked(module, delta, strengths=(1.0, 0.0))
    layer.attach()
    assert torch.allclose(module(input=x), merge(module, delta, 1.0)(x), atol=1e-5)


@torch.no_grad()
def test_autocast_works(tmp_path: Path) -> None:
    module, x = layer_of("linear", torch.float32), input_of("linear", torch.float32)
    delta = delta_of(tmp_path, "linear")
    layer, _ = hooked(module, delta, strengths=(1.0, 0.0))
    layer.attach()
    with torch.autocast("cpu", torch.bfloat16):
        active = module(x)
    assert active.dtype == torch.bfloat16
    assert torch.allclose(active.float(), merge(module, delta, 1.0)(x), atol=0.1)


@torch.no_grad()
def test_an_output_that_autocast_leaves_in_full_precision_stays_so(tmp_path: Path) -> None:
    x, y = input_of("linear", torch.float32), torch.zeros(2, 5, 24)
    delta = delta_of(tmp_path, "linear")
    operand = product_of(delta, Site(nn.Linear(16, 24)))
    with torch.autocast("cpu", torch.bfloat16):
        assert add(operand, x, y, 0.5) is y
    assert torch.allclose(y, 0.5 * x @ delta.matrix().T, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "family"), [("linear", "lora"), ("linear", "lokr"), ("linear", "full"), ("conv3x3", "lora")]
)
@torch.no_grad()
def test_an_input_may_be_of_another_type_than_the_output(tmp_path: Path, kind: str, family: str) -> None:
    module, x = layer_of(kind, torch.float32), input_of(kind, torch.float32)
    operand, plain = product_of(delta_of(tmp_path, kind, family), Site(module)), module(x)
    changed = add(operand, x.double(), plain.clone(), 0.5)
    assert changed.dtype == torch.float32
    assert torch.allclose(changed, add(operand, x, plain.clone(), 0.5), atol=1e-6)


@torch.no_grad()
def test_tiling_holds_for_the_delta_too(tmp_path: Path) -> None:
    module, x = layer_of("conv3x3", torch.float32), input_of("conv3x3", torch.float32)
    module.padding_mode = "circular"
    module._reversed_padding_repeated_twice = [1, 1, 1, 1]
    delta = delta_of(tmp_path, "conv3x3")
    layer, _ = hooked(module, delta, strengths=(1.0, 0.0))
    layer.attach()
    active = module(x)
    layer.detach()
    assert torch.allclose(active, merge(module, delta, 1.0)(x), atol=1e-4)


def test_a_dora_on_a_weight_that_cannot_be_read_says_so_before_any_forward(tmp_path: Path) -> None:
    module = nn.Linear(16, 24)
    packed = Site(module, weight=lambda: torch.zeros(192, 1, dtype=torch.uint8))
    with pytest.raises(MismatchError, match="unquantised"):
        product_of(delta_of(tmp_path, "linear", "dora"), packed)


def test_the_shape_of_a_module_comes_from_its_attributes() -> None:
    assert module_shape(nn.Linear(16, 24)) == (24, 16)
    assert module_shape(nn.Conv2d(16, 24, 1)) == (24, 16)
    assert module_shape(nn.Conv2d(16, 24, 3)) == (24, 16, 3, 3)
    assert Site(nn.Linear(16, 72), rows=(24, 48)).shape == (24, 16)


def test_the_weight_of_a_slice_is_its_rows() -> None:
    module = nn.Linear(4, 12)
    assert torch.equal(Site(module).base_weight(), module.weight)
    assert torch.equal(Site(module, rows=(4, 8)).base_weight(), module.weight[4:8])
    other = torch.randn(12, 4)
    assert torch.equal(Site(module, rows=(8, 12), weight=lambda: other).base_weight(), other[8:])
    assert Site(nn.Identity()).base_weight() is None


@pytest.mark.parametrize(
    ("kind", "family"),
    [(k, f) for k, (_, shape) in LAYERS.items() for f in FAMILIES if not f.endswith("-cp") or 3 in shape],
)
@torch.no_grad()
def test_at_some_tokens_it_adds_what_it_adds_everywhere(tmp_path: Path, kind: str, family: str) -> None:
    module, x = layer_of(kind, torch.float32), input_of(kind, torch.float32)
    operand = product_of(delta_of(tmp_path, kind, family, alpha=2.0), Site(module))
    plain = module(x)
    everywhere = add(operand, x, torch.zeros_like(plain), 0.7)
    take = torch.tensor([0, 3, 7])
    found = operand.at_tokens(x.half() if kind == "linear" else x, plain, take, 0.7)
    rows = everywhere.flatten(0, 1) if kind == "linear" else everywhere.permute(0, 2, 3, 1).flatten(0, 2)
    assert found.dtype == torch.float32
    assert torch.allclose(found, rows[take], atol=1e-3 if kind == "linear" else 1e-5)


@pytest.mark.parametrize("kind", ["conv1x1", "conv3x3", "strided"])
def test_a_convolution_that_autograd_watches_is_not_changed_in_place(tmp_path: Path, kind: str) -> None:
    module, x = layer_of(kind, torch.float32), input_of(kind, torch.float32).requires_grad_()
    layer, _ = hooked(module, delta_of(tmp_path, kind), strengths=(0.5, 0.0))
    kept: list[torch.Tensor] = []
    module.register_forward_hook(lambda _module, _args, output: kept.append(output) or None)
    layer.attach()
    active = module(x)
    layer.detach()
    with torch.no_grad():
        assert torch.allclose(kept[0], module(x), atol=1e-6)
        merged = merge(module, delta_of(tmp_path, kind), 0.5)
        assert torch.allclose(active, merged(x), atol=1e-5)
    (gradient,) = torch.autograd.grad(active.sum(), x)
    (expected,) = torch.autograd.grad(merged(x).sum(), x)
    assert torch.allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
def test_an_output_is_added_to_in_place_where_nobody_watches(tmp_path: Path, kind: str) -> None:
    module, x = layer_of(kind, torch.float32), input_of(kind, torch.float32)
    operand = product_of(delta_of(tmp_path, kind), Site(module))
    with torch.no_grad():
        y = module(x)
        assert add(operand, x, y, 1.0) is y
    # Gradients are on, and nothing asks for any.
    assert add(operand, x, y, 1.0) is y


def test_the_shape_of_a_weight_is_told_by_the_module() -> None:
    assert module_shape(nn.Linear(4, 6)) == (6, 4)
    assert module_shape(nn.Conv2d(8, 6, 3, groups=2)) == (6, 4, 3, 3)
    assert module_shape(nn.Conv2d(8, 6, 1)) == (6, 8)
    assert all(isinstance(size, int) for size in module_shape(nn.Conv2d(8, 6, 3, groups=2)))
    packed = nn.Module()
    packed.in_features, packed.out_features = 16, 4  # type: ignore[assignment]
    packed.weight = nn.Parameter(torch.zeros(32, 1))
    assert module_shape(packed) == (4, 16)
    assert module_shape(nn.Embedding(5, 7)) == (5, 7)


@torch.no_grad()
def test_a_kronecker_product_is_applied_without_being_formed(tmp_path: Path) -> None:
    module, x = layer_of("linear", torch.float32), input_of("linear", torch.float32)
    delta = delta_of(tmp_path, "linear", "lokr")
    expected = merge(module, delta, 0.7)(x)
    layer, part = hooked(module, delta, strengths=(0.7, 0.0))
    layer.attach()
    delta.matrix = lambda *_: pytest.fail("formed")  # type: ignore[method-assign]
    assert torch.allclose(module(x), expected, atol=1e-5)
    subject = part.operands[0]
    assert subject is not None
    plain, take = module.forward(x), torch.arange(3)
    rows = subject.at_tokens(x, plain, take, 0.7)
    assert torch.allclose(rows, (expected - plain).reshape(-1, plain.shape[-1])[take], atol=1e-5)


@torch.no_grad()
def test_a_dense_delta_for_which_there_is_no_room_acts_all_the_same(tmp_path: Path) -> None:
    module, x = layer_of("linear", torch.float32), input_of("linear", torch.float32)
    size = module.weight.nbytes
    for family, room, kept in (("loha", 2 * size, 2), ("full", 2 * size - 1, 1), ("dora", 0, 0)):
        shared = Room(room)
        deltas = [delta_of(tmp_path, "linear", family, seed=seed) for seed in (1, 2)]
        subject, style = (product_of(delta, Site(module), room=shared) for delta in deltas)
        part = Part((subject, style), (1.0, 0.5))
        layer = HookedLayer(module, [part])
        expected = module(x)
        for delta, strength in zip(deltas, (1.0, 0.5), strict=True):
            expected += merge(module, delta, strength)(x) - module(x)
        layer.attach()
        for _ in range(2):
            assert torch.allclose(module(x), expected, atol=1e-4)
        assert sum(bool(places(operand)) for operand in (subject, style)) == kept
        switch(layer, (0.0, 0.0))
        layer.detach()
        assert shared.free == room


@pytest.mark.parametrize("family", ["lora", "loha", "lokr", "dora"])
@pytest.mark.parametrize("tokens", [False, True])
def test_weights_follow_the_layer_to_its_device_and_type(tmp_path: Path, family: str, tokens: bool) -> None:
    module = nn.Linear(16, 24)
    operand = product_of(delta_of(tmp_path, "linear", family), Site(module))
    x, y = (torch.zeros(2, width, device="meta", dtype=torch.bfloat16) for width in (16, 24))
    if tokens:
        operand.at_tokens(x, y, torch.tensor([1]), 1.0)
    else:
        add(operand, x, y, 1.0)
    assert places(operand) == {(y.device, y.dtype)}
    chain = operand.source.kept(y.device, y.dtype)
    assert chain is not None
    assert {(weight.device, weight.dtype) for weight in chain.weights} == {(y.device, y.dtype)}


def test_only_a_dora_looks_at_the_weight_it_changes(tmp_path: Path) -> None:
    module, x = layer_of("linear", torch.float32), input_of("linear", torch.float32)
    site = Site(module, weight=lambda: pytest.fail("looked at"))
    for family in ("loha", "full"):
        delta = delta_of(tmp_path, "linear", family)
        y = add(product_of(delta, site), x, torch.zeros(2, 5, 24), 1.0)
        assert torch.allclose(y, x @ delta.matrix().T, atol=1e-5)


def test_all_the_room_that_a_dense_delta_took_is_given_back_once(tmp_path: Path) -> None:
    room = Room(6 * 24 * 16)
    operand = product_of(delta_of(tmp_path, "linear", "loha"), Site(nn.Linear(16, 24)), room=room)
    for dtype in (torch.float32, torch.bfloat16):
        operand.source.kept(torch.device("cpu"), dtype)
    assert room.free == 0
    for _ in range(2):
        operand.set_acting(False)
        assert room.free == 6 * 24 * 16


@pytest.mark.parametrize("kind", ["conv1x1", "conv3x3"])
def test_a_convolution_whose_weights_are_trained_is_not_changed_in_place_either(tmp_path: Path, kind: str) -> None:
    module, x = layer_of(kind, torch.float32), input_of(kind, torch.float32)
    y = module(x)
    before = y.detach().clone()
    changed = add(product_of(delta_of(tmp_path, kind), Site(module)), x, y, 1.0)
    assert torch.equal(y, before)
    assert not torch.equal(changed, before)


@torch.no_grad()
def test_an_output_that_is_not_contiguous_is_added_to_in_place_too(tmp_path: Path) -> None:
    x, delta = input_of("linear", torch.float32), delta_of(tmp_path, "linear")
    y = torch.zeros(24, 5, 2).permute(2, 1, 0)
    assert add(product_of(delta, Site(nn.Linear(16, 24))), x, y, 0.5) is y
    assert torch.allclose(y, 0.5 * x @ delta.matrix().T, atol=1e-5)


@torch.no_grad()
def test_factors_are_ready_before_they_act_and_a_dense_delta_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = layer_of("linear", torch.float32), input_of("linear", torch.float32)
    prepared, ready = [], Part.ready
    monkeypatch.setattr(Part, "ready", lambda part, *place: prepared.append(place) or ready(part, *place))
    acting = delta_of(tmp_path, "linear")
    for seed, (family, kept) in enumerate((("lora", 1), ("lokr", 1), ("loha", 0)), 1):
        layer, part = hooked(module, acting, delta_of(tmp_path, "linear", family, seed=seed))
        switch(layer, (1.0, 0.0))
        layer.attach()
        for _ in range(2):
            module(x)
        layer.detach()
        assert [len(places(operand)) for operand in part.operands if operand] == [1, kept]
    # Once for each layer, not for each forward.
    assert prepared == 3 * [(x.device, x.dtype)]


def factor_delta(shape: tuple[int, ...], rank: int, *, up: float = 1.0, down: float = 1.0, scale: float = 1.0) -> Delta:
    generator = torch.Generator().manual_seed(3)
    ups = up * torch.randn(shape[0], rank, generator=generator)
    downs = down * torch.randn(rank, *shape[1:], generator=generator)
    return FactorDelta("f", "k", rank, scale * rank, scale, shape, ups, downs)


def test_rows_at_one_side_of_a_fused_module_are_addressed_alone_with_gradients_too(tmp_path: Path) -> None:
    module, x = nn.Linear(16, 60), input_of("linear", torch.float32).requires_grad_()
    delta = delta_of(tmp_path, "linear")
    for rows in ((0, 24), (30, 54)):
        expected = module(x).detach()
        expected[..., slice(*rows)] += 0.5 * x.detach() @ delta.matrix().T
        layer = HookedLayer(module, [Part((product_of(delta, Site(module, rows)), None), (0.5, 0.0))])
        layer.attach()
        torch.testing.assert_close(module(x), expected)
        layer.detach()


CONVS = {
    "in groups": nn.Conv2d(8, 12, 3, padding=1, groups=4),
    "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "1×1 in groups": nn.Conv2d(8, 12, 1, groups=2, stride=2),
    "1-D": nn.Conv1d(8, 12, 3, padding=1),
    "3-D": nn.Conv3d(8, 12, (3, 1, 3), padding=(1, 0, 1)),
    "3-D in groups": nn.Conv3d(8, 12, 3, stride=2, groups=2),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("watched", [False, True], ids=["", "with gradients"])
def test_a_convolution_of_any_kind_gets_what_its_weight_would_get(name: str, watched: bool) -> None:
    module = copy.deepcopy(CONVS[name])
    shape = module_shape(module)
    delta, dims = factor_delta(shape, 3), len(module.kernel_size)
    x = torch.randn(2, module.in_channels, *dims * (7,), requires_grad=watched)
    layer, part = hooked(module, delta, strengths=(0.5, 0.0))
    plain = module(x).detach()
    layer.attach()
    with torch.set_grad_enabled(watched):
        fused = module(x)
    layer.detach()
    with torch.no_grad():
        module.weight += 0.5 * delta.matrix().reshape(module.weight.shape)
        expected = module(x)
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
        product, take = part.operands[0], torch.tensor([0, 3, 5])
        assert product is not None
        found = product.at_tokens(x, plain, take, 0.5)
        torch.testing.assert_close(found, product.picked(expected - plain, take), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1e5, 1e-5, 1.0), (1e-5, 3e4, 1.0), (200.0, 200.0, 1e-5), (2e-3, 1e-3, 4000.0)])
@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
@torch.no_grad()
def test_in_half_precision_what_is_finite_merged_is_finite_beside(kind: str, sizes: tuple[float, float, float]) -> None:
    if torch.float16 not in COMPUTED:
        pytest.skip("this torch computes no fp16 on the CPU")
    module, x = layer_of(kind, torch.float16), 8 * input_of(kind, torch.float16)
    up, down, scale = sizes
    delta = factor_delta(LAYERS[kind][1], 4, up=up, down=down, scale=scale)
    layer, _ = hooked(module, delta, strengths=(1.0, 0.0))
    expected = merge(module, delta, 1.0)(x)
    assert expected.isfinite().all()
    layer.attach()
    assert (module(x) - expected).abs().max() <= 4e-3 * expected.abs().max()


def test_factors_of_one_magnitude_are_the_files_own(tmp_path: Path) -> None:
    weights = Weights(delta_of(tmp_path, "linear", dtype=torch.float16))
    read = weights.read()
    assert weights.chain(torch.device("cpu"), torch.float16).weights == read
