"""Tensors beside the factors, and layers whose shape the file alone does not tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import klora
from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.site import Site
from klora.errors import LoraFileError, UnsupportedFormatError
from klora.lora.file import LoraFile
from klora.lora.model_index import ModelIndex
from klora.pair import Pair
from klora.settings import Settings
from tests.support.pipelines import PIPELINES

X = "diffusion_model.blocks.0.x"
CONV = "down_blocks.0.resnets.0.conv1"
DRAW = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW)


def lora(prefix: str = X, out: int = 8, columns: int = 8, rank: int = 2, **more: Tensor) -> dict[str, Tensor]:
    factors = {"lora_up.weight": draw(out, rank), "lora_down.weight": draw(rank, columns)}
    return {f"{prefix}.{ending}": tensor for ending, tensor in {**factors, **more}.items()}


def product(tensors: dict[str, Tensor], prefix: str = X) -> Tensor:
    return tensors[f"{prefix}.lora_up.weight"] @ tensors[f"{prefix}.lora_down.weight"]


def only(tensors: dict[str, Tensor]) -> LoraFile:
    return LoraFile.open(tensors)


def test_a_scale_stands_in_the_place_of_alpha_by_rank_and_a_scalar_comes_on_top() -> None:
    for more, factor in (({"scale": 0.5}, 0.5), ({"scalar": 3.0}, 3.0), ({"scale": 0.5, "alpha": 8.0}, 0.5)):
        tensors = lora(**{key: torch.tensor(value) for key, value in more.items()})
        delta = only(tensors).modules["blocks_0_x"]
        torch.testing.assert_close(delta.matrix(), product(tensors) * factor)


def test_ai_toolkits_magnitude_makes_a_dora() -> None:
    tensors, base = lora(magnitude=draw(8).abs()), draw(8, 8)
    delta = only(tensors).modules["blocks_0_x"]
    changed = base + product(tensors)
    wanted = tensors[f"{X}.magnitude"][:, None] * changed / changed.norm(dim=1, keepdim=True) - base
    torch.testing.assert_close(delta.matrix(base), wanted)


def test_a_dora_scale_of_one_row_is_by_output_where_only_that_fits() -> None:
    delta = only(lora(out=8, columns=6, dora_scale=torch.ones(1, 8))).modules["blocks_0_x"]
    assert not getattr(delta, "by_column")  # noqa: B009
    assert getattr(only(lora(dora_scale=torch.ones(1, 8))).modules["blocks_0_x"], "by_column")  # noqa: B009


@pytest.mark.parametrize("alpha", [torch.inf, 9999999999.0])
def test_an_alpha_without_meaning_does_not_matter(alpha: float) -> None:
    tensors = {f"{X}.lokr_w1": draw(2, 2), f"{X}.lokr_w2": draw(4, 4), f"{X}.alpha": torch.tensor(alpha).half()}
    delta = only(tensors).modules["blocks_0_x"]
    torch.testing.assert_close(delta.matrix(), torch.kron(tensors[f"{X}.lokr_w1"], tensors[f"{X}.lokr_w2"]))


def test_a_lora_of_rank_0_changes_nothing() -> None:
    delta = only(lora(rank=0)).modules["blocks_0_x"]
    assert (delta.family, delta.shape) == ("zero", (8, 8))
    assert not delta.matrix().any()


def test_a_sparse_difference_beside_is_refused() -> None:
    with pytest.raises(UnsupportedFormatError, match="sparse-difference"):
        only(lora(bias_values=draw(3)))


def test_a_bias_inside_is_refused_and_one_of_another_height_too() -> None:
    with pytest.raises(LoraFileError, match="between the two factors"):
        only({**lora(), f"{X}.lora_A.bias": draw(2)})
    with pytest.raises(LoraFileError, match="8 outputs"):
        only(lora(diff_b=draw(7)))


def test_what_is_unclear_beside_a_lora_is_named() -> None:
    file = only(lora(diff=draw(8, 8), set_weight=draw(8, 8), reshape_weight=torch.tensor([9, 9])))
    assert {key.rpartition(".")[2] for key in file.unmatched} == {"diff", "set_weight", "reshape_weight"}
    assert only(lora(reshape_weight=torch.tensor([8, 8]))).unmatched == []


@pytest.mark.parametrize("tensor", [torch.tensor(8), torch.ones(6), torch.ones(2, dtype=torch.bool)])
def test_what_is_no_shape_is_refused_where_one_should_be(tensor: Tensor) -> None:
    with pytest.raises(LoraFileError, match="should be a shape") as error:
        only(lora(reshape_weight=tensor))
    assert error.value.key == f"{X}.reshape_weight"


@pytest.mark.parametrize("first", [(2, 18), (2, 2), (2, 6)])
def test_the_area_of_a_flat_kernel_may_divide_either_factor_of_a_lokr(first: tuple[int, int]) -> None:
    prefix, second = f"lora_unet_{CONV.replace('.', '_')}", (4, 72 // first[1])
    tensors = {f"{prefix}.lokr_w1": draw(*first), f"{prefix}.lokr_w2": draw(*second)}
    wanted = torch.kron(*tensors.values()).view(8, 8, 3, 3)
    torch.testing.assert_close(only(tensors).modules[CONV].matrix(), wanted)


def test_a_flat_kernel_has_the_shape_of_the_layer_or_of_the_other_file(tmp_path: Path) -> None:
    flat, kernel = (
        lora(columns=36),
        {f"{X}.lora_up.weight": draw(8, 2, 1, 1), f"{X}.lora_down.weight": draw(2, 4, 3, 3)},
    )
    bound = only(flat).for_model(ModelIndex({"blocks.0.x": (8, 4, 3, 3)}))
    torch.testing.assert_close(bound.modules["blocks.0.x"].matrix(), product(flat).view(8, 4, 3, 3))
    for pair in ((flat, kernel), (kernel, flat)):
        opened = Pair.open(*pair, ScoreCache(tmp_path))
        assert {delta.shape for side in (opened.subject, opened.style) for delta in side.modules.values()} == {
            (8, 4, 3, 3)
        }


def test_a_layer_of_more_channels_gets_zeros_where_it_takes_the_latents_alone() -> None:
    file = only(lora("lora_unet_conv_in", columns=4) | lora("lora_unet_blocks_0_attn2_to_k", columns=4))
    wide = file.for_model(ModelIndex({"conv_in": (8, 9), "blocks.0.attn2.to_k": (8, 9)}))
    matrix = wide.modules["conv_in"].matrix()
    assert matrix.shape == (8, 9)
    assert matrix[:, :4].any()
    assert not matrix[:, 4:].any()
    assert wide.modules["blocks.0.attn2.to_k"].shape == (8, 4)


def test_a_flat_kernel_may_be_narrower_than_the_layer_too() -> None:
    tensors = lora("diffusion_model.x_embedder", columns=4 * 9) | lora("diffusion_model.y", columns=4 * 9)
    bound = only(tensors).for_model(ModelIndex({"x_embedder": (8, 9, 3, 3), "y": (8, 9, 3, 3)}))
    wanted = product(tensors, "diffusion_model.x_embedder").view(8, 4, 3, 3)
    torch.testing.assert_close(bound.modules["x_embedder"].matrix()[:, :4], wanted)
    assert not bound.modules["x_embedder"].matrix()[:, 4:].any()
    assert bound.modules["y"].shape == (8, 36)


def test_the_numbered_files_of_the_first_trainer_are_named_by_their_order() -> None:
    tensors, names = {}, []
    blocks = [f"down_blocks.{level}.attentions.{number}" for level in range(3) for number in range(2)]
    blocks += [f"up_blocks.{level}.attentions.{number}" for level in (1, 2, 3) for number in range(3)]
    attention = [f"attn1.to_{leaf}" for leaf in ("q", "k", "v", "out.0")]
    leaves = [*attention, "ff.net.0.proj", *(leaf.replace("attn1", "attn2") for leaf in attention)]
    names = [f"{block}.transformer_blocks.0.{leaf}" for block in (*blocks, "mid_block.attentions.0") for leaf in leaves]
    for number, name in enumerate(names):
        out, columns = (64, 8) if ".ff." in name else (8, 12) if name.endswith(("attn2.to_k", "attn2.to_v")) else (8, 8)
        tensors[f"unet:{number}:up"], tensors[f"unet:{number}:down"] = draw(out, 2), draw(2, columns)
    tensors["text_encoder:5:up"], tensors["text_encoder:5:down"] = draw(8, 2), draw(2, 8)
    file = only(tensors)
    assert {name: delta.key for name, delta in file.modules.items()} == {
        name: f"unet:{number}" for number, name in enumerate(names)
    }
    assert list(file.text_encoder) == ["text_encoder.text_model.encoder.layers.1.self_attn.v_proj"]
    shapes = {name: delta.shape for name, delta in file.modules.items()}
    assert file.for_model(ModelIndex(shapes)).modules.keys() == file.modules.keys()
    later = dict.fromkeys(range(9), (8, 8)) | {8: (64, 8)}
    few = {
        key: tensor
        for number, (out, columns) in later.items()
        for key, tensor in ((f"unet:{number}:up", draw(out, 2)), (f"unet:{number}:down", draw(2, columns)))
    }
    model = {
        f"mid_block.attentions.0.transformer_blocks.0.{leaf}": (64, 8) if "ff" in leaf else (8, 8) for leaf in leaves
    }
    bound = only(few).for_model(ModelIndex(model))
    assert bound.modules["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"].key == "unet:8"


def test_what_a_file_has_in_original_and_in_own_names_counts_once() -> None:
    parts = dict.fromkeys((f"layers.0.attention.to_{part}" for part in "qkv"), (8, 8))
    split = {key: tensor for name in parts for key, tensor in lora(f"lora_unet_{name.replace('.', '_')}").items()}
    file = only(split | lora("lora_unet_layers_0_attention_qkv", out=24)).for_model(ModelIndex(parts))
    assert {delta.key for delta in file.modules.values()} == {key.partition(".")[0] for key in split}
    assert any("qkv" in key for key in file.unmatched)


@pytest.mark.parametrize(
    "prefix",
    [
        "lora_unet__blocks_0_x",
        "lora_unet_blocks_0_x_",
        "module.blocks.0.x",
        "transformer._orig_mod.blocks.0.x",
        "transformer.blocks.0._orig_mod.x",
        "lora_unet__orig_mod_blocks_0_x",
        "transformer$$blocks$$0$$x",
        "lora_prior_unet_blocks_0_x",
    ],
)
def test_what_is_no_part_of_a_name_is_taken_off(prefix: str) -> None:
    assert list(only(lora(prefix)).for_model(ModelIndex({"blocks.0.x": (8, 8)})).modules) == ["blocks.0.x"]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"x": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})])
        self.table = nn.Parameter(torch.zeros(1, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0]["x"](x)

    @torch.no_grad()
    def in_a_call(self) -> dict[str, Tensor]:
        """What parameters it has while it is called."""
        found: dict[str, Tensor] = {}
        hook = self.blocks[0]["x"].register_forward_hook(lambda *_: found.update(self.named_parameters()))
        self(torch.zeros(8))
        hook.remove()
        return found


def session(
    subject: dict[str, Tensor], style: dict[str, Tensor], tmp_path: Path, **settings: object
) -> tuple[Tiny, Session]:
    model = Tiny()
    sites = {"blocks.0.x": Site(model.blocks[0]["x"])}
    parameters = {path: tuple(parameter.shape) for path, parameter in model.named_parameters()}
    index = ModelIndex({"blocks.0.x": (8, 8)}, parameters=parameters)
    pair = Pair.open(subject, style, ScoreCache(tmp_path)).for_model(index)
    plan = pair.plan(Settings.parse(settings))
    return model, Session(pair, plan, sites, denoiser=model)


def test_biases_follow_their_modules_choice_and_are_put_back(tmp_path: Path) -> None:
    subject, style = lora(diff_b=torch.full((8,), 2.0)), lora(diff_b=torch.full((8,), 4.0))
    model, fused = session(subject, style, tmp_path, policy="switch", period=1, steps=2)
    linear = model.blocks[0]["x"]
    before = linear.bias.detach().clone()
    with fused, torch.no_grad():
        fused.start_pass([1.0, 0.5, 0.0])
        found = []
        for level in (1.0, 0.5):
            fused.at_level(level)
            found.append(round((linear(torch.zeros(8)) - before)[0].item(), 4))
        assert sorted(found) == [2.0, 4.0]
    assert torch.equal(linear.bias, before)


@pytest.mark.parametrize("distance", ["kl", "l2"])
def test_a_bias_acts_with_the_lora_that_a_measuring_policy_chooses(tmp_path: Path, distance: str) -> None:
    for larger in (0, 1):
        pair = [lora(diff_b=torch.full((8,), value)) for value in (2.0, 4.0)]
        pair[larger][f"{X}.lora_up.weight"] *= 100
        model, fused = session(*pair, tmp_path, policy="dynamic", distance=distance)
        linear, x = model.blocks[0]["x"], draw(5, 8)
        with torch.no_grad():
            before = linear(x)
            with fused:
                fused.start_pass([1.0, 0.0])
                fused.at_level(1.0)
                change = linear(x) - before
        wanted = x @ product(pair[larger]).t() + pair[larger][f"{X}.diff_b"]
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-3)


def test_a_measuring_policy_counts_biases_as_part_of_what_a_lora_does(tmp_path: Path) -> None:
    quiet = {key: tensor * 1e-3 for key, tensor in lora().items()}
    pair = ({**quiet, f"{X}.diff_b": torch.full((8,), 1.0)}, {**quiet, f"{X}.diff_b": torch.arange(8.0)})
    model, fused = session(*pair, tmp_path, policy="dynamic")
    linear, x = model.blocks[0]["x"], draw(5, 8)
    with torch.no_grad(), fused:
        fused.start_pass([1.0, 0.0])
        fused.at_level(1.0)
        linear(x)
    assert fused._chooser
    assert fused._chooser.decisions["blocks.0.x"] == [(0.0, "s")]


@pytest.mark.parametrize("engine", ["bypass", "held"])
@pytest.mark.parametrize("room", [2**30, 0])
def test_biases_act_the_same_way_whichever_way_weights_do(
    tmp_path: Path, engine: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("klora.engine.weights.ROOM_BYTES", room)
    pair = lora(diff_b=draw(8)), lora(diff_b=draw(8))
    model, fused = session(*pair, tmp_path, policy="direct", engine=engine, style_strength=0.5)
    linear, x = model.blocks[0]["x"], draw(5, 8)
    bias = linear.bias.detach().clone()
    wanted = linear(x) + sum(
        strength * (x @ product(one).t() + one[f"{X}.diff_b"]) for strength, one in zip((1, 0.5), pair, strict=True)
    )
    with fused:
        fused.set_tau(0.5)
        torch.testing.assert_close(model(x), wanted)
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted)
            assert torch.equal(model.state_dict()["blocks.0.x.bias"], bias)
    assert torch.equal(linear.bias, bias)


def test_a_bias_acts_beside_one_that_shows_no_values(tmp_path: Path) -> None:
    change = torch.full((8,), 0.03125)
    pair = lora(diff_b=change), lora(diff_b=torch.zeros(8))
    model, fused = session(*pair, tmp_path, policy="direct", subject_strength=1.0)
    linear = model.blocks[0]["x"]
    linear.weight.data = linear.weight.data.to(torch.float8_e5m2)
    linear.bias.data = torch.full((8,), 100.0).to(torch.float8_e5m2)
    # As hosts that store in fp8 cast at each forward.
    linear.forward = lambda x: nn.functional.linear(x, linear.weight.float(), linear.bias.float())
    again = Session(fused.pair, fused.plan, {"blocks.0.x": Site(linear)}, denoiser=model)
    before = linear(torch.zeros(8))
    with again, torch.no_grad():
        again.set_tau(0.5)
        torch.testing.assert_close(linear(torch.zeros(8)) - before, change)


def norms(**more: Tensor) -> dict[str, Tensor]:
    return {**lora(), **{f"diffusion_model.blocks.0.norm.{key}": tensor for key, tensor in more.items()}}


def test_a_norm_that_is_stored_in_fp8_is_changed_without_being_rounded_to_it(tmp_path: Path) -> None:
    model, fused = session(norms(w_norm=torch.full((8,), 0.01)), lora(), tmp_path)
    norm = model.blocks[0]["norm"]
    norm.weight.data = norm.weight.data.to(torch.float8_e4m3fn)
    again = Session(fused.pair, fused.plan, {"blocks.0.x": Site(model.blocks[0]["x"])}, denoiser=model)
    with again:
        torch.testing.assert_close(model.in_a_call()["blocks.0.norm.weight"].float(), torch.full((8,), 1.01))
    assert norm.weight.dtype == torch.float8_e4m3fn


def packed(norm: nn.LayerNorm) -> None:
    norm.weight = nn.Parameter(torch.ones(8, dtype=torch.uint8), requires_grad=False)


def offloaded(norm: nn.LayerNorm) -> None:
    norm.weight = nn.Parameter(torch.ones(8, device="meta"))


def moved(norm: nn.LayerNorm) -> None:
    norm._diffusers_hook = type("Registry", (), {"hooks": {"layerwise_casting": None}})()  # type: ignore[assignment]


@pytest.mark.parametrize("store", [packed, offloaded, moved])
def test_a_norm_that_shows_no_values_is_named_and_left_out(tmp_path: Path, store: Callable[[nn.Module], None]) -> None:
    model, fused = session(norms(w_norm=torch.ones(8)), lora(), tmp_path)
    store(model.blocks[0]["norm"])
    before = model.blocks[0]["norm"].weight
    again = Session(fused.pair, fused.plan, {"blocks.0.x": Site(model.blocks[0]["x"])}, denoiser=model)
    with again:
        assert model.blocks[0]["norm"].weight is before
    assert "1 change of other parameters (such as diffusion_model.blocks.0.norm.w_norm)" in again.left_out[0]
    assert "quantised" in again.left_out[0]


@pytest.mark.parametrize("store", [packed, offloaded, moved])
def test_a_norm_that_others_begin_to_move_meanwhile_is_the_models_own_from_the_next_picture_on(
    tmp_path: Path, store: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture
) -> None:
    model, fused = session(norms(w_norm=torch.ones(8), b_norm=torch.ones(8)), lora(), tmp_path)
    norm = model.blocks[0]["norm"]
    with fused:
        # As hosts do: a pass is begun in the first call of its model.
        model.register_forward_pre_hook(lambda *_: fused.start_pass([1.0, 0.5]))
        assert torch.equal(model.in_a_call()["blocks.0.norm.weight"], torch.full((8,), 2.0))
        store(norm)
        own = norm.weight
        for _ in range(2):
            assert model.in_a_call()["blocks.0.norm.weight"] is own
    assert norm.weight is own
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"from now on {2 if store is moved else 1} change")
    assert "quantised" in said


def test_a_norm_that_somebody_takes_away_meanwhile_is_no_error(tmp_path: Path) -> None:
    model, fused = session(norms(w_norm=torch.ones(8)), lora(), tmp_path)
    with fused:
        model.register_forward_pre_hook(lambda *_: fused.start_pass([1.0, 0.5]))
        model.in_a_call()
        model.blocks[0]["norm"] = nn.Identity()
        assert "blocks.0.norm.weight" not in model.in_a_call()


def test_peft_scales_its_bias_as_the_factors(tmp_path: Path) -> None:
    tensors = {f"{X}.lora_A.weight": draw(2, 8), f"{X}.lora_B.weight": draw(8, 2), f"{X}.lora_B.bias": torch.ones(8)}
    bias = only({**tensors, f"{X}.alpha": torch.tensor(1.0)}).modules["blocks_0_x"].bias
    assert bias
    assert torch.equal(bias.change(), torch.full((8,), 0.5))
    assert torch.equal(bias.rows(2, 5).times(2).change(), torch.ones(3))


def test_other_parameters_are_changed_and_put_back(tmp_path: Path) -> None:
    more = {
        "diffusion_model.blocks.0.norm.w_norm": torch.full((8,), 0.5),
        "diffusion_model.blocks.0.norm.b_norm": torch.full((8,), 0.25),
        "diffusion_model.table.diff": torch.ones(1, 6, 8),
        "diffusion_model.gone.diff": torch.ones(3),
    }
    model, fused = session({**lora(), **more}, lora(), tmp_path, subject_strength=2.0)
    with fused:
        found = model.in_a_call()
    assert torch.equal(found["blocks.0.norm.weight"], torch.full((8,), 2.0))
    assert torch.equal(found["blocks.0.norm.bias"], torch.full((8,), 0.5))
    assert torch.equal(found["table"], torch.full((1, 6, 8), 2.0))
    assert torch.equal(model.blocks[0]["norm"].weight, torch.ones(8))
    assert not model.table.any()
    assert "1 change of other parameters (such as diffusion_model.gone.diff)" in fused.left_out[0]


def test_a_whole_parameter_stands_in_the_place_of_the_models(tmp_path: Path) -> None:
    model, fused = session(
        {**lora(), "diffusion_model.blocks.0.norm.set_weight": torch.full((8,), 3.0)}, lora(), tmp_path
    )
    with fused:
        assert torch.equal(model.in_a_call()["blocks.0.norm.weight"], torch.full((8,), 3.0))


def test_a_layer_without_a_bias_leaves_a_files_out_and_says_so(tmp_path: Path) -> None:
    model, fused = session(lora(diff_b=torch.ones(8)), lora(), tmp_path)
    model.blocks[0]["x"].bias = None
    again = Session(fused.pair, fused.plan, {"blocks.0.x": Site(model.blocks[0]["x"])}, denoiser=model)
    assert "1 change of biases (such as that of blocks.0.x)" in again.left_out[0]


def test_bfls_norms_stand_in_the_place_of_the_models(tmp_path: Path) -> None:
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    file = only({**lora(), norm: torch.full((8,), 3.0)})
    assert not file.unmatched
    index = ModelIndex({"blocks.0.x": (8, 8)}, parameters={"transformer_blocks.0.attn.norm_q.weight": (8,)})
    assert file.for_model(index).parameters["transformer_blocks.0.attn.norm_q.weight"].key == norm


def test_norms_of_text_encoders_act_in_a_pipeline(tmp_path: Path) -> None:
    pipe = PIPELINES["sdxl"](tmp_path / "tokenizer")
    encoders = dict(pipe.text_encoder.named_parameters()), dict(pipe.text_encoder_2.named_parameters())
    layer = "encoder.layers.0.layer_norm1"
    weight, bias = (encoders[0][f"{layer}.{leaf}"] for leaf in ("weight", "bias"))
    last = encoders[1]["text_model.final_layer_norm.weight"]
    before = [one.detach().clone() for one in (weight, bias, last)]
    tensors = {
        **lora("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", len(weight), len(weight)),
        "lora_te1_text_model_encoder_layers_0_layer_norm1.w_norm": draw(len(weight)),
        "lora_te1_text_model_encoder_layers_0_layer_norm1.b_norm": draw(len(bias)),
        "lora_te2_text_model_final_layer_norm.w_norm": draw(len(last)),
    }
    assert not only(tensors).unmatched
    context = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k").weight.shape
    unet = lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", *context)
    with klora.fuse(pipe, {**unet, **tensors}, unet, subject_strength=0.5) as fused:
        assert not fused.left_out
        first, second = dict(pipe.text_encoder.named_parameters()), dict(pipe.text_encoder_2.named_parameters())
        now = first[f"{layer}.weight"], first[f"{layer}.bias"], second["text_model.final_layer_norm.weight"]
        for one, old, key in zip(now, before, list(tensors)[2:], strict=True):
            torch.testing.assert_close(one, old + 0.5 * tensors[key])
    assert all(torch.equal(one, old) for one, old in zip((weight, bias, last), before, strict=True))
    assert pipe.text_encoder.get_parameter(f"{layer}.weight") is weight
    with klora.fuse(pipe, {**unet, **tensors}, unet, text_encoder="none"):
        assert pipe.text_encoder.get_parameter(f"{layer}.weight") is weight
