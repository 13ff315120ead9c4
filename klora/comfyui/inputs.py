"""The inputs of nodes, made from the settings' descriptions, and settings made of what nodes are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from klora.fusion.policies import POLICIES, make_policy, policies_with, resolve
from klora.hosts.comfyui.loras import listed_loras
from klora.lora.weighted import MAX_WEIGHT
from klora.settings import AUTO, Option, Settings, shown_options

SIDES = ("subject", "style")
STRENGTHS = ("subject_strength", "style_strength")
FIRST = ("balance", "policy")
ELSEWHERE = {
    # A second pass is a second sampler, with the model that it is connected to.
    "passes",
    # Nodes that draw have an input of their own.
    "steps",
    # Reference guidance moves latents between steps, which only the diffusers host does and the WebUIs.
    "style_refs",
    "subject_refs",
    "clip_model",
    "dino_model",
    "style_pull",
    "subject_pull",
    "refine_step",
    "refine_from",
    "refine_to",
}
"""Settings that no node has."""

Inputs = dict[str, tuple[Any, dict[str, Any]]]


def rest() -> tuple[str, ...]:
    """The settings of the settings node: all that the main node does not have."""
    return tuple(name for name in shown_options() if name not in {*STRENGTHS, *FIRST, *ELSEWHERE})


def lora_inputs() -> Inputs:
    """The two menus of LoRAs."""
    tips = {
        "subject": "the LoRA of what the picture shows: a person, an animal, a thing",
        "style": "the LoRA of how it is drawn or painted",
    }
    return {side: (listed_loras(), {"tooltip": tips[side]}) for side in SIDES}


def side_inputs() -> Inputs:
    """A LoRA that is added to a side, and its weight."""
    tip = "how much of it the side has, where a side's own LoRA has 1; the side's strength multiplies the sum"
    limits = {"default": 1.0, "min": -MAX_WEIGHT, "max": MAX_WEIGHT, "step": 0.05, "round": 0.001}
    return {
        "lora": (listed_loras(), {"tooltip": "a LoRA that is added to those of the side"}),
        "weight": ("FLOAT", {**limits, "tooltip": tip}),
    }


def more_inputs(kind: str) -> Inputs:
    """The two sockets for LoRAs that are added to those of the menus, as another node gives them."""
    tip = "from K-LoRA side: LoRAs that are added to the {side}, which then is the weighted sum of them all"
    return {f"more_{side}": (kind, {"tooltip": tip.format(side=side)}) for side in SIDES}


def setting_inputs(names: Iterable[str]) -> Inputs:
    """The inputs of settings, by name."""
    options = shown_options()
    return {name: _input(name, options[name]) for name in names}


def steps_input() -> Inputs:
    """The number of steps that is drawn or told of."""
    tip = "steps of the sampler that the picture or text is about; while sampling, the sampler's own number counts"
    return {"steps": ("INT", {"default": 20, "min": 1, "max": 10_000, "tooltip": tip})}


def read_settings(values: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Settings:
    """Make settings of a node's `values`, and of `more` from the settings node; SettingsError for a bad one."""
    settings = Settings.parse({**(more or {}), **values})
    make_policy(resolve(settings, None))
    return settings


def _input(name: str, option: Option) -> tuple[Any, dict[str, Any]]:
    default = getattr(Settings(), name)
    common = {"default": AUTO if default is None else default, "tooltip": _tooltip(name, option)}
    if name == "policy":
        return list(POLICIES), common
    if option.choices:
        return list(option.choices), common
    if option.optional or option.kind is str:
        return "STRING", common
    # ComfyUI takes no number without a limit for less than its own.
    limits = {"min": option.low if option.low is not None else -(2**31), "max": option.high or 2**31}
    if option.kind is int:
        return "INT", {**common, **{bound: int(value) for bound, value in limits.items()}}
    return "FLOAT", {**common, **limits, "step": 0.05, "round": 0.001}


def _tooltip(name: str, option: Option) -> str:
    owners = policies_with(name)
    return f"{option.label}: {option.help}" + (f" (policy {', '.join(owners)} only)" if owners else "")
