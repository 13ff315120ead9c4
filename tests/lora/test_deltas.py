"""Every family gives the ΔW of its formula, whole, by rows and by parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from klora.errors import LoraValueError, MismatchError, UnsupportedFormatError
from klora.lora.deltas import Delta
from klora.lora.deltas.base import all_finite
from klora.lora.deltas.computed import FactorDelta, ProjectedDelta, low_rank
from klora.lora.file import LoraFile
from tests.support.lora_files import FAMILIES, write_lora

LINEAR, CONV = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"
POINT = "mid_block.attentions.0.proj_in"
SHAPES = {LINEAR: (24, 16), CONV: (24, 8, 3, 3), POINT: (16, 24, 1, 1)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
ALPHA, RANK = 2.0, 4


def truth(t: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """ΔW without its scale, from one module's tensors, straight from the formulas."""
    if "diff" in t:
        return t["diff"]
    if "lora_mid.weight" in t:
        up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"].flatten(1)
        return torch.einsum("om,mnkl,ni->oikl", up, t["lora_mid.weight"], down)
    if "lora_up.weight" in t:
        return (t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)).reshape(shape)
    if "hada_t1" in t:
        halves = [
            torch.einsum("mo,mnkl,ni->oikl", t[f"hada_w{i}_a"], t[f"hada_t{i}"], t[f"hada_w{i}_b"]) for i in (1, 2)
        ]
        return halves[0] * halves[1]
    if "hada_w1_a" in t:
        return ((t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])).reshape(shape)
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = torch.einsum("mo,mnkl,ni->oikl", t["lokr_w2_a"], t["lokr_t2"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    if w2.ndim == 4:
        w1 = w1[:, :, None, None]
    return torch.kron(w1.contiguous(), w2.contiguous()).reshape(shape)


def tensors_of(path: Path, name: str) -> dict[str, Tensor]:
    prefix = "lora_unet_" + name.replace(".", "_") + "."
    loaded = load_file(path)
    return {key.removeprefix(prefix): t.float() for key, t in loaded.items() if key.startswith(prefix)}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scale_of(family: str) -> float:
    return 1.0 if family in ("full", "lokr-full") else ALPHA / RANK


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_is_the_formula_in_every_family_and_dtype(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    path = write_lora(tmp_path / "x.safetensors", SHAPES, family=family, rank=RANK, alpha=ALPHA, dtype=dtype)
    file = LoraFile.open(path)
    assert file.unmatched == []
    for name, shape in SHAPES.items():
        delta = file.modules[name]
        assert delta.shape == (shape if shape[2:] == (3, 3) else shape[:2])
        assert delta.family == family.split("-")[0]
        assert (delta.file, delta.key) == (str(path), "lora_unet_" + name.replace(".", "_"))
        assert delta.scale == pytest.approx(scale_of(family))
        expected = scale_of(family) * truth(tensors_of(path, name), shape).reshape(delta.shape)
        direction = delta.rows(0, shape[0]).view(delta.shape)
        assert direction.dtype == torch.float32
        torch.testing.assert_close(direction, expected, rtol=1e-5, atol=1e-5)
        if not delta.needs_base:
            torch.testing.assert_close(delta.matrix(), expected, rtol=1e-5, atol=1e-5)
        delta.check_finite()


def test_the_rank_is_the_files_dim_and_min_64_where_there_is_none(tmp_path: Path, family: str) -> None:
    path = write_lora(tmp_path / "x.safetensors", {LINEAR: (160, 96), CONV: (96, 80, 3, 3)}, family=family, rank=6)
    for delta in LoraFile.open(path).modules.values():
        assert delta.rank == (64 if family in ("full", "lokr-full") else 6)
        assert delta.scale == 1.0
        assert delta.alpha == delta.rank


@given(data=st.data(), family=st.sampled_from(FAMILIES), name=st.sampled_from(list(SHAPES)))
@settings(max_examples=60)
def test_rows_of_any_part_are_the_rows_of_the_matrix(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, family: str, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"rows-{family}.safetensors"
    if not path.exists():
        write_lora(path, SHAPES, family=family, rank=RANK, alpha=ALPHA)
    delta: Delta = LoraFile.open(path).modules[name]
    whole = delta.rows(0, delta.shape[0])
    first, last = sorted(data.draw(st.lists(st.integers(0, delta.shape[0]), min_size=2, max_size=2, unique=True)))
    if not (family == "dora-in" and last - first < delta.shape[0]):
        part = delta.part(first, last)
        assert part.shape == (last - first, *delta.shape[1:])
        torch.testing.assert_close(part.rows(0, last - first), whole[first:last])
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, last - first)] * 2)))
        torch.testing.assert_close(part.rows(start, stop), whole[first + start : first + stop])
        if start < stop:
            torch.testing.assert_close(part.part(start, stop).rows(0, stop - start), part.rows(start, stop))
    buffer = torch.full((delta.shape[0] * delta.columns + 5,), torch.nan)
    rows = delta.rows(first, last, out=buffer)
    torch.testing.assert_close(rows, whole[first:last])
    assert rows.data_ptr() == buffer.data_ptr()
    assert buffer[rows.numel() :].isnan().all()


def of_tensors(path: Path, name: str, tensors: dict[str, Tensor]) -> Delta:
    prefix = "lora_unet_" + name.replace(".", "_")
    save_file({f"{prefix}.{slot}": tensor for slot, tensor in tensors.items()}, path)
    return LoraFile.open(path).modules[name]


@pytest.mark.parametrize("large", ["lokr_w1", "lokr_w2"])
def test_rows_of_a_large_lokr_form_no_more_than_is_asked_for(tmp_path: Path, large: str) -> None:
    left, right = torch.randn(2**13, 1), torch.randn(1, 2**13)
    small = "lokr_w2" if large == "lokr_w1" else "lokr_w1"
    factors = {f"{large}_a": left, f"{large}_b": right, small: torch.ones(1, 1)}
    delta = of_tensors(tmp_path / "x.safetensors", LINEAR, factors)
    with torch.profiler.profile(profile_memory=True) as profile:
        rows = delta.rows(5000, 5003)
    torch.testing.assert_close(rows, left[5000:5003] @ right)
    assert max(event.cpu_memory_usage for event in profile.events()) < 2**20


@pytest.mark.parametrize("first", ["whole", "pair"])
@pytest.mark.parametrize("second", ["whole", "pair"])
def test_lokr_factors_may_have_any_sides(tmp_path: Path, first: str, second: str) -> None:
    pairs = {"lokr_w1": (torch.randn(2, 3), torch.randn(3, 5)), "lokr_w2": (torch.randn(7, 3), torch.randn(3, 4))}
    tensors = {}
    for (slot, (a, b)), form in zip(pairs.items(), (first, second), strict=True):
        tensors |= {slot: a @ b} if form == "whole" else {f"{slot}_a": a, f"{slot}_b": b}
    delta = of_tensors(tmp_path / "x.safetensors", LINEAR, tensors)
    w1, w2 = (a @ b for a, b in pairs.values())
    assert delta.shape == (14, 20)
    torch.testing.assert_close(delta.matrix(), torch.kron(w1, w2))
    assert delta.rank == (14 if first == second == "whole" else 3)
    factors = delta.kronecker()
    assert factors is not None
    torch.testing.assert_close(factors[0], w1)


def test_a_kernel_stored_flat_is_the_modules_where_the_columns_allow_it(tmp_path: Path) -> None:
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5 * 9)
    delta = of_tensors(tmp_path / "lokr.safetensors", CONV, {"lokr_w1": w1, "lokr_w2": w2})
    assert delta.shape == (8, 15, 3, 3)
    torch.testing.assert_close(delta.matrix(), torch.kron(w1[:, :, None, None], w2.view(4, 5, 3, 3)))
    halves = [torch.randn(2, 8, 2), torch.randn(2, 2, 12)]
    tensors = {f"hada_w{i + 1}_{part}": half[i] for part, half in zip("ab", halves, strict=True) for i in (0, 1)}
    delta = of_tensors(tmp_path / "loha.safetensors", CONV, tensors)
    assert delta.shape == (8, 12)
    torch.testing.assert_close(delta.matrix(), (halves[0] @ halves[1]).prod(dim=0))


@pytest.mark.parametrize("family", ["lokr", "lokr-ab", "lokr-full", "lokr-cp"])
def test_a_whole_linear_product_and_nothing_else_shows_its_kronecker_factors(tmp_path: Path, family: str) -> None:
    path = write_lora(tmp_path / "x.safetensors", SHAPES, family=family, rank=RANK)
    for name in SHAPES:
        delta = LoraFile.open(path).modules[name]
        factors = delta.kronecker()
        assert (factors is not None) == (name == LINEAR or (name == POINT and family != "lokr-cp"))
        if factors is not None:
            first, *second = factors
            inner = second[0] if len(second) == 1 else second[1] @ second[0]
            torch.testing.assert_close(delta.scale * torch.kron(first, inner).float(), delta.matrix())
        assert delta.part(0, delta.shape[0] - 1).kronecker() is None


def test_impossible_rows_are_an_index_error(tmp_path: Path) -> None:
    delta = LoraFile.open(write_lora(tmp_path / "x.safetensors", {LINEAR: (8, 8)})).modules[LINEAR]
    for start, stop in ((-1, 2), (0, 9), (5, 4)):
        with pytest.raises(IndexError):
            delta.rows(start, stop)
        with pytest.raises(IndexError):
            delta.part(start, stop)
    with pytest.raises(IndexError):
        delta.part(4, 4)
    assert delta.rows(4, 4).shape == (0, 8)
    assert delta.rows(8, 8).shape == (0, 8)


@pytest.mark.parametrize("kernel", [(3, 1), (1, 3)])
def test_a_kernel_of_one_row_or_column_stays_a_kernel(tmp_path: Path, kernel: tuple[int, int]) -> None:
    up, down = torch.randn(8, 2, 1, 1), torch.randn(2, 4, *kernel)
    delta = of_tensors(tmp_path / "x.safetensors", CONV, {"lora_up.weight": up, "lora_down.weight": down})
    assert delta.shape == (8, 4, *kernel)
    torch.testing.assert_close(delta.matrix(), torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down))


def test_what_a_policy_makes_is_read_by_rows_and_parts_like_what_files_hold(tmp_path: Path) -> None:
    source = LoraFile.open(write_lora(tmp_path / "x.safetensors", SHAPES, alpha=ALPHA)).modules[CONV]
    up, down = torch.randn(24, 3), torch.randn(3, 8, 3, 3)
    made = FactorDelta.like(source, up, down.flatten(1), -0.5)
    assert (made.file, made.key, made.rank, made.alpha, made.scale) == (source.file, source.key, 3, -1.5, -0.5)
    assert all(map(torch.equal, low_rank(made) or (), (up, down.flatten(1))))
    torch.testing.assert_close(made.matrix(), -0.5 * torch.einsum("or,rikl->oikl", up, down))
    common = (source.file, source.key, source.rank, source.alpha, source.scale, source.shape)
    projected = ProjectedDelta(*common, source=source, basis=torch.eye(72)[:, :5], fraction=0.25)
    kept = torch.cat([torch.full((5,), 0.75), torch.ones(67)])
    torch.testing.assert_close(projected.matrix().flatten(1), source.matrix().flatten(1) * kept)
    for delta in (made, projected):
        whole, buffer = delta.rows(0, 24), torch.full((24 * 72,), torch.nan)
        torch.testing.assert_close(delta.rows(5, 9, out=buffer), whole[5:9])
        part = delta.part(7, 19)
        assert part.shape == (12, 8, 3, 3)
        torch.testing.assert_close(part.rows(2, 5), whole[9:12])


def test_the_whole_of_a_delta_is_itself(tmp_path: Path, family: str) -> None:
    for delta in LoraFile.open(write_lora(tmp_path / "x.safetensors", SHAPES, family=family)).modules.values():
        assert delta.part(0, delta.shape[0]) is delta


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_are_unscaled_in_the_files_dtype_and_fp32_for_fp8(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_lora(tmp_path / "x.safetensors", SHAPES, family="lora-cp", rank=RANK, alpha=ALPHA, dtype=dtype)
    for name, delta in LoraFile.open(path).modules.items():
        factors = delta.factors()
        assert (factors is None) == (name == POINT), "a 1×1 core is applied as a matrix"
        if factors is None:
            continue
        stored = tensors_of(path, name)
        assert factors.up.dtype == (dtype if dtype.itemsize > 1 else torch.float32)
        torch.testing.assert_close(factors.up.float(), stored["lora_up.weight"].flatten(1))
        assert factors.up.shape == (SHAPES[name][0], RANK)
        assert factors.down.shape == (RANK, SHAPES[name][1])
        assert (factors.mid is not None) == (name == CONV)


def test_a_kernel_stays_in_down_and_families_without_factors_say_so(tmp_path: Path, family: str) -> None:
    path = write_lora(tmp_path / "x.safetensors", SHAPES, family=family, rank=RANK)
    factors = LoraFile.open(path).modules[CONV].factors()
    assert (factors is not None) == (family in ("lora", "lora-cp"))
    if factors and factors.mid is None:
        assert factors.down.shape == (RANK, 8, 3, 3)


def test_slices_of_a_fused_weight_share_one_down(tmp_path: Path) -> None:
    shapes = {f"single_transformer_blocks.0.{leaf}": (12, 12) for leaf in ("attn.to_q", "attn.to_k", "attn.to_v")}
    shapes["single_transformer_blocks.0.proj_mlp"] = (48, 12)
    file = LoraFile.open(write_lora(tmp_path / "x.safetensors", shapes, spelling="flux-kohya", alpha=1.0))
    assert {name: delta.shape for name, delta in file.modules.items()} == shapes
    assert {delta.key for delta in file.modules.values()} == {"lora_unet_single_blocks_0_linear1"}
    downs = [factors.down for delta in file.modules.values() if (factors := delta.factors())]
    assert len(downs) == 4
    assert all(down is downs[0] for down in downs)
    stored = load_file(tmp_path / "x.safetensors")
    up, down = (stored[f"lora_unet_single_blocks_0_linear1.lora_{x}.weight"].float() for x in ("up", "down"))
    together = torch.cat([file.modules[name].matrix() for name in shapes])
    torch.testing.assert_close(together, up @ down / 4, rtol=1e-4, atol=1e-5)


# --- DoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("family", ["dora", "dora-in"])
def test_dora_rescales_the_changed_weight_to_its_magnitude(tmp_path: Path, family: str, name: str) -> None:
    path = write_lora(tmp_path / "x.safetensors", SHAPES, family=family, rank=RANK, alpha=ALPHA)
    delta = LoraFile.open(path).modules[name]
    base = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(3))
    merged = base.reshape(delta.shape) + delta.matrix(base.half().float())
    dims = tuple(dim for dim in range(merged.ndim) if dim != (1 if family == "dora-in" else 0))
    magnitude = tensors_of(path, name)["dora_scale"].flatten()
    torch.testing.assert_close(torch.linalg.vector_norm(merged, dim=dims), magnitude, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="weight it is applied to"):
        delta.matrix()
    with pytest.raises(MismatchError, match=r"24|16"):
        delta.matrix(torch.zeros(5, 5))


@pytest.mark.parametrize(("family", "by_column"), [("dora", False), ("dora-in", True)])
def test_on_a_square_weight_the_shape_of_a_magnitude_says_what_it_belongs_to(
    tmp_path: Path, family: str, by_column: bool
) -> None:
    path = write_lora(tmp_path / "x.safetensors", {LINEAR: (16, 16)}, family=family, rank=RANK)
    base = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    merged = base + LoraFile.open(path).modules[LINEAR].matrix(base)
    magnitude = tensors_of(path, LINEAR)["dora_scale"].flatten()
    torch.testing.assert_close(merged.norm(dim=0 if by_column else 1), magnitude)


def test_peft_magnitudes_belong_to_outputs_whatever_their_shape(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x.safetensors", {LINEAR: (16, 16)}, "peft", family="dora", rank=RANK)
    tensors = load_file(path)
    key = next(key for key in tensors if "magnitude" in key)
    base = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    whole = LoraFile.open(path).modules[LINEAR].matrix(base)
    save_file({**tensors, key: tensors[key].clone().view(1, 16, 1, 1)}, tmp_path / "y.safetensors")
    torch.testing.assert_close(LoraFile.open(tmp_path / "y.safetensors").modules[LINEAR].matrix(base), whole)


def test_dora_is_what_peft_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in = torch.nn.Conv2d(4, 6, 3)
            self.mid_block = torch.nn.ModuleDict({"x": torch.nn.Linear(2, 2)})
            self.time_embedding = torch.nn.ModuleDict({"linear_1": torch.nn.Linear(16, 24)})

    torch.manual_seed(0)
    targets = ["conv_in", "linear_1"]
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=targets, init_lora_weights=False)
    model = Block()
    bases = {"conv_in": model.conv_in.weight.clone(), "linear": model.time_embedding["linear_1"].weight.clone()}
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if "lora_magnitude" in key:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    state = {key: value.contiguous() for key, value in peft.get_peft_model_state_dict(tuned).items()}
    state |= {f"{key.rsplit('.lora_', 1)[0]}.alpha": torch.tensor(6.0) for key in state}
    save_file(state, tmp_path / "x.safetensors")
    file = LoraFile.open(tmp_path / "x.safetensors")
    merged = tuned.merge_and_unload()
    for name, key, after in (
        ("conv_in", "conv_in", merged.conv_in.weight),
        ("time_embedding.linear_1", "linear", merged.time_embedding["linear_1"].weight),
    ):
        delta = file.modules[name]
        assert (delta.family, delta.scale) == ("dora", 1.5)
        torch.testing.assert_close(delta.matrix(bases[key]), (after - bases[key]).detach(), rtol=1e-4, atol=1e-5)


FUSED = {f"transformer_blocks.0.attn.to_{part}": (12, 12) for part in "qkv"}


def test_a_fused_dora_splits_by_rows_but_not_by_columns(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "rows.safetensors", FUSED, "flux-kohya", "dora", alpha=2.0)
    file = LoraFile.open(path)
    stored = {key.split(".", 1)[1]: tensor for key, tensor in load_file(path).items()}
    base = torch.randn(36, 12)
    changed = base + stored["lora_up.weight"] @ stored["lora_down.weight"] / 2
    whole = changed / changed.norm(dim=1, keepdim=True) * stored["dora_scale"] - base
    parts = [delta.matrix(base[12 * i : 12 * (i + 1)]) for i, delta in enumerate(file.modules.values())]
    torch.testing.assert_close(torch.cat(parts), whole)

    path = write_lora(tmp_path / "columns.safetensors", FUSED, "flux-kohya", "dora-in")
    with pytest.raises(UnsupportedFormatError, match=r"columns.safetensors: .*dora_scale"):
        LoraFile.open(path)


def test_dora_may_have_any_low_rank_direction(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x.safetensors", {LINEAR: (24, 16)}, family="loha", rank=RANK)
    prefix = "lora_unet_" + LINEAR.replace(".", "_")
    save_file({**load_file(path), f"{prefix}.dora_scale": torch.ones(24, 1)}, path)
    delta = LoraFile.open(path).modules[LINEAR]
    assert (delta.family, delta.rank, delta.factors()) == ("dora", RANK, None)
    base = torch.randn(24, 16)
    torch.testing.assert_close((base + delta.matrix(base)).norm(dim=1), torch.ones(24))


def test_a_magnitude_beside_a_full_difference_is_left(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x.safetensors", {LINEAR: (24, 16)}, family="full")
    key = "lora_unet_" + LINEAR.replace(".", "_") + ".dora_scale"
    save_file({**load_file(path), key: torch.ones(24, 1)}, path)
    file = LoraFile.open(path)
    assert (file.modules[LINEAR].family, file.unmatched) == ("full", [key])


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_found_with_their_key(tmp_path: Path, family: str, value: float) -> None:
    path = write_lora(tmp_path / "bad.safetensors", SHAPES, family=family)
    # Older safetensors map the file, which is written over below.
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    for key in [key for key in tensors if not key.endswith("alpha")]:
        damaged = {**tensors, key: tensors[key].clone()}
        damaged[key].view(-1)[-1] = value
        save_file(damaged, tmp_path / "bad.safetensors")
        file = LoraFile.open(path)  # opening does not look at values
        bad = []
        for delta in file.modules.values():
            try:
                delta.check_finite()
            except LoraValueError as error:
                bad.append(error)
        assert [error.key for error in bad] == [key]
        assert "bad.safetensors" in str(bad[0])


def test_nan_in_a_fused_weight_is_found_in_the_slice_that_has_it_under_the_files_key(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x.safetensors", FUSED, "flux-kohya")
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    up = next(key for key in tensors if "lora_up" in key)
    tensors[up][12] = torch.nan  # the first row of k
    save_file(tensors, path)
    q, k, v = LoraFile.open(path).modules.values()
    q.check_finite()
    v.check_finite()
    with pytest.raises(LoraValueError) as error:
        k.check_finite()
    assert error.value.key == up


def test_fp8_nan_is_found_too(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x.safetensors", {LINEAR: (8, 8)}, dtype=torch.float8_e4m3fn)
    tensors = load_file(path)
    key = next(iter(tensors))
    tensors[key].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, path)
    with pytest.raises(LoraValueError, match="NaN or infinity"):
        LoraFile.open(path).modules[LINEAR].check_finite()


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
@given(data=st.binary(min_size=8, max_size=64).filter(lambda data: len(data) % 8 == 0))
def test_finite_is_what_torch_says_it_is(dtype: torch.dtype, data: bytes) -> None:
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
    wider = tensor.float() if dtype.itemsize == 1 else tensor
    assert all_finite(tensor) == bool(wider.isfinite().all())
