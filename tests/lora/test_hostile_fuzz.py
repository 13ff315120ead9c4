"""Files changed at random: refused by a KloraError of one line, or read and used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from klora.lora.file import LoraFile
from tests.lora.hostile import DOWN, SHAPES, UP, error_of, header, path, raw, without_waiting
from tests.support.lora_files import FAMILIES, write_lora

__all__ = ["path", "without_waiting"]


def only_klora_errors(path: Path) -> None:
    """Open, and use what opens: every tensor readable, every delta computable."""
    if (error := error_of(path)) is not None:
        assert len(str(error).splitlines()) == 1
        return
    file = LoraFile.open(path)
    for delta in (*file.modules.values(), *file.text_encoder.values()):
        rows = delta.rows(0, min(2, delta.shape[0]))
        assert rows.shape == (min(2, delta.shape[0]), delta.columns)


FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.binary(max_size=200))
@FUZZ
def test_random_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    only_klora_errors(path)


@given(st.binary(max_size=120), st.integers(0, 130))
@FUZZ
def test_random_headers(path: Path, text: bytes, size: int) -> None:
    raw(path, b"{" + text, size=size)
    only_klora_errors(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.text(max_size=5) | st.sampled_from(["F32", "F16", "I64"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([DOWN, UP]), st.sampled_from(["dtype", "shape", "data_offsets", None]), JSON)
@FUZZ
def test_mutated_entries(path: Path, key: str, part: str | None, value: object) -> None:
    table = header()
    if part is None:
        table[key] = value
    else:
        table[key][part] = value
    only_klora_errors(raw(path, table))


@given(
    family=st.sampled_from(FAMILIES), edits=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=4)
)
@FUZZ
def test_changed_bytes_of_a_good_file(
    path: Path, tmp_path_factory: pytest.TempPathFactory, family: str, edits: list[tuple[int, int]]
) -> None:
    good = tmp_path_factory.getbasetemp() / f"fuzz-{family}.safetensors"
    if not good.exists():
        write_lora(good, SHAPES, family=family, rank=2, alpha=2.0)
    content = bytearray(good.read_bytes())
    for place, value in edits:
        content[place % len(content)] = value
    path.write_bytes(content)
    only_klora_errors(path)


SLOTS = [
    "lora_down.weight",
    "lora_up.weight",
    "lora_mid.weight",
    "alpha",
    "dora_scale",
    "diff",
    "hada_w1_a",
    "hada_w1_b",
]
SLOTS += ["hada_w2_a", "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_b", "lokr_t2"]


@given(st.dictionaries(st.sampled_from(SLOTS), st.lists(st.integers(0, 3), max_size=4), max_size=7), st.booleans())
@example({"lora_up.weight": [1, 0], "lora_down.weight": [0]}, False)
@FUZZ
def test_any_mixture_of_slots_and_shapes(path: Path, slots: dict[str, list[int]], fused: bool) -> None:
    prefix = "lora_unet_double_blocks_0_img_attn_qkv" if fused else "lora_unet_mid_block_resnets_0_conv1"
    save_file({f"{prefix}.{slot}": torch.ones(shape) for slot, shape in slots.items()}, path)
    only_klora_errors(path)


def test_the_fuzzed_files_are_good_to_begin_with(path: Path) -> None:
    for family in FAMILIES:
        write_lora(path, SHAPES, family=family, rank=2, alpha=2.0)
        assert len(LoraFile.open(path).modules) == len(SHAPES)
        assert load_file(path)
