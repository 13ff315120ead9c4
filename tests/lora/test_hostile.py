"""Broken and hostile files: one line naming file, key and cure, quickly, and never anything but a KloraError."""

from __future__ import annotations

import json
import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from klora.errors import LoraFileError, LoraValueError, UnsupportedFormatError
from klora.lora.file import LoraFile
from klora.lora.header import MAX_HEADER
from tests.lora.hostile import DOWN, NAME, PREFIX, SHAPES, UP, error_of, header, path, raw, refused, without_waiting
from tests.support.lora_files import FAMILIES, lora_tensors, write_lora
from tests.support.memory import allocates_less_than

__all__ = ["path", "without_waiting"]


def test_the_good_file_that_the_others_are_made_of_opens(path: Path) -> None:
    assert list(LoraFile.open(raw(path, header())).modules) == [NAME]


# --- not a file ------------------------------------------------------------------------------------------------------


def test_missing_folder_and_empty(path: Path, tmp_path: Path) -> None:
    assert "does not exist" in str(refused(path))
    assert "is a folder" in str(refused(tmp_path))
    path.touch()
    assert "is empty" in str(refused(path))
    assert "cannot be read" in str(refused("a\0b.safetensors"))
    assert "cannot be read" in str(refused(tmp_path / ("x" * 400)))
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    assert "cannot be read" in str(refused(tmp_path / "loop.safetensors"))
    error = str(refused(path / "below a file.safetensors"))
    assert error.startswith(f"{path}/below a file.safetensors: cannot be read")


def test_a_pipe_a_device_and_a_socket_are_refused_without_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert "is a device, pipe or socket" in str(refused(pipe))
    if Path("/dev/zero").exists():
        assert "is a device, pipe or socket" in str(refused("/dev/zero"))
    link = tmp_path / "link.safetensors"
    link.symlink_to(pipe)
    assert "is a device, pipe or socket" in str(refused(link))
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path may not be long
        server.bind("s.safetensors")
        assert "is a device, pipe or socket" in str(refused("s.safetensors"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(path: Path) -> None:
    raw(path, header()).chmod(0)
    assert "cannot be read" in str(refused(path))


@pytest.mark.parametrize("suffix", [".pt", ".PT", ".ckpt", ".bin", ".pth"])
def test_pickles_are_refused_by_suffix(tmp_path: Path, suffix: str) -> None:
    error = refused(raw(tmp_path / f"x{suffix}", header()), UnsupportedFormatError)
    assert "pickle" in str(error)
    assert "safetensors" in error.cure


def test_pickles_are_refused_by_content(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path)
    assert "pickle" in str(refused(path, UnsupportedFormatError))
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    assert "pickle" in str(refused(path, UnsupportedFormatError))
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps({"a": [1.0] * 99}, protocol=protocol))
        assert "pickle" in str(refused(path, UnsupportedFormatError))


def test_a_header_of_640_bytes_is_no_pickle(path: Path) -> None:
    text = json.dumps(header()).encode().ljust(640)
    assert len(text).to_bytes(8, "little")[:2] == b"\x80\x02"
    assert LoraFile.open(raw(path, text)).modules


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\r\n <html></html>", "web page"),
        ((1000).to_bytes(8, "little") + b'{"a":', "its header of 1000 bytes is not all there (13)"),
        ((10).to_bytes(8, "little") + b'{"a":', "truncated"),
        (MAX_HEADER.to_bytes(8, "little") + b'{"a":', "truncated"),
        (b"x", "is not a safetensors file"),
        (bytes(7), "is not a safetensors file"),
        (bytes(8), "is not a safetensors file"),
        (bytes(100), "is not a safetensors file"),
        (b"\xff" * 100, "is not a safetensors file"),
        (b"\x80XX" + bytes(100), "is not a safetensors file"),
    ],
)
def test_other_contents_are_named(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    assert words in str(refused(path))


def test_a_gguf_file_is_of_a_kind_that_is_not_read(path: Path) -> None:
    path.write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    assert "GGUF" in str(refused(path, UnsupportedFormatError))


# --- the header ------------------------------------------------------------------------------------------------------


def test_every_truncation_is_an_error(path: Path) -> None:
    whole = raw(path, header()).read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole[:-1])
    assert "offsets out of range" in str(refused(path))


def test_a_header_that_is_too_large_is_not_read(path: Path) -> None:
    with allocates_less_than(2**20):
        for size in (MAX_HEADER + 1, 2**40, 2**63, 2**64 - 1):
            raw(path, header(), size=size)
            refused(path)
        raw(path, header(), size=MAX_HEADER + 1)
        os.truncate(path, MAX_HEADER * 4)  # sparse: there really are that many bytes
        assert "more than a LoRA can have" in str(refused(path))


def test_a_header_may_be_as_large_as_the_limit(path: Path) -> None:
    assert LoraFile.open(raw(path, json.dumps(header()).encode().ljust(MAX_HEADER))).modules


def test_a_header_may_have_as_many_parts_as_the_limit_and_no_more(path: Path) -> None:
    def with_parts(count: int) -> dict[str, Any]:
        text = json.dumps(header({"more": [1]}))
        return header({"more": [1] * (count + 1 - sum(text.count(part) for part in ",[{"))})

    assert LoraFile.open(raw(path, with_parts(125_000))).modules
    assert "far too many parts" in str(refused(raw(path, with_parts(125_001))))


def test_a_header_may_have_as_many_quotes_as_the_limit_and_no_more(path: Path) -> None:
    def with_quotes(count: int) -> dict[str, Any]:
        more = {} if count % 4 else {"more": 0}
        missing = count - json.dumps(header(more, __metadata__={})).count('"')
        return header(more, __metadata__={str(i): "" for i in range(missing // 4)})

    for count, fits in ((250_000, True), (250_002, False)):
        table = with_quotes(count)
        assert json.dumps(table).count('"') == count
        raw(path, table)
        assert bool(LoraFile.open(path).modules) if fits else "far too many parts" in str(refused(path))


@pytest.mark.parametrize(("digits", "fits"), [(15, True), (16, False)])
def test_numbers_in_a_header_have_fifteen_digits_at_most(path: Path, digits: int, fits: bool) -> None:
    raw(path, header({"more": 10 ** (digits - 1)}))
    assert bool(LoraFile.open(path).modules) if fits else "cannot be read" in str(refused(path))


def test_texts_of_a_header_may_be_of_any_alphabet_but_must_be_whole(path: Path) -> None:
    assert LoraFile.open(raw(path, header(__metadata__={"タグ": "猫"}))).metadata == {"タグ": "猫"}
    assert "cannot be read" in str(refused(raw(path, header(__metadata__={"tag": "\udfff"}))))
    assert "cannot be read" in str(refused(raw(path, header(__metadata__={"\udfff": "tag"}))))


def test_the_header_may_list_tensors_in_any_order(path: Path) -> None:
    table = header({"data_offsets": [64, 128]}, {"data_offsets": [0, 64]})
    assert LoraFile.open(raw(path, table)).modules
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [64, 64]}
    assert LoraFile.open(raw(path, {"zero": nothing, **header(), "a": nothing})).unmatched == ["zero", "a"]


@pytest.mark.parametrize(("dimensions", "fits"), [(8, True), (9, False)])
def test_a_tensor_has_eight_dimensions_at_most(path: Path, dimensions: int, fits: bool) -> None:
    raw(path, header(other={"dtype": "U8", "shape": [1] * dimensions, "data_offsets": [128, 129]}), bytes(129))
    assert LoraFile.open(path).unmatched == ["other"] if fits else "for a shape" in str(refused(path))


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"{}x",
        b"{'a': 1}",
        b"{\xff\xfe}",
        b'{"a":' * 50_000,
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"9" * 100_000 + b"}",
        b'{"a":1,"a":1}',
        b'{"\\ud800":{}}',
        b'{"__metadata__":{"a":"\\udfff"}}',
        b'{"a":{"dtype":"F32","dtype":"F16"}}',
        b'{"a":[' + b"[]," * 600_000 + b"[]]}",
        b'{"a":[' + b"1," * 600_000 + b"1]}",
        b'{"a":[' + b'"\\\\\\"",' * 600_000 + b"1]}",
    ],
)
def test_a_header_that_is_not_json_is_refused(path: Path, text: bytes) -> None:
    refused(raw(path, text))


@pytest.mark.parametrize(
    ("down", "words"),
    [
        ({"data_offsets": [0, 10**12]}, "offsets out of range"),
        ({"data_offsets": [-64, 0]}, "offsets"),
        ({"data_offsets": [64, 0]}, "offsets"),
        ({"data_offsets": [0]}, "offsets"),
        ({"data_offsets": "0-64"}, "offsets"),
        ({"data_offsets": [0.0, 64.0]}, "offsets"),
        ({"data_offsets": [False, 64]}, "offsets"),
        ({"data_offsets": [0, 60]}, "has 60 bytes, but its shape [2, 8] of F32 needs 64"),
        ({"shape": [2, 9]}, "has 64 bytes, but its shape [2, 9] of F32 needs 72"),
        ({"shape": [-2, -8]}, "shape"),
        ({"shape": [10**9] * 8}, "needs"),
        ({"shape": [1] * 9}, "shape"),
        ({"shape": None}, "shape"),
        ({"dtype": "F16"}, "needs 32"),
        ({"dtype": "F13"}, "unknown dtype F13"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"dtype": "I32"}, "has dtype I32; weights must be fp32, fp16, bf16 or fp8"),
        ({"dtype": "U32"}, "has dtype U32"),
        ({"shape": [16]}, "has shape 16"),
        ({"shape": [1, 2, 2, 1, 2, 2]}, "has shape 1×2×2×1×2×2"),
        ({"shape": [4, 4]}, "they do not multiply"),
    ],
)
def test_a_bad_entry_names_its_key(path: Path, down: dict[str, Any], words: str) -> None:
    error = refused(raw(path, header(down)))
    assert words in str(error)
    assert DOWN in str(error)
    assert error.key in (DOWN, UP)


def test_overlaps_gaps_and_loose_bytes_are_refused(path: Path) -> None:
    assert "overlaps another" in str(refused(raw(path, header(up={"data_offsets": [60, 124]}), bytes(124))))
    assert "leaves a gap" in str(refused(raw(path, header(up={"data_offsets": [68, 132]}), bytes(132))))
    assert "belong to no tensor" in str(refused(raw(path, header(), bytes(129))))


@pytest.mark.parametrize("value", [[], "text", {"a": 1}, {"a": None}])
def test_metadata_must_be_texts(path: Path, value: object) -> None:
    table = header(__metadata__=value)
    if value == []:
        assert LoraFile.open(raw(path, table)).metadata == {}
    else:
        assert "__metadata__" in str(refused(raw(path, table)))


@pytest.mark.parametrize(
    ("count", "words"), [(12_000, "zero modules matched"), (12_001, "12001 tensors, more than a LoRA can have")]
)
def test_a_header_of_very_many_tensors_is_refused(path: Path, count: int, words: str) -> None:
    text = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    assert words in str(refused(raw(path, f"{{{text}}}".encode(), b"")))


def test_many_commas_in_a_text_are_no_parts(path: Path) -> None:
    tags = json.dumps({f"a tag, and {i}": i for i in range(150_000)})
    metadata = {"ss_folder": "C:\\", "ss_tag_frequency": tags}
    assert LoraFile.open(raw(path, header(__metadata__=metadata))).metadata == metadata


def test_an_entry_that_is_not_a_table_is_refused(path: Path) -> None:
    for entry in (None, [], 3, {}, {"dtype": "F32"}):
        assert "broken" in str(refused(raw(path, header(broken=entry))))


def test_an_unaligned_header_is_read(path: Path, tmp_path: Path) -> None:
    good = write_lora(tmp_path / "good.safetensors", SHAPES)
    content = good.read_bytes()
    size = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + size].rstrip(), content[8 + size :]
    for padding in range(8):
        file = LoraFile.open(raw(path, text + b" " * padding, data))
        for name, delta in LoraFile.open(good).modules.items():
            assert file.modules[name].matrix().equal(delta.matrix())


# --- the tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_missing_tensor_is_an_error_or_makes_another_valid_file(path: Path, family: str) -> None:
    tensors = lora_tensors(SHAPES, family=family, alpha=2.0)
    for key in tensors:
        save_file({k: t for k, t in tensors.items() if k != key}, path)
        optional = key.endswith(("alpha", "dora_scale", ".diff", "lora_mid.weight", "_t2"))
        if not optional:
            prefix = key.split(".")[0]
            assert prefix in str(refused(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_wrong_shape_is_an_error_naming_a_key_of_the_module(path: Path, family: str) -> None:
    tensors = lora_tensors(SHAPES, family=family, rank=3)
    for key, tensor in tensors.items():
        for dim in range(tensor.ndim):
            shape = list(tensor.shape)
            shape[dim] = 0
            save_file({**tensors, key: torch.zeros(shape)}, path)
            assert key in str(refused(path))
            shape[dim] = tensor.shape[dim] + 1
            save_file({**tensors, key: torch.zeros(shape)}, path)
            if (error := error_of(path)) is not None:
                assert key.split(".")[0] in str(error)
                assert isinstance(error, LoraFileError)
                assert error.reason
                assert error.cure


def test_missing_up_missing_down_and_width_0_name_the_key(path: Path) -> None:
    tensors = lora_tensors({NAME: (8, 8)})
    save_file({DOWN: tensors[DOWN]}, path)
    assert f"{DOWN}: its up tensor is missing" in str(refused(path))
    save_file({UP: tensors[UP]}, path)
    assert f"{UP}: its down tensor is missing" in str(refused(path))
    save_file({DOWN: torch.zeros(4, 0), UP: torch.zeros(8, 4)}, path)
    assert "rank or width is 0" in str(refused(path))


@pytest.mark.parametrize("core", [(3, 2, 3, 3), (2, 3, 3, 3), (3, 3, 3, 3)])
def test_a_core_has_the_rank_on_both_sides(path: Path, core: tuple[int, ...]) -> None:
    tensors = lora_tensors({"mid_block.resnets.0.conv1": (8, 4, 3, 3)}, family="lora-cp", rank=2)
    mid = next(key for key in tensors if "lora_mid" in key)
    save_file({**tensors, mid: torch.zeros(core)}, path)
    assert mid in str(refused(path))


@pytest.mark.parametrize("core", [(3, 2, 3, 3), (2, 3, 3, 3), (2, 2, 3, 1)])
@pytest.mark.parametrize("slot", ["hada_t1", "hada_t2"])
def test_each_core_of_a_loha_has_its_halfs_rank_and_the_others_kernel(
    path: Path, slot: str, core: tuple[int, ...]
) -> None:
    tensors = lora_tensors({"mid_block.resnets.0.conv1": (8, 4, 3, 3)}, family="loha-cp", rank=2)
    prefix = next(iter(tensors)).split(".")[0]
    save_file({**tensors, f"{prefix}.{slot}": torch.zeros(core)}, path)
    assert prefix in str(refused(path))


def test_a_core_goes_with_no_other_kernel(path: Path) -> None:
    tensors = lora_tensors({"mid_block.resnets.0.conv1": (8, 4, 3, 3)}, rank=2)
    prefix = next(iter(tensors)).split(".")[0]
    save_file({**tensors, f"{prefix}.lora_mid.weight": torch.zeros(2, 2, 3, 3)}, path)
    assert f"{prefix}.lora_mid.weight" in str(refused(path))


@pytest.mark.parametrize("kernel", [(3, 1), (1, 3)])
def test_the_kernel_is_not_in_up(path: Path, kernel: tuple[int, int]) -> None:
    save_file({UP: torch.zeros(8, 2, *kernel), DOWN: torch.zeros(2, 8, 1, 1)}, path)
    assert UP in str(refused(path))


def test_a_peft_magnitude_is_of_the_outputs(path: Path) -> None:
    prefix = f"base_model.model.{NAME}"
    tensors = {f"{prefix}.lora_A.weight": torch.zeros(2, 6), f"{prefix}.lora_B.weight": torch.zeros(8, 2)}
    save_file({**tensors, f"{prefix}.lora_magnitude_vector": torch.ones(6)}, path)
    assert f"{prefix}.lora_magnitude_vector" in str(refused(path))


def test_alpha_must_be_one_finite_number(path: Path) -> None:
    tensors, key = lora_tensors({NAME: (8, 8)}), f"{PREFIX}.alpha"
    for alpha in (torch.ones(2), torch.tensor(True), torch.zeros(0)):
        save_file({**tensors, key: alpha}, path)
        assert f"{key}: should be one number" in str(refused(path))
    for value in (float("nan"), float("inf")):
        save_file({**tensors, key: torch.tensor(value)}, path)
        assert key in str(refused(path, LoraValueError))
    for alpha in (torch.tensor(3, dtype=torch.int64), torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.bfloat16)):
        save_file({**tensors, key: alpha}, path)
        assert LoraFile.open(path).modules[NAME].alpha == 3.0


@pytest.mark.parametrize("alpha", [1e30, -1e30])
def test_an_alpha_beyond_all_reason_is_refused_where_it_counts(path: Path, alpha: float) -> None:
    stored = torch.tensor(alpha, dtype=torch.float64)
    for family in ("lora", "loha", "lokr"):
        save_file({**lora_tensors({NAME: (8, 8)}, family=family), f"{PREFIX}.alpha": stored}, path)
        assert f"{PREFIX}.alpha: makes a scale of" in str(refused(path, LoraValueError))
    save_file({**lora_tensors({NAME: (8, 8)}, rank=4), f"{PREFIX}.alpha": torch.tensor(3e5)}, path)
    assert LoraFile.open(path).modules[NAME].scale == 75_000
    # LyCORIS ignores it where both factors are whole.
    save_file({**lora_tensors({NAME: (8, 8)}, family="lokr-full"), f"{PREFIX}.alpha": stored}, path)
    assert LoraFile.open(path).modules[NAME].scale == 1.0


@pytest.mark.parametrize(("up", "down"), [((2**14, 1), (1, 2**14)), ((2**16 + 1, 1), (1, 1)), ((1, 1), (1, 2**16 + 1))])
def test_small_tensors_with_an_enormous_product_are_refused(
    path: Path, up: tuple[int, int], down: tuple[int, int]
) -> None:
    save_file({UP: torch.zeros(up), DOWN: torch.zeros(down)}, path)
    assert f"{PREFIX}: makes a weight of {up[0]}×{down[1]}, larger than any layer" in str(refused(path))


@pytest.mark.parametrize(("up", "down"), [((2**16, 1), (1, 1)), ((1, 1), (1, 2**16)), ((2**14, 1), (1, 2**13))])
def test_as_large_as_the_largest_layer_is_read(path: Path, up: tuple[int, int], down: tuple[int, int]) -> None:
    save_file({UP: torch.zeros(up), DOWN: torch.zeros(down)}, path)
    assert LoraFile.open(path).modules[NAME].shape == (up[0], down[1])


def test_the_sides_of_a_kernel_count_towards_its_columns(path: Path) -> None:
    for columns in (2**12, 2**13):
        save_file({UP: torch.zeros(1, 1, 1, 1), DOWN: torch.zeros(1, columns, 3, 3)}, path)
        assert (error_of(path) is None) == (columns == 2**12)


def test_files_that_are_no_lora_match_zero_modules(path: Path) -> None:
    for tensors in (
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)},
        {"emb_params": torch.zeros(2, 768)},
        {"lora_unet_joint_blocks_0.lora_down.weight": torch.zeros(2, 8)},
        {f"{PREFIX}.alpha": torch.tensor(1.0)},
        {"lora_unet_mid_block_resnets_0_norm1.diff": torch.zeros(8)},
    ):
        save_file(tensors, path)
        assert "zero modules matched" in str(refused(path))
        assert next(iter(tensors)) in str(refused(path))
    raw(path, {"__metadata__": {"a": "b"}}, b"")
    assert "zero modules matched" in str(refused(path))


def test_the_shortest_key_shows_what_a_file_that_is_no_lora_has(path: Path) -> None:
    save_file({key: torch.zeros(2) for key in ("a.first.in.the.alphabet", "short", "the.longest.of.them.all")}, path)
    assert "(such as short)" in str(refused(path))


def test_an_odd_key_or_path_stays_on_one_line(tmp_path: Path) -> None:
    refused(raw(tmp_path / "two  spaces.safetensors", header(**{"a  b": {"dtype": "X"}})))
    table = header(**{"a\nb\u2028\ud800\x1b[31m" * 99: {"dtype": "X"}})
    refused(raw(tmp_path / "new\nline\x1b[31m.safetensors", table)) if os.name == "posix" else None
