"""The JSON of `klora analyze`, key by key as docs/analyze-json.md says."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.cache import ScoreCache
from klora.pair import Pair
from klora.report.document import document
from klora.report.overlap import overlap_of
from klora.settings import Settings
from tests.support.lora_files import write_lora
from tests.support.models import real_shapes
from tests.support.pairs import ATTENTION, FEED_FORWARD, shapes, write_pair

TOP = {
    "schema": int,
    "subject": dict,
    "style": dict,
    "variant": str,
    "scope": str,
    "scale": dict,
    "steps": int,
    "gamma": (float, type(None)),
    "subject_share": list,
    "share": (float, type(None)),
    "coverage": dict,
    "modules": list,
    "overlap": dict,
}
MODULE = {
    "name": str,
    "slice": (str, type(None)),
    "subject_name": (str, type(None)),
    "style_name": (str, type(None)),
    "k": (int, type(None)),
    "subject_sum": (float, type(None)),
    "style_sum": (float, type(None)),
    "rho": (float, type(None)),
    "selection": str,
}


def documented(subject: Path, style: Path, **settings: object) -> dict[str, Any]:
    pair = Pair.open(subject, style, ScoreCache(subject.parent / "cache"))
    plan = pair.plan(Settings.parse(settings))
    return check(document(pair, plan, overlap_of(pair, plan)))


def check(found: dict[str, Any]) -> dict[str, Any]:
    """Check the shape of a document, and that JSON carries it unchanged."""
    assert {key: isinstance(found[key], kind) for key, kind in TOP.items()} == dict.fromkeys(TOP, True)
    assert set(found) - {"policy"} == set(TOP)
    assert found["schema"] == 1
    for side in ("subject", "style"):
        assert set(found[side]) - {"alpha_from"} == {"file", "sha256", "modules", "ranks"}
        assert found[side]["ranks"] == sorted(set(found[side]["ranks"]))
    assert set(found["scale"]) == {"kind", "alpha", "beta", "balance"}
    assert set(found["coverage"]) == {"contested", "subject_only", "style_only", "text_encoder", "unmatched"}
    assert len(found["subject_share"]) == found["steps"]
    for module in found["modules"]:
        assert set(module) == set(MODULE)
        assert all(isinstance(module[key], kind) for key, kind in MODULE.items())
        assert len(module["selection"]) == found["steps"]
        assert set(module["selection"]) <= set("csb-")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_it_says_what_the_files_are_and_what_they_share(tmp_path: Path) -> None:
    subject, style = write_pair(tmp_path)
    found = documented(subject, style)
    digest = hashlib.sha256(subject.read_bytes()).hexdigest()
    assert found["subject"] == {"file": str(subject), "sha256": digest, "modules": 27, "ranks": [4]}
    assert found["style"]["modules"] == 24
    assert found["style"]["ranks"] == [8]
    assert found["style"]["alpha_from"] == ["the rank"]
    coverage = {"contested": 24, "subject_only": 3, "style_only": 0, "text_encoder": 1, "unmatched": []}
    assert found["coverage"] == coverage
    assert found["scale"] == {"kind": "s", "alpha": 1.5, "beta": 0.5, "balance": 0.0}
    assert (found["variant"], found["scope"], found["steps"]) == ("paper", "all", 30)


def test_modules_carry_their_own_names_sums_and_letters(tmp_path: Path) -> None:
    found = documented(*write_pair(tmp_path))
    modules = {module["name"]: module for module in found["modules"]}
    name = ATTENTION[0]
    assert modules[name]["subject_name"] == "lora_unet_" + name.replace(".", "_")
    assert modules[name]["style_name"] == f"unet.{name}"
    assert modules[name]["k"] == 32
    assert modules[name]["rho"] == pytest.approx(
        modules[name]["subject_sum"] / (found["gamma"] * modules[name]["style_sum"])
    )
    # The rule, written once more: c iff ρ ≥ 1.5·i/30 + 0.5.
    for module in found["modules"]:
        if module["rho"] is not None:
            assert module["selection"] == "".join(
                "c" if module["rho"] >= 1.5 * i / 30 + 0.5 else "s" for i in range(30)
            )
    alone = modules[FEED_FORWARD[0]]
    assert (alone["style_name"], alone["k"], alone["rho"], alone["selection"]) == (None, None, None, "c" * 30)


def test_shares_are_fractions_of_the_contested_modules(tmp_path: Path) -> None:
    found = documented(*write_pair(tmp_path))
    contested = [module["selection"] for module in found["modules"] if module["rho"] is not None]
    for i, share in enumerate(found["subject_share"]):
        assert share == pytest.approx(sum(letters[i] == "c" for letters in contested) / len(contested))
    assert found["share"] == pytest.approx(sum(found["subject_share"]) / 30)


def test_a_share_target_gives_the_balance_it_found(tmp_path: Path) -> None:
    found = documented(*write_pair(tmp_path), share=0.25)
    assert found["share"] == pytest.approx(0.25, abs=0.02)
    assert found["scale"]["balance"] > 0


def test_the_official_variant_is_written_resolved(tmp_path: Path) -> None:
    found = documented(*write_pair(tmp_path), variant="official", scale="s*")
    assert (found["variant"], found["scope"]) == ("official", "attention")
    assert found["scale"] == {"kind": "s*", "alpha": 1.5, "beta": 1.275, "balance": 0.0}


def test_contested_counts_both_files_whatever_the_scope(tmp_path: Path) -> None:
    for name in "ab":
        write_lora(tmp_path / f"{name}.safetensors", shapes([*ATTENTION, *FEED_FORWARD]), seed=ord(name))
    found = documented(tmp_path / "a.safetensors", tmp_path / "b.safetensors", scope="attention")
    assert found["coverage"]["contested"] == 27
    assert sum(module["rho"] is not None for module in found["modules"]) == 24
    assert {m["selection"] for m in found["modules"] if m["rho"] is None} == {"b" * 30}


def test_a_ratio_that_is_no_number_is_null(tmp_path: Path) -> None:
    subject, style = write_pair(tmp_path)
    tensors = load_file(style)
    zero = f"unet.{ATTENTION[0]}.lora_B.weight"
    save_file({key: torch.zeros_like(t) if key == zero else t for key, t in tensors.items()}, style)
    found = documented(subject, style)
    module = next(m for m in found["modules"] if m["name"] == ATTENTION[0])
    assert (module["style_sum"], module["rho"], module["selection"]) == (0.0, None, "c" * 30)


def test_nothing_contested_is_null(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", shapes(ATTENTION))
    write_lora(tmp_path / "b.safetensors", shapes(FEED_FORWARD))
    found = documented(tmp_path / "a.safetensors", tmp_path / "b.safetensors", steps=3)
    assert (found["gamma"], found["share"], found["subject_share"]) == (None, None, [None] * 3)
    assert {m["selection"] for m in found["modules"]} == {"ccc", "sss"}


def test_unmatched_keys_are_listed(tmp_path: Path) -> None:
    subject, style = write_pair(tmp_path)
    save_file({**load_file(style), "something.else": torch.zeros(2)}, style)
    assert documented(subject, style)["coverage"]["unmatched"] == ["something.else"]


def test_another_policy_is_named_and_k_lora_is_not(tmp_path: Path) -> None:
    files = write_pair(tmp_path)
    assert "policy" not in documented(*files)
    found = documented(*files, policy="top-k")
    assert found["policy"] == "top-k"
    assert found["scale"] == {"kind": "one", "alpha": None, "beta": None, "balance": 0.0}


def test_a_fused_file_repeats_its_name_for_each_slice(tmp_path: Path) -> None:
    names = [n for n in real_shapes("flux") if n.startswith("transformer_blocks.0.attn.to_")]
    small = dict.fromkeys(names, (16, 16))
    write_lora(tmp_path / "a.safetensors", small, "flux-kohya")
    write_lora(tmp_path / "b.safetensors", small, "peft", seed=1)
    found = documented(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    slices = {m["slice"]: (m["subject_name"], m["style_name"]) for m in found["modules"] if m["slice"]}
    assert slices == {
        part: ("lora_unet_double_blocks_0_img_attn_qkv", f"transformer.transformer_blocks.0.attn.to_{part}")
        for part in "qkv"
    }
    assert found["scale"]["kind"] == "s*"


def test_every_number_is_finite(tmp_path: Path) -> None:
    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [n for v in value.values() for n in numbers(v)]
        if isinstance(value, list):
            return [n for v in value for n in numbers(v)]
        return [value] if isinstance(value, float) else []

    assert all(math.isfinite(n) for n in numbers(documented(*write_pair(tmp_path), beta=1e300)))
