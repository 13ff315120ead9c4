"""Each algorithm of LyCORIS on each kind of layer: what acts in the layer is the ΔW of the formula.

The tensors have the names and shapes that LyCORIS 3 gives them. The model tells the layer's shape, as it does in use.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klora.errors import LoraFileError, MismatchError, UnsupportedFormatError
from klora.lora.file import LoraFile
from klora.lora.model_index import ModelIndex

PREFIX, NAME = "lycoris_blocks_0_x", "blocks.0.x"
SHAPES = {
    "linear": (12, 8),
    "square": (8, 8),
    "1×1": (12, 8, 1, 1),
    "3×3": (12, 8, 3, 3),
    "square 3×3": (8, 8, 3, 3),
    "1-D": (12, 8, 3),
    "3-D": (12, 8, 1, 2, 2),
}
RANK, ALPHA = 2, 1.0
Shape = tuple[int, ...]
Made = tuple[dict[str, Tensor], Tensor]
"""Tensors by slot, and ΔW as a matrix (out, in·kernel) without its scale."""


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def columns(shape: Shape) -> int:
    return int(torch.Size(shape[1:]).numel())


def locon(shape: Shape) -> Made:
    up, down = draw(shape[0], RANK, *(1 for _ in shape[2:])), draw(RANK, *shape[1:])
    return {"lora_up.weight": up, "lora_down.weight": down}, up.flatten(1) @ down.flatten(1)


def locon_tucker(shape: Shape) -> Made:
    ones = tuple(1 for _ in shape[2:])
    up, mid, down = draw(shape[0], RANK, *ones), draw(RANK, RANK, *shape[2:]), draw(RANK, shape[1], *ones)
    whole = torch.einsum("om,mn...,ni->oi...", up.flatten(1), mid, down.flatten(1))
    return {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, whole.flatten(1)


def loha(shape: Shape) -> Made:
    slots = {f"hada_w{i}_a": draw(shape[0], RANK) * i for i in (1, 2)}
    slots |= {f"hada_w{i}_b": draw(RANK, columns(shape)) * i for i in (1, 2)}
    return slots, (slots["hada_w1_a"] @ slots["hada_w1_b"]) * (slots["hada_w2_a"] @ slots["hada_w2_b"])


def loha_tucker(shape: Shape) -> Made:
    slots, halves = {}, []
    for i in (1, 2):
        core, a, b = draw(RANK, RANK, *shape[2:]) * i, draw(RANK, shape[0]), draw(RANK, shape[1])
        slots |= {f"hada_t{i}": core, f"hada_w{i}_a": a, f"hada_w{i}_b": b}
        halves.append(torch.einsum("mn...,mo,ni->oi...", core, a, b).flatten(1))
    return slots, halves[0] * halves[1]


def kron(first: Tensor, second: Tensor) -> Tensor:
    return torch.kron(first.reshape(*first.shape, *(1 for _ in second.shape[2:])), second).flatten(1)


def lokr(shape: Shape) -> Made:
    first, second = draw(4, 2), draw(shape[0] // 4, shape[1] // 2, *shape[2:])
    return {"lokr_w1": first, "lokr_w2": second}, kron(first, second)


def lokr_low_rank(shape: Shape) -> Made:
    """w2 of two factors, of which the second has the kernel flat."""
    first, a = draw(4, 2), draw(shape[0] // 4, RANK)
    b = draw(RANK, columns(shape) // 2)
    return {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b}, kron(
        first, (a @ b).view(shape[0] // 4, shape[1] // 2, *shape[2:])
    )


def lokr_both(shape: Shape) -> Made:
    slots, _ = lokr_low_rank(shape)
    a, b = draw(4, RANK), draw(RANK, 2)
    second = (slots["lokr_w2_a"] @ slots["lokr_w2_b"]).view(shape[0] // 4, shape[1] // 2, *shape[2:])
    del slots["lokr_w1"]
    return {**slots, "lokr_w1_a": a, "lokr_w1_b": b}, kron(a @ b, second)


def lokr_tucker(shape: Shape) -> Made:
    first, core = draw(4, 2), draw(RANK, RANK, *shape[2:])
    a, b = draw(RANK, shape[0] // 4), draw(RANK, shape[1] // 2)
    second = torch.einsum("mn...,mo,ni->oi...", core, a, b).contiguous()
    return {"lokr_w1": first, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}, kron(first, second)


ALGORITHMS: tuple[Callable[[Shape], Made], ...] = (locon, loha, lokr, lokr_low_rank, lokr_both)
WITH_CORES: tuple[Callable[[Shape], Made], ...] = (locon_tucker, loha_tucker, lokr_tucker)
CASES = [(one, layer) for one in ALGORITHMS for layer in SHAPES]
CASES += [(one, layer) for one in WITH_CORES for layer, shape in SHAPES.items() if len(shape) > 2 and layer != "1×1"]


def bound(slots: dict[str, Tensor], shape: Shape) -> LoraFile:
    """A file of these tensors in a model with a layer of that shape."""
    layer = shape[:2] if set(shape[2:]) == {1} else shape
    tensors = {f"{PREFIX}.{slot}": tensor.contiguous() for slot, tensor in slots.items()}
    return LoraFile.open(tensors).for_model(ModelIndex({NAME: layer}))


@pytest.mark.parametrize(("algorithm", "layer"), CASES)
@pytest.mark.parametrize("decomposed", ["", "by output", "by input"])
def test_what_acts_is_the_formula(algorithm: Callable[[Shape], Made], layer: str, decomposed: str) -> None:
    shape = SHAPES[layer]
    slots, whole = algorithm(shape)
    scale = 1.0 if algorithm is lokr else ALPHA / RANK
    wanted = (whole * scale).reshape(shape)
    weight = draw(*shape) + 0.5
    if decomposed:
        axis = int(decomposed == "by input")
        dims = [dim for dim in range(len(shape)) if dim != axis]
        magnitude = 1.5 * torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
        slots["dora_scale"] = magnitude
        changed = weight + wanted
        wanted = changed * magnitude / torch.linalg.vector_norm(changed, dim=dims, keepdim=True) - weight
    file = bound({**slots, "alpha": torch.tensor(ALPHA)}, shape)
    assert not file.unmatched
    torch.testing.assert_close(file.modules[NAME].matrix(weight).reshape(shape), wanted, rtol=1e-4, atol=1e-4)


def test_magnitudes_of_inputs_that_the_layer_does_not_have_are_refused() -> None:
    # Of (12, 72), 8 inputs of 3×3 or 18 of 2×2 are possible; the model says which it is.
    slots, _ = loha((12, 8, 3, 3))
    with pytest.raises(MismatchError, match="magnitudes of 18 inputs, the layer has 8"):
        bound({**slots, "dora_scale": torch.ones(1, 18, 1, 1)}, (12, 8, 3, 3))
    with pytest.raises(LoraFileError, match="for a direction of"):
        bound({**slots, "dora_scale": torch.ones(1, 7, 1, 1)}, (12, 8, 3, 3))


@pytest.mark.parametrize(
    ("slots", "family"),
    [
        ({"oft_blocks": (4, 2, 2)}, "OFT"),
        ({"oft_blocks": (4, 2, 2), "rescale": (8, 1)}, "OFT"),
        ({"oft_blocks": (2, 4, 2, 2)}, "BOFT"),
        ({"a1.weight": (2, 8), "a2.weight": (8, 2), "b1.weight": (2, 8), "b2.weight": (8, 2)}, "GLoRA"),
        ({"weight": (8,), "on_input": ()}, "IA3"),
    ],
)
def test_what_is_no_additive_difference_is_refused_by_name(slots: dict[str, Shape], family: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"of the {family} family"):
        bound({slot: torch.ones(shape) for slot, shape in slots.items()}, (8, 8))
