"""Tensors of the families and beside them, that a file may have in any place: what fits, often, and what does not."""

from __future__ import annotations

from random import Random

from tests.fuzz.drafts import FLOATS, PARAMETERS, SIZES, Draft, Entry

SLOTS = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "diff", "lora_A.weight")
SLOTS += ("lora_B.weight", "lora_magnitude_vector", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1")
SLOTS += (
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "diff_b",
    "diff_m",
    "w_norm",
    "b_norm",
    "magnitude",
    "scale",
    "scalar",
    "set_weight",
    "reshape_weight",
    "lora_B.bias",
    "lora_down.scale_weight",
    "lora_up.scale_weight",
    "oft_blocks",
)


def prefix_of(key: str) -> str:
    return key.partition(".lora")[0] if ".lora" in key else key.rpartition(".")[0]


def beside(draw: Random, draft: Draft) -> None:
    """Tensors that stand beside factors, of a shape that fits, often, or of any."""
    for _ in range(draw.randint(1, 3)):
        key = draft.some_key(draw)
        shape = [*(draft.entries[key].shape if key in draft.entries else [16]), 1, 1][:2]
        slot = draw.choice(SLOTS)
        fits = [[], [1], shape[:1], [shape[0], 1], [1, shape[0]], shape, [*shape, 1, 1], [*shape, 1, 2, 2], [2]]
        kind = draw.choice(list(FLOATS) if draw.random() < 0.9 else list(SIZES))
        entry = Entry(kind, [], draw.randbytes(8))
        entry.resize(draw.choice(fits))
        draft.entries[f"{prefix_of(key)}.{slot}"] = entry


def volume(draw: Random, draft: Draft) -> None:
    """Factors of three or five dimensions, and a full difference of a parameter that is no layer."""
    prefix = prefix_of(draft.some_key(draw))
    out, width, rank = draw.choice((1, 4, 16)), draw.choice((1, 4, 16)), draw.choice((0, 1, 2))
    kernel = draw.choice(([3], [1, 2, 2], [3, 3, 3], [1, 1, 1], [1, 1, 1, 1]))
    shapes = draw.choice(
        (
            {"lora_down.weight": [rank, width, *kernel], "lora_up.weight": [out, rank, *[1] * len(kernel)]},
            {"lora_A.weight": [rank, width, *kernel], "lora_B.weight": [out, rank]},
            {"diff": [1, 6, width]},
            {"diff": [out, width, *kernel], "diff_b": [out]},
            {"set_weight": [out, width, *kernel]},
        )
    )
    for slot, shape in shapes.items():
        entry = Entry("F16", [], draw.randbytes(2))
        entry.resize(shape)
        draft.entries[f"{prefix}{draw.choice(('', '', '.modulation'))}.{slot}"] = entry


def flat(draw: Random, draft: Draft) -> None:
    """A kernel that is stored flat, with magnitudes of outputs or inputs beside, of a fitting number or of any."""
    prefix = prefix_of(draft.some_key(draw))
    out, width, area = draw.choice((4, 8, 16)), draw.choice((4, 8, 16)), draw.choice((1, 4, 9))
    rank = draw.choice((1, 2))
    shapes = draw.choice(
        (
            {
                f"hada_w{i}_{side}": [out, rank] if side == "a" else [rank, width * area]
                for i in (1, 2)
                for side in "ab"
            },
            {"lokr_w1": [2, 2], "lokr_w2_a": [out // 2, rank], "lokr_w2_b": [rank, width * area // 2]},
            {"lora_up.weight": [out, rank], "lora_down.weight": [rank, width * area]},
        )
    )
    count = draw.choice((out, width, width, width * area, 3))
    shapes["dora_scale"] = draw.choice(([1, count, 1, 1], [1, count], [count, 1], [1, count, 1, 1, 1]))
    for slot, shape in shapes.items():
        entry = Entry("F16", [], draw.randbytes(2))
        entry.resize(shape)
        draft.entries[f"{prefix}.{slot}"] = entry


def norms(draw: Random, draft: Draft) -> None:
    """Differences of parameters that a model has, and of a text encoder's, of the right size, often, or of another."""
    for _ in range(draw.randint(1, 3)):
        path = draw.choice(list(PARAMETERS))
        prefix, _, leaf = path.rpartition(".")
        slot = draw.choice(({"weight": "w_norm", "bias": "b_norm"}.get(leaf, "diff"), "diff", "set_weight"))
        root = draw.choice(("", "diffusion_model.", "lora_te_" if path.startswith("text_encoder") else "lora_unet_"))
        name = prefix.removeprefix("text_encoder.") if root == "lora_te_" else prefix
        shape = list(PARAMETERS[path])
        entry = Entry(draw.choice(list(FLOATS)), [], draw.randbytes(4))
        entry.resize(draw.choice((shape, shape, [*shape, 1], [2], [])))
        draft.entries[f"{root}{name.replace('.', '_') if root.endswith('_') else name}.{slot}"] = entry


def numbered(draw: Random, draft: Draft) -> None:
    """Keys by number, as the first trainer of SD 1 wrote them: all of a file's, in its order, or some."""
    whole, root = draw.random() < 0.7, draw.choice(("unet", "unet", "text_encoder"))
    numbers: dict[str, int] = {}
    renamed: dict[str, Entry] = {}
    for key, entry in draft.entries.items():
        side = next((side for side in ("up", "down") if f"lora_{side}" in key), None)
        if side is None or not (whole or draw.random() < 0.5):
            renamed[key] = entry
            continue
        number = numbers.setdefault(prefix_of(key), len(numbers) if draw.random() < 0.9 else draw.choice((0, 31, 9999)))
        renamed[f"{root}:{number}:{side}"] = entry
    draft.entries = renamed
