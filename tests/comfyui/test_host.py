"""A ModelPatcher as a host: names, rows of the prompt, weights however they are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from klora.engine.dynamic import BatchRows
from klora.engine.site import Site
from klora.hosts.comfyui.model import ComfyHost
from klora.hosts.comfyui.plain_weights import with_plain_weight
from tests.comfyui.fake_comfyui import Linear, Patcher


def told(lists: list[int], ids: list[str]) -> dict[str, Any]:
    return {"transformer_options": {"cond_or_uncond": lists, "uuids": ids}}


@pytest.mark.parametrize(
    ("positive", "options", "rows"),
    [
        ({"p"}, told([1, 0], ["n", "p"]), BatchRows(2, 4, 4)),
        ({"p"}, told([0, 1], ["p", "n"]), BatchRows(0, 2, 4)),
        # A guider of three lists begins with the negative one.
        ({"p"}, told([0, 2], ["n", "p"]), BatchRows(2, 4, 4)),
        (set(), told([1, 0], ["n", "p"]), BatchRows(2, 4, 4)),
        ({"p"}, told([1], ["n"]), BatchRows(0, 0, 4)),
        ({"p"}, told([1, 0, 0], ["n", "p", "q"]), None),
        ({"p"}, {}, None),
    ],
)
def test_the_rows_of_the_prompt_are_those_of_its_conditionings(
    model: Patcher, positive: set[str], options: dict[str, Any], rows: BatchRows | None
) -> None:
    host = ComfyHost(model, frozenset(positive))
    assert host.conditional_rows((torch.ones(4, 6, 16),), options) == rows


def test_a_unet_goes_by_the_hosts_own_table_and_by_its_paths(model: Patcher) -> None:
    host = ComfyHost(model)
    assert host.architecture == "SD1"
    assert host.model_name == "the SD1 model"
    leaf = "transformer_blocks.0.attn1.to_q"
    name = f"up_blocks.1.attentions.0.{leaf}"
    assert host.sites()[name].module is model.model.diffusion_model.get_submodule(f"output_blocks.3.1.{leaf}")
    # By the table of SD 1 alone, this path would be of the second upper block.
    for prefix in (f"lora_unet_{name.replace('.', '_')}", f"diffusion_model.output_blocks.3.1.{leaf}", f"unet.{name}"):
        places = host.index.find(prefix, (16, 16))
        assert places is not None
        assert [place.name for place in places] == [name]


def test_another_model_goes_by_the_hosts_map_of_keys(model: Patcher) -> None:
    model.model.model_config.unet_config = {"image_model": "something new"}
    host = ComfyHost(model)
    assert host.architecture is None
    assert host.model_name == "the BaseModel model"
    leaf = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    places = host.index.find(f"diffusion_model.{leaf}", (16, 16))
    assert places is not None
    assert [place.name for place in places] == [leaf]


class Gguf(Linear):
    """A layer of ComfyUI-GGUF, whose weight is packed."""

    def is_ggml_quantized(self) -> bool:
        return True

    def get_weight(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return (tensor * 2).to(dtype)


class QuantizedTensorLike(nn.Parameter):
    def dequantize(self) -> Tensor:
        return self.data * 4


def scaled() -> Linear:
    layer = Linear(4, 3)
    layer.scale_weight = nn.Parameter(torch.tensor(3.0))
    return layer


def quantised() -> Linear:
    layer = Linear(4, 3)
    layer.weight = QuantizedTensorLike(layer.weight.data)
    return layer


@pytest.mark.parametrize(("layer", "factor"), [(Linear(4, 3), 1), (Gguf(4, 3), 2), (scaled(), 3), (quantised(), 4)])
def test_a_dora_is_given_the_weight_that_the_layer_computes_with(layer: Linear, factor: float) -> None:
    weight = with_plain_weight(Site(layer)).base_weight()
    assert torch.allclose(weight, layer.weight.detach() * factor)
