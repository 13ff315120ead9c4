"""`klora merge`: what it writes is what the policy does, for every program that loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

import klora
from klora import cli
from klora.errors import KloraError
from klora.fusion.policies import POLICIES
from klora.lora.file import LoraFile
from klora.lora.names import kind_of
from klora.lora.spelling import spelling_of
from klora.merge import fused_file, merge, static_policies
from klora.pair import Pair
from klora.settings import Settings
from tests.support.lora_files import FAMILIES, write_lora
from tests.support.models import module_shapes
from tests.support.pipelines import SMALLER, run

STATIC = static_policies()
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
SHAPES = {ATTENTION: (24, 24), ATTENTION.replace("to_q", "to_k"): (24, 20), CONV: (12, 16, 3, 3)}
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def written(subject: Path, style: Path, *words: str) -> tuple[LoraFile, dict[str, str]]:
    target = subject.parent / "merged.safetensors"
    assert cli.main(["merge", str(subject), str(style), "-o", str(target), "--dtype", "float32", *words]) == 0
    with safe_open(str(target), "pt") as file:
        return LoraFile.open(target), file.metadata()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-9))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    shapes = {**SHAPES, TEXT: (32, 32)}
    subject = write_lora(tmp_path / "dog.safetensors", shapes, "kohya", rank=3, alpha=2.0, seed=1)
    return subject, write_lora(tmp_path / "ink.safetensors", SHAPES, "peft", rank=4, seed=2)


class TestTheFile:
    @pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
    def test_a_direct_merge_is_the_exact_sum_with_both_ranks(self, pair: tuple[Path, Path], spelling: str) -> None:
        words = ("--policy", "direct", "--spelling", spelling, "--subject-strength", "0.5", "--style-strength", "-2")
        made, _ = written(*pair, *words)
        subject, style = (LoraFile.open(path) for path in pair)
        assert made.modules.keys() == SHAPES.keys()
        assert made.unmatched == []
        for name, delta in made.modules.items():
            assert delta.rank == 7
            assert close(delta.matrix(), 0.5 * subject.modules[name].matrix() - 2 * style.modules[name].matrix())
        assert close(made.text_encoder[TEXT].matrix(), 0.5 * subject.text_encoder[TEXT].matrix())

    def test_a_file_that_is_made_again_has_the_same_bytes(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        opened, settings = Pair.open(*pair), Settings(policy="ties", style_strength=0.5)
        made = [fused_file(opened, settings, merge(opened, settings)[0], torch.float16) for _ in range(5)]
        assert len(set(made)) == 1
        assert int.from_bytes(made[0][:8], "little") % 8 == 0
        (tmp_path / "made.safetensors").write_bytes(made[0])
        with safe_open(str(tmp_path / "made.safetensors"), "pt") as file:
            assert json.loads(file.metadata()["klora"])["settings"] == {"policy": "ties", "style_strength": 0.5}
        assert {tensor.dtype for tensor in load(made[0]).values()} == {torch.float16}

    @pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
    def test_a_1x1_convolution_stays_one(self, tmp_path: Path, spelling: str) -> None:
        point = "down_blocks.0.attentions.0.proj_in"
        shapes = {point: (16, 24, 1, 1), ATTENTION: (24, 24)}
        paths = [write_lora(tmp_path / f"{seed}.safetensors", shapes, rank=2, seed=seed) for seed in (1, 2)]
        made, _ = written(*paths, "--policy", "direct", "--spelling", spelling)
        assert made.kernels == {made.modules[point].key}

    @pytest.mark.parametrize("policy", [policy for policy in STATIC if policy != "b-lora"])
    def test_every_static_policy_is_written(self, pair: tuple[Path, Path], policy: str) -> None:
        made, metadata = written(*pair, "--policy", policy)
        assert made.modules.keys() == SHAPES.keys()
        assert json.loads(metadata["klora"])["policy"] == policy

    def test_the_metadata_tells_what_made_it(self, pair: tuple[Path, Path]) -> None:
        _, metadata = written(*pair, "--policy", "ties", "--density", "0.4")
        facts = json.loads(metadata["klora"])
        assert facts["settings"] == {"policy": "ties", "density": 0.4}
        assert facts["subject"] == {"file": "dog.safetensors", "sha256": LoraFile.open(pair[0]).sha256}
        assert 0 < facts["lost_energy"] < 1
        assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("networks.lora", "7")

    def test_its_tensors_are_the_same_each_time(self, pair: tuple[Path, Path]) -> None:
        one = written(*pair, "--policy", "dare", "--seed", "3")[0].model_hash
        assert written(*pair, "--policy", "dare", "--seed", "3")[0].model_hash == one
        assert written(*pair, "--policy", "dare", "--seed", "4")[0].model_hash != one

    @pytest.mark.parametrize("rank", [1, 5, 40])
    def test_a_rank_is_the_best_of_that_rank_and_says_what_is_lost(self, pair: tuple[Path, Path], rank: int) -> None:
        files = Pair.open(*pair)
        made, _ = merge(files, Settings(policy="direct"), rank)
        exact, _ = merge(files, Settings(policy="direct"))
        assert exact.lost == 0
        total = lost = 0.0
        for name, delta in exact.deltas.items():
            S = torch.linalg.svdvals(delta.matrix().flatten(1).double()).square()
            total, lost = total + float(S.sum()), lost + float(S[rank:].sum())
            assert made.deltas[name].rank == min(rank, delta.rank)
        assert made.energy == pytest.approx(total, rel=1e-4)
        assert made.lost_share == pytest.approx(lost / total, abs=1e-5)

    @pytest.mark.parametrize("strength", [0.5, -3.0])
    def test_what_a_full_difference_loses_is_the_same_share_at_every_strength(
        self, tmp_path: Path, strength: float
    ) -> None:
        shapes = {ATTENTION: SHAPES[ATTENTION]}
        subject = write_lora(tmp_path / "dog.safetensors", shapes, family="full", seed=1)
        files = Pair.open(subject, write_lora(tmp_path / "ink.safetensors", shapes, rank=1, seed=2))
        alone, _ = merge(files, Settings(policy="direct", style_strength=0.0), rank=2)
        made, _ = merge(files, Settings(policy="direct", subject_strength=strength, style_strength=0.0), rank=2)
        assert made.energy == pytest.approx(strength**2 * alone.energy, rel=1e-4)
        assert made.lost_share == pytest.approx(alone.lost_share, rel=1e-4)
        assert 0 < made.lost_share < 1

    def test_half_precision_changes_little_and_is_the_default(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        target = tmp_path / "half.safetensors"
        assert cli.main(["merge", *map(str, pair), "--policy", "direct", "-o", str(target)]) == 0
        exact, _ = merge(Pair.open(*pair), Settings(policy="direct"))
        for name, delta in LoraFile.open(target).modules.items():
            assert delta.factors().up.dtype == torch.float16
            assert close(delta.matrix(), exact.deltas[name].matrix(), 5e-3)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_other_families_become_low_rank_or_are_named(
        self, tmp_path: Path, family: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        subject = write_lora(tmp_path / "dog.safetensors", SHAPES, family=family, rank=2, seed=1)
        style = write_lora(tmp_path / "ink.safetensors", SHAPES, rank=4, seed=2)
        words = ("--policy", "direct", "--dtype", "float32", "-o", str(tmp_path / "out.safetensors"))
        code = cli.main(["merge", str(subject), str(style), *words])
        if "dora" in family:
            assert code == 2
            assert "is a DoRA" in capfd.readouterr().err
            return
        files = (LoraFile.open(subject), LoraFile.open(style))
        for name, delta in LoraFile.open(tmp_path / "out.safetensors").modules.items():
            assert close(delta.matrix(), files[0].modules[name].matrix() + files[1].modules[name].matrix())


class TestRefusals:
    @pytest.mark.parametrize("policy", [name for name in POLICIES if name not in STATIC])
    def test_a_policy_that_depends_on_the_step_is_refused_and_others_are_named(
        self, pair: tuple[Path, Path], tmp_path: Path, policy: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "out.safetensors"
        assert cli.main(["merge", *map(str, pair), "--policy", policy, "-o", str(target)]) == 2
        err = capfd.readouterr().err
        assert f"{policy} depends on the step" in err
        assert all(name in err for name in STATIC)
        assert not target.exists()

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["-o", "{}/a.pt"], "must end in .safetensors"),
            (["-o", "{}/dog.safetensors"], "is read and would be overwritten"),
            (["-o", "{}/no/a.safetensors"], "there is no folder"),
            (["-o", "{}/a.safetensors", "--policy", "b-lora"], "b-lora is for SDXL"),
            (["-o", "{}/a.safetensors", "--subject-strength", "0", "--style-strength", "0"], "leaves nothing"),
            ([], "-o"),
        ],
    )
    def test_what_cannot_be_written_is_named(
        self, pair: tuple[Path, Path], tmp_path: Path, words: list[str], named: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        words = [word.format(tmp_path) for word in words]
        assert cli.main(["merge", *map(str, pair), "--policy", "direct", *words]) == 2
        out, err = capfd.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert named in err


def model_shapes(pipe: Any) -> dict[str, tuple[int, ...]]:
    """Attention of a pipeline, and for FLUX all that its original code fuses with it."""
    shapes = module_shapes(getattr(pipe, "unet", None) or pipe.transformer)
    if "Flux" in type(pipe).__name__:
        return {name: shape for name, shape in shapes.items() if "transformer_blocks" in name and "norm" not in name}
    return {name: shape for name, shape in shapes.items() if kind_of(name) == "attention"}


@pytest.fixture(scope="module")
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    pipe = SMALLER[request.param](folder / "tokenizer")
    text = {TEXT.replace("q_proj", f"{leaf}_proj"): (32, 32) for leaf in ("q", "k", "v", "out")}
    shapes = {**model_shapes(pipe), **text}
    flux = request.param == "flux"
    spelling = "diffusers" if flux else "kohya"
    subject = write_lora(folder / "dog.safetensors", shapes, spelling, rank=3, seed=1, strength=0.3)
    return pipe, subject, write_lora(folder / "ink.safetensors", shapes, "peft", rank=4, seed=2, strength=0.3)


@pytest.mark.parametrize("loaded", ["flux"], indirect=True)
def test_flux_in_kohyas_spelling_has_q_k_and_v_in_one_tensor(loaded: tuple[Any, Path, Path]) -> None:
    _, subject, style = loaded
    made, _ = written(subject, style, "--policy", "direct")
    exact, _ = merge(Pair.open(subject, style), Settings(policy="direct"))
    assert made.unmatched == []
    assert made.modules["transformer_blocks.0.attn.to_q"].key == "lora_unet_double_blocks_0_img_attn_qkv"
    for name, delta in {**made.modules, **made.text_encoder}.items():
        assert close(delta.matrix(), exact.deltas[name].matrix())


def test_a_model_that_shares_flux_s_names_keeps_them_as_they_are(tmp_path: Path) -> None:
    # The attention of SD3 and Qwen-Image: nothing in such a file says FLUX.
    names = [f"transformer_blocks.0.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v")]
    files = [
        write_lora(tmp_path / f"{seed}.safetensors", dict.fromkeys(names, (48, 48)), "peft", rank=2, seed=seed)
        for seed in (1, 2)
    ]
    assert Pair.open(*files).architecture is None
    written(*files, "--policy", "direct")
    with safe_open(str(tmp_path / "merged.safetensors"), "pt") as file:
        keys = {key.partition(".lora_")[0] for key in file.keys()}  # noqa: SIM118
    assert keys == {f"transformer.{name}" for name in names}
    loras = Pair.open(*files).loras
    with pytest.raises(KloraError, match="use --spelling diffusers"):
        spelling_of(loras, "kohya")


@pytest.mark.parametrize(
    ("root", "spelling"),
    [("transformer.", "diffusers"), ("lora_unet_", "kohya"), ("lora_transformer_", "kohya"), ("lycoris_", "kohya")],
)
def test_modules_of_other_models_keep_the_keys_of_the_inputs(tmp_path: Path, root: str, spelling: str) -> None:
    path = "layers.0.attn.to_q"
    prefix = root + (path if "." in root else path.replace(".", "_"))
    endings = ("lora_B", "lora_A") if "." in root else ("lora_up", "lora_down")
    files = [tmp_path / "dog.safetensors", tmp_path / "ink.safetensors"]
    for file in files:
        save_file({f"{prefix}.{ending}.weight": torch.ones(4, 4) for ending in endings}, str(file))
    loras = Pair.open(*files).loras
    assert spelling_of(loras) == spelling
    other = {"kohya": "diffusers", "diffusers": "kohya"}[spelling]
    with pytest.raises(KloraError, match=f"use --spelling {spelling}"):
        spelling_of(loras, other)
    written(*files, "--policy", "direct")
    with safe_open(str(tmp_path / "merged.safetensors"), "pt") as file:
        assert {key.removesuffix(".alpha").partition(".lora_")[0] for key in file.keys()} == {prefix}  # noqa: SIM118
        alphas = [float(file.get_tensor(key)) for key in file.keys() if key.endswith(".alpha")]  # noqa: SIM118
    assert alphas == ([8.0] if spelling == "kohya" else [])


@pytest.mark.parametrize(
    ("prefix", "spelling"),
    [
        ("unet.mid_block.attentions.0.proj_in", "diffusers"),
        ("diffusion_model.middle_block.1.proj_in", "kohya"),
        ("diffusion_model.mid_block.attentions.0.proj_in", "kohya"),
        ("diffusion_model.single_blocks.0.linear2", "diffusers"),
    ],
)
def test_what_loads_the_inputs_loads_what_is_made_of_them(prefix: str, spelling: str) -> None:
    """ComfyUI knows a UNet's modules by `diffusion_model.` and by kohya's keys, and not by diffusers' names of them."""
    tensors = {f"{prefix}.lora_{letter}.weight": torch.ones(4, 4) for letter in "AB"}
    assert spelling_of(Pair.open(tensors, tensors).loras) == spelling


def test_without_a_word_a_file_is_spelled_as_most_programs_read_it(tmp_path: Path) -> None:
    unet, other = "unet.mid_block.attentions.0.proj_in", "transformer.layers.0.attn.to_q"
    kohya = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    for prefix, key in ((unet, kohya), (other, f"{other}.lora_A.weight")):
        tensors = {f"{prefix}.lora_{letter}.weight": torch.ones(4, 4) for letter in "AB"}
        pair = Pair.open(tensors, tensors)
        made, _ = merge(pair, Settings.parse({"policy": "direct"}))
        assert key in load(fused_file(pair, Settings(), made, torch.float16))


def test_what_changes_a_bias_is_not_merged(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "dog.safetensors", {"conv_in": (8, 8, 3, 3)})
    save_file({**load_file(path), "lora_unet_conv_in.diff_b": torch.ones(8)}, str(path))
    pair = Pair.open(path, path)
    with pytest.raises(KloraError, match="changes biases"):
        merge(pair, Settings(policy="direct"))


def test_a_fused_tensor_has_rows_for_slices_that_are_not_there(tmp_path: Path) -> None:
    names = [f"single_transformer_blocks.0.attn.to_{leaf}" for leaf in "qv"]
    subject = write_lora(tmp_path / "dog.safetensors", {names[0]: (16, 16)}, "diffusers", rank=2, seed=1)
    style = write_lora(tmp_path / "ink.safetensors", {names[1]: (16, 16)}, "diffusers", rank=3, seed=2)
    made, _ = written(subject, style, "--policy", "direct")
    assert close(made.modules[names[0]].matrix(), LoraFile.open(subject).modules[names[0]].matrix())
    assert close(made.modules[names[1]].matrix(), LoraFile.open(style).modules[names[1]].matrix())
    assert not made.modules[names[0].replace("to_q", "to_k")].matrix().any()
    assert made.modules["single_transformer_blocks.0.proj_mlp"].shape == (64, 16)


POLICIES_OF = {
    "sd": ("direct", "knots", "ties"),
    "sdxl": ("direct", "b-lora"),
    "flux": ("direct", "knots", "ties"),
}
# diffusers splits kohya's fused tensors of FLUX at the widths of the real one; klora's own reader is tested above.
SPELLINGS_OF = {"sd": ("kohya", "diffusers"), "sdxl": ("kohya", "diffusers"), "flux": ("diffusers",)}


@pytest.mark.parametrize(
    ("loaded", "policy", "spelling"),
    [(kind, policy, spelling) for kind in SMALLER for policy in POLICIES_OF[kind] for spelling in SPELLINGS_OF[kind]],
    indirect=["loaded"],
)
def test_diffusers_loads_it_and_makes_the_picture_of_the_policy(
    loaded: tuple[Any, Path, Path], policy: str, spelling: str
) -> None:
    pipe, subject, style = loaded
    with klora.fuse(pipe, subject, style, policy=policy):
        expected = run(pipe)
    plain = run(pipe)
    made, _ = written(subject, style, "--policy", policy, "--spelling", spelling)
    try:
        pipe.load_lora_weights(str(made.path.parent), weight_name=made.path.name)
        picture = run(pipe)
    finally:
        pipe.unload_lora_weights()
    assert close(picture, expected, 1e-3)
    assert not close(picture, plain, 1e-2)
