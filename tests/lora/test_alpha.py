"""Alphas: a number of any dtype, or in the header's metadata, refused there where two readings disagree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from klora.errors import LoraFileError
from klora.lora.container import TensorFile
from klora.lora.file import LoraFile
from klora.lora.header import NUMBERS
from tests.support.lora_files import write_lora

NAME = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def scale(path: Path, metadata: dict[str, str], name: str = NAME, **options: object) -> float:
    shapes = {NAME: (16, 16), CONV: (16, 16, 3, 3), TEXT: (16, 16)}
    file = LoraFile.open(write_lora(path, shapes, metadata=metadata, **options))  # type: ignore[arg-type]
    return (file.modules.get(name) or file.text_encoder[name]).scale


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "metadata",
    [
        {"alpha": "8"},
        {"lora_alpha": "8.0"},
        {"network_alpha": "8", "network_dim": "4"},
        {"ss_network_alpha": "8.0", "ss_network_dim": "4"},
        {"transformer.lora_alpha": "8", "transformer.r": "4"},
        {"unet.lora_alpha": "8", "text_encoder.lora_alpha": "2"},
        {"lora_alpha": "8", "network_alpha": "8", "r": "4"},
        {"lora_alpha": '"8"', "r": "b'4'"},
        {"lora_alpha": "tensor(8.)", "r": " 4 "},
        {"lora_alpha": "8", "r": "0"},
        {"adapter_config": json.dumps({"lora_alpha": 8, "r": 4})},
        {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})},
    ],
)
def test_an_alpha_of_the_metadata_is_that_of_every_module_without_its_own(path: Path, metadata: dict[str, str]) -> None:
    assert scale(path, metadata) == 2
    assert scale(path, metadata, alpha=3.0) == 0.75


def test_each_component_has_its_own_alpha(path: Path) -> None:
    metadata = {"unet.lora_alpha": "8", "text_encoder.lora_alpha": "2"}
    assert (scale(path, metadata), scale(path, metadata, TEXT)) == (2, 0.5)


def test_kernels_have_an_alpha_of_their_own_among_kohyas_arguments(path: Path) -> None:
    args = json.dumps({"conv_dim": "4", "conv_alpha": "1"})
    metadata = {"ss_network_alpha": "8", "ss_network_dim": "4", "ss_network_args": args}
    assert (scale(path, metadata), scale(path, metadata, CONV)) == (2, 0.25)


def test_rslora_divides_by_the_root_of_the_rank(path: Path) -> None:
    assert scale(path, {"lora_alpha": "8", "use_rslora": "True"}) == 4


@pytest.mark.parametrize("text", ["None", "Dynamic", "", "nan", "0"])
def test_a_text_that_is_no_alpha_says_nothing(path: Path, text: str) -> None:
    assert scale(path, {"ss_network_alpha": text, "alpha": text}) == 1


def test_where_alpha_is_the_rank_the_scale_is_one_whatever_a_modules_rank(path: Path) -> None:
    assert scale(path, {"ss_network_alpha": "128", "ss_network_dim": "128"}) == 1


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"lora_alpha": "8", "network_alpha": "2"}, ("lora_alpha", "network_alpha", "2", "0.5")),
        ({"alpha": "8", "rank": "16"}, ("alpha", "rank of 16", "2", "0.5")),
        ({"alpha": "8", "lora_adapter_metadata": json.dumps({"lora_alpha": 4})}, ("lora_adapter_metadata", "alpha")),
    ],
)
def test_readings_that_disagree_are_both_named(path: Path, metadata: dict[str, str], told: tuple[str, ...]) -> None:
    with pytest.raises(LoraFileError) as error:
        scale(path, metadata)
    assert all(word in str(error.value) for word in told)
    assert error.value.cure
    assert scale(path, metadata, alpha=1.0) == 0.25


def test_files_of_klora_merge_have_the_rank_for_alpha(path: Path) -> None:
    assert scale(path, {"klora": "{}", "ss_network_alpha": "12", "ss_network_dim": "12"}) == 1


def test_it_is_told_where_alphas_are_from(path: Path) -> None:
    def told(metadata: dict[str, str], **options: object) -> str:
        return LoraFile.open(
            write_lora(path, {NAME: (16, 16)}, metadata=metadata, **options)  # type: ignore[arg-type]
        ).alpha_from

    assert told({}) == "the rank"
    assert told({}, alpha=1.0) == "keys"
    assert told({"lora_alpha": "8"}) == "metadata lora_alpha"


def test_fp8_is_multiplied_by_its_factor(path: Path) -> None:
    up, down = ((100 * torch.randn(shape)).to(torch.float8_e4m3fn) for shape in ((8, 2), (2, 16)))
    tensors = {
        "diffusion_model.x.lora_up.weight": up,
        "diffusion_model.x.lora_down.weight": down,
        "diffusion_model.x.lora_up.scale_weight": torch.tensor(0.01),
        "diffusion_model.x.lora_down.scale_weight": torch.tensor(0.02),
    }
    file = LoraFile.open(tensors)
    assert file.unmatched == []
    torch.testing.assert_close(file.modules["x"].matrix(), 0.0002 * up.float() @ down.float())


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_what_torch_reads_of_its_bytes(tmp_path: Path, name: str) -> None:
    """All of the 8-bit ones; of the wider ones any, the odd ones among them."""
    dtype = getattr(torch, NUMBERS[name])
    rows = torch.arange(256, dtype=torch.uint8).view(256, 1)
    torch.manual_seed(0)
    rest = torch.randint(0, 256, (256, dtype.itemsize - 1), dtype=torch.uint8)
    values = {str(i): row.view(dtype) for i, row in enumerate(torch.cat([rest, rows], 1))}
    save_file(values, tmp_path / "x.safetensors")
    read = TensorFile(tmp_path / "x.safetensors").numbers(values)
    wanted = {key: float(value.item()) for key, value in values.items()}
    assert {key: repr(value) for key, value in read.items()} == {key: repr(value) for key, value in wanted.items()}
