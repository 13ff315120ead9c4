"""Selection by features: what it compares, on which rows, how long a decision holds, and what is noted of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from klora.engine.bypass import HookedLayer, Part
from klora.engine.dynamic import DISTANCES, BatchRows, Chooser, MeasuredPart, divergence, kl, subsample
from klora.engine.products import LinearProduct, product_of
from klora.engine.site import Site
from klora.engine.state import selection_of
from klora.lora.deltas.computed import FactorDelta
from klora.settings import Settings

seeds = st.integers(0, 2**31)
strengths = st.floats(-2, 2)
KINDS = ("linear", "conv1x1", "conv3x3")


def module_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(8, 12)
    return nn.Conv2d(8, 12, 1) if kind == "conv1x1" else nn.Conv2d(8, 12, 3, padding=1, stride=2)


def input_of(kind: str, seed: int, batch: int = 2) -> Tensor:
    shape = (batch, 7, 8) if kind == "linear" else (batch, 8, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def delta_of(kind: str, seed: int) -> FactorDelta:
    shape = (12, 8, 3, 3) if kind == "conv3x3" else (12, 8)
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(12, 2, generator=generator), torch.randn(2, *shape[1:], generator=generator)
    return FactorDelta("f", "k", 2, 1.0, 0.5, shape, up, down)


def measured(
    module: nn.Module, subject: FactorDelta, style: FactorDelta, s: tuple[float, float] = (1.0, 1.0), **settings: object
) -> tuple[HookedLayer, MeasuredPart]:
    site, chooser = Site(module), Chooser.of(Settings.parse({"policy": "dynamic", **settings}))
    part = MeasuredPart((product_of(subject, site), product_of(style, site)), s, chooser=chooser, name="m")
    return HookedLayer(module, [part]), part


def letter(module: nn.Module, x: Tensor, part_layer: tuple[HookedLayer, MeasuredPart]) -> str:
    layer, part = part_layer
    layer.attach()
    with torch.no_grad():
        module(x)
    layer.detach()
    return part.chooser.decisions["m"][-1][1]


def plain_divergence(kind: str, y: Tensor, y_lora: Tensor, distance: str) -> Tensor:
    """The definition, on all tokens."""
    if kind != "linear":
        y, y_lora = y.permute(0, 2, 3, 1), y_lora.permute(0, 2, 3, 1)
    if distance == "kl":
        p, q = (torch.log_softmax(t, -1) for t in (y, y_lora))
        return nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    if distance == "l2":
        return (y - y_lora).square().sum(-1).sqrt().mean()
    if distance == "dot":
        return -(y * y_lora).sum(-1).mean()
    return (1 - torch.cosine_similarity(y, y_lora, -1)).mean()


@given(st.sampled_from(KINDS), st.sampled_from(sorted(DISTANCES)), seeds, strengths, strengths)
@torch.no_grad()
def test_the_lora_that_diverges_more_acts_alone(kind: str, distance: str, seed: int, s_c: float, s_s: float) -> None:
    module, x = module_of(kind), input_of(kind, seed)
    subject, style = delta_of(kind, seed), delta_of(kind, seed + 1)
    y, outputs = module(x), []
    for delta, strength in ((subject, s_c), (style, s_s)):
        layer = HookedLayer(module, [Part((product_of(delta, Site(module)), None), (strength, 0.0))])
        layer.attach()
        outputs.append(module(x))
        layer.detach()
    D_c, D_s = (plain_divergence(kind, y, out, distance) for out in outputs)
    if abs(D_c - D_s) < 1e-4 * max(1, abs(D_c)):
        return
    layer, part = measured(module, subject, style, (s_c, s_s), distance=distance)
    layer.attach()
    active = module(x)
    layer.detach()
    assert part.chooser.decisions["m"] == [(0.0, "c" if D_c >= D_s else "s")]
    assert torch.equal(active, outputs[0] if D_c >= D_s else outputs[1])


@given(st.sampled_from(KINDS), st.sampled_from(sorted(DISTANCES)), seeds)
def test_a_tie_goes_to_the_subject(kind: str, distance: str, seed: int) -> None:
    module, delta = module_of(kind), delta_of(kind, seed)
    assert letter(module, input_of(kind, seed), measured(module, delta, delta, distance=distance)) == "c"


@given(st.sampled_from(sorted(DISTANCES)), seeds)
def test_swapping_roles_mirrors(distance: str, seed: int) -> None:
    module, x = module_of("linear"), input_of("linear", seed)
    a, b = delta_of("linear", seed), delta_of("linear", seed + 1)
    found = [letter(module, x, measured(module, *pair, distance=distance)) for pair in ((a, b), (b, a), (a, b))]
    assert found[0] != found[1]
    assert found[0] == found[2]


@given(seeds)
def test_a_strength_of_0_never_wins_and_a_larger_one_can(seed: int) -> None:
    module, x = module_of("linear"), input_of("linear", seed)
    pair = delta_of("linear", seed), delta_of("linear", seed + 1)
    assert letter(module, x, measured(module, *pair, (0.0, 0.1))) == "s"
    assert letter(module, x, measured(module, *pair, (0.1, 0.0))) == "c"


@given(seeds)
def test_only_conditional_rows_decide(seed: int) -> None:
    module, x = module_of("linear"), input_of("linear", seed)
    pair = delta_of("linear", seed), delta_of("linear", seed + 1)
    alone = [letter(module, x[i : i + 1], measured(module, *pair)) for i in (0, 1)]
    for i, rows in ((0, BatchRows(0, 1, 2)), (1, BatchRows(1, 2, 2))):
        layer = measured(module, *pair)
        layer[1].chooser.rows = rows
        assert letter(module, x, layer) == alone[i]


@given(seeds)
@torch.no_grad()
def test_batched_and_split_guidance_agree_whichever_half_comes_first(seed: int) -> None:
    module, x = module_of("linear"), input_of("linear", seed)
    pair = delta_of("linear", seed), delta_of("linear", seed + 1)
    batched = measured(module, *pair)
    batched[1].chooser.rows = BatchRows(1, 2, 2)
    expected = letter(module, x, batched)
    for order in ((1, 0), (0, 1)):
        layer, part = measured(module, *pair)
        layer.attach()
        for step in range(3):
            part.chooser.at(step / 3, step)
            for half in order:
                part.chooser.rows = BatchRows(0, half, 1)
                module(x[half : half + 1])
        layer.detach()
        assert part.chooser.decisions["m"] == [(step / 3, expected) for step in range(3)]


@given(seeds)
@torch.no_grad()
def test_an_unconditional_call_takes_what_was_decided_before(seed: int) -> None:
    module, x = module_of("linear"), input_of("linear", seed)
    pair = delta_of("linear", seed), delta_of("linear", seed + 1)
    layer, part = measured(module, *pair)
    layer.attach()
    part.chooser.rows = BatchRows(0, 1, 1)
    module(x[1:])
    before = part._choice
    part.chooser.at(0.5, 1)
    part.chooser.rows = BatchRows(0, 0, 1)
    module(x[:1])
    assert part._choice is before
    layer.detach()


@given(st.integers(1, 6), st.integers(1, 20))
@torch.no_grad()
def test_a_decision_holds_for_as_many_steps_as_wished(reuse: int, steps: int) -> None:
    module = module_of("linear")
    layer, part = measured(module, delta_of("linear", 1), delta_of("linear", 2), reuse=reuse)
    layer.attach()
    made = []
    for step in range(steps):
        part.chooser.at(step / steps, step)
        for _ in range(2):
            module(input_of("linear", step))
            made.append(part._choice.step)
    layer.detach()
    assert made[::2] == made[1::2] == [step // reuse * reuse for step in range(steps)]


@torch.no_grad()
def test_a_sampler_that_goes_back_decides_anew() -> None:
    module = module_of("linear")
    layer, part = measured(module, delta_of("linear", 1), delta_of("linear", 2), reuse=4)
    layer.attach()
    made = []
    for step in (3, 5, 2, 4, 1):
        part.chooser.at(step / 8, step)
        module(input_of("linear", step))
        made.append(part._choice.step)
    layer.detach()
    assert made == [3, 3, 2, 2, 1]


@torch.no_grad()
def test_a_new_pass_decides_anew() -> None:
    module = module_of("linear")
    layer, part = measured(module, delta_of("linear", 1), delta_of("linear", 2))
    layer.attach()
    module(input_of("linear", 0))
    before = part._choice
    part.chooser.begin()
    assert not part.chooser.decisions
    module(input_of("linear", 0))
    layer.detach()
    assert part._choice is not before
    assert part._choice.subject == before.subject


@torch.no_grad()
def test_rows_of_a_fused_module_are_compared_alone() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(8, 36), input_of("linear", 0)
    subject, style = delta_of("linear", 1), delta_of("linear", 2)
    slice_ = nn.Linear(8, 12)
    slice_.weight, slice_.bias = nn.Parameter(module.weight[12:24]), nn.Parameter(module.bias[12:24])
    expected = letter(slice_, x, measured(slice_, subject, style))
    site = Site(module, rows=(12, 24))
    part = MeasuredPart(
        (product_of(subject, site), product_of(style, site)), (1.0, 1.0), chooser=Chooser.of(Settings()), name="m"
    )
    plain = module(x)
    layer = HookedLayer(module, [part])
    assert letter(module, x, (layer, part)) == expected
    layer.attach()
    active = module(x)
    layer.detach()
    assert torch.equal(active[..., :12], plain[..., :12])
    assert torch.equal(active[..., 24:], plain[..., 24:])
    assert not torch.equal(active, plain)
    assert torch.equal(module(x), plain)


@given(st.integers(1, 5000), st.integers(1, 300))
def test_a_subsample_is_spread_evenly_and_always_the_same(count: int, limit: int) -> None:
    taken = subsample(count, limit)
    assert len(taken) == min(count, limit)
    assert torch.equal(taken, subsample(count, limit))
    assert int(taken.max()) < count
    assert len(set(taken.tolist())) == len(taken)
    gaps = taken.diff()
    assert not gaps.numel() or int(gaps.max()) - int(gaps.min()) <= 1
    assert subsample(count, limit, torch.device("meta")).is_meta


@given(st.integers(1, 200), seeds)
def test_kl_is_never_negative_and_zero_for_the_same(tokens: int, seed: int) -> None:
    y = 5 * torch.randn(tokens, 9, generator=torch.Generator().manual_seed(seed))
    assert float(divergence(kl, y, torch.zeros_like(y))) == 0
    assert float(divergence(kl, y, y.flip(0))) >= -1e-6
    # A shift that is the same in all channels is none: softmax does not see it.
    assert float(divergence(kl, y, torch.full_like(y, 3.0))) == pytest.approx(0, abs=1e-5)


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 4), st.integers(1, 3))
def test_rows_are_found_in_multiples_of_the_batch(before: int, inside: int, after: int, factor: int) -> None:
    whole = before + inside + after
    rows = BatchRows(before, before + inside, whole)
    found = rows.within(whole * factor)
    if inside:
        assert (found.start, found.stop) == (before * factor, (before + inside) * factor)
    else:
        assert not rows
        assert found == slice(0, whole * factor)


@given(st.lists(st.tuples(st.integers(0, 11), st.sampled_from("cs")), min_size=1, unique_by=lambda entry: entry[0]))
def test_decisions_become_one_letter_per_step(found: list) -> None:
    by_step = dict(found)
    letters = selection_of([(step / 12, found_letter) for step, found_letter in found], 12)
    assert len(letters) == 12
    first = min(by_step)
    for step in range(12):
        at = max((s for s in by_step if s <= step), default=first)
        assert letters[step] == by_step[at]


def test_the_distances_are_what_their_names_say() -> None:
    y, moved = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, -2.0]])
    p, q = y.softmax(-1), moved.softmax(-1)
    expected = {
        "kl": (p * (p / q).log()).sum(-1).tolist(),
        "l2": [2**0.5, 5**0.5],
        "dot": [-24.0, 0.0],
        "cos": [1 - 24 / 25, 1.0],
    }
    assert {name: distance(y, moved).tolist() for name, distance in DISTANCES.items()} == {
        name: pytest.approx(values, abs=1e-6) for name, values in expected.items()
    }


def test_tokens_of_a_map_are_its_places_row_by_row_and_picture_by_picture() -> None:
    y = torch.randn(2, 3, 4, 5)
    take = torch.tensor([0, 7, 19, 20, 39])
    conv = nn.Conv2d(2, 3, 1)
    assert torch.equal(
        product_of(delta_of("conv1x1", 1), Site(conv)).picked(y, take), y.permute(0, 2, 3, 1).reshape(-1, 3)[take]
    )


def test_a_distance_is_one_number_for_each_token() -> None:
    y, moved = torch.randn(3, 2), torch.randn(3, 2)
    for distance in DISTANCES.values():
        each = torch.stack([distance(y[i : i + 1], moved[i : i + 1])[0] for i in range(3)])
        assert torch.allclose(distance(y, moved), each)


@torch.no_grad()
def test_where_neither_has_a_strength_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = module_of("linear"), input_of("linear", 0)
    layer, _ = measured(module, delta_of("linear", 1), delta_of("linear", 2), (0.0, 0.0))
    plain = module(x)
    monkeypatch.setattr(LinearProduct, "adder", lambda *_: pytest.fail("added"))
    layer.attach()
    assert torch.equal(module(x), plain)
    layer.detach()


def test_a_choice_needs_two_loras() -> None:
    module = module_of("linear")
    x, alone, chooser = input_of("linear", 0), product_of(delta_of("linear", 1), Site(module)), Chooser.of(Settings())
    for operands in ((alone, None), (None, alone)):
        with pytest.raises(ValueError, match="two"):
            MeasuredPart(operands, (1.0, 1.0), chooser=chooser, name="m").adders(x.device, x.dtype)


def test_every_pass_is_told_from_all_before_it() -> None:
    chooser = Chooser.of(Settings(policy="dynamic"))
    seen = set()
    for _ in range(4):
        seen.add(chooser.sampling)
        chooser.begin()
    assert len(seen | {chooser.sampling}) == 5


@torch.no_grad()
def test_calls_of_one_step_share_one_decision() -> None:
    module = module_of("linear")
    layer, part = measured(module, delta_of("linear", 1), delta_of("linear", 2))
    layer.attach()
    for step in (0, 1):
        part.chooser.at(step / 2, step)
        module(input_of("linear", step))
        first = part._choice
        module(input_of("linear", step + 7))
        assert part._choice is first
    layer.detach()
