"""A plan and its modules in everyday words."""

from __future__ import annotations

from klora.fusion.plan import FusionPlan

_PARTS = {
    "down_blocks": "down block",
    "mid_block": "middle block",
    "up_blocks": "up block",
    "single_transformer_blocks": "single-stream block",
    "attentions": "attention",
    "resnets": "residual layer",
    "downsamplers": "downsampler",
    "upsamplers": "upsampler",
    "attn1": "self-attention",
    "attn2": "cross-attention",
    "attn": "attention",
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out": "output",
    "add_q_proj": "query of the text",
    "add_k_proj": "key of the text",
    "add_v_proj": "value of the text",
    "to_add_out": "output of the text",
    "ff": "feed-forward",
    "ff_context": "feed-forward of the text",
    "proj_in": "input projection",
    "proj_out": "output projection",
    "proj_mlp": "feed-forward",
    "time_emb_proj": "time projection",
    "time_embedding": "time embedding",
    "conv_in": "first convolution",
    "conv_out": "last convolution",
    "conv_shortcut": "shortcut",
    "conv1": "convolution 1",
    "conv2": "convolution 2",
    "conv": "convolution",
}
WHEN = (
    "mostly in the first third",
    "mostly in the middle third",
    "mostly in the last third",
    "evenly over the steps",
    "more at the beginning than at the end",
    "more at the end than at the beginning",
    "more in the middle",
    "more at the beginning and the end",
)
"""All that can be said of when the subject acts."""

PLACE_WORDS = (
    *dict.fromkeys(word.rstrip(" 12") for word in _PARTS.values()),
    "layer",
    "double-stream block",
    "in",
    "out",
)
"""The words that a module's place is told in, without their numbers."""


def module_in_words(name: str) -> list[str]:
    """Say where a module lies, from the block inwards: "down block 1", "attention 0", "self-attention", "query".

    Numbers are those of the name. A part of no known meaning stays as it is.
    """
    parts = name.split(".")
    if parts[-2:] == ["to_out", "0"]:
        parts.pop()
    words: list[str] = []
    for i, part in enumerate(parts):
        if part.isdigit() and words:
            words[-1] += f" {part}"
        elif part == "transformer_blocks":
            words.append("layer" if i else "double-stream block")
        elif part == "net":
            words.append("in" if parts[i + 1 : i + 2] == ["0"] else "out")
            break
        else:
            words.append(_PARTS.get(part, part))
    return words


def share_in_words(plan: FusionPlan) -> tuple[str, str]:
    """Say the subject's share of all decisions and when it has them: "49 %", "mostly in the first third".

    The second is empty where there is nothing to tell apart. ValueError for a plan without a share.
    """
    if plan.share is None:
        raise ValueError("the plan has no share")
    shares = plan.subject_share()
    counts = _thirds([shares[i] or 0.0 for i in plan.made or range(plan.steps)])
    return f"{100 * plan.share:.0f} %", _when(counts)


def _thirds(shares: list[float]) -> list[float]:
    """Sum the shares over the first, the middle and the last third of the steps; a step may lie in two of them."""
    found, n = [0.0] * 3, len(shares)
    for i, share in enumerate(shares):
        for third in range(3):
            overlap = min(3 * (i + 1), (third + 1) * n) - max(3 * i, third * n)
            found[third] += share * max(0, overlap) / 3
    return found


def _when(thirds: list[float]) -> str:
    total = sum(thirds)
    if not total:
        return ""
    parts = [third / total for third in thirds]
    first, middle, last = parts
    if max(parts) > 0.5:
        return WHEN[parts.index(max(parts))]
    if max(parts) - min(parts) < 0.1:
        return WHEN[3]
    if first >= middle >= last:
        return WHEN[4]
    if last >= middle >= first:
        return WHEN[5]
    return WHEN[6] if middle > max(first, last) else WHEN[7]
