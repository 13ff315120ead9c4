"""The settings as keywords, for type checkers and editors: `klora.plan` and `klora.fuse` take these."""

from __future__ import annotations

from typing import TypedDict


class SettingsKeywords(TypedDict, total=False):
    """The fields of `klora.Settings`, whose help tells what each is for."""

    balance: float
    share: float | None
    subject_strength: float
    style_strength: float
    policy: str
    variant: str
    scale: str
    alpha: float | None
    beta: float | None
    k: int | None
    gamma: float | None
    scope: str
    other_layers: str
    text_encoder: str
    unpaired: str
    progress: str
    passes: str
    engine: str
    seed: int
    steps: int
    preset: str
    period: int
    gamma_power: int
    mu: float
    distance: str
    tokens: int
    reuse: int
    refresh: int
    style_refs: str
    subject_refs: str
    clip_model: str
    dino_model: str
    style_pull: float
    subject_pull: float
    refine_step: float
    refine_from: float
    refine_to: float
    discrepancy: float
    clusters: int | None
    density: float | None
    dare_merge: str
    merge_rank: int | None
    subject_from: float
    subject_to: float
    style_from: float
    style_to: float
    subject_blocks: str
    style_blocks: str
