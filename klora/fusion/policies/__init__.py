"""The policies, one small file each; a new one is a file and a line in `POLICIES`."""

from __future__ import annotations

from klora.errors import SettingsError
from klora.fusion.policies.b_lora import BLora
from klora.fusion.policies.base import Policy, ScaledPolicy
from klora.fusion.policies.cm_lora import CmLora
from klora.fusion.policies.composite import Composite
from klora.fusion.policies.dare import Dare
from klora.fusion.policies.direct import Direct
from klora.fusion.policies.dynamic import Dynamic
from klora.fusion.policies.est import Est
from klora.fusion.policies.fixed import Fixed
from klora.fusion.policies.k_lora import KLora, NoGamma, TopKOnly
from klora.fusion.policies.knots import Knots
from klora.fusion.policies.lego import Lego
from klora.fusion.policies.magnitude_prune import MagnitudePrune
from klora.fusion.policies.np_lora import NpLora
from klora.fusion.policies.random import Random
from klora.fusion.policies.switch import Switch
from klora.fusion.policies.ties import Ties
from klora.fusion.windows import Windows
from klora.lora.blocks import block_weights
from klora.settings import Settings

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        KLora,
        Dynamic,
        Direct,
        Switch,
        Composite,
        CmLora,
        BLora,
        Est,
        NpLora,
        Lego,
        Ties,
        Dare,
        MagnitudePrune,
        Knots,
        Fixed,
        Random,
        TopKOnly,
        NoGamma,
    )
}


OF_SCALES = frozenset({"balance", "share", "scale", "alpha", "beta", "k", "gamma", "variant"})
"""Settings that only a policy heeds that compares a ratio with a scale."""


def policies_with(setting: str) -> tuple[str, ...]:
    """The policies whose own setting this is; empty where it is for all."""
    return tuple(name for name, policy in POLICIES.items() if setting in policy.own_settings)


def is_heeded(setting: str, policy: str) -> bool:
    """Whether a setting has a meaning under a policy."""
    if setting in OF_SCALES:
        return policy not in POLICIES or issubclass(POLICIES[policy], ScaledPolicy)
    owners = policies_with(setting)
    return not owners or policy in owners


def resolve(settings: Settings, architecture: str | None) -> Settings:
    """Fill in everything left to K-LoRA, for a model of `architecture` (None: unknown) and the policy in force."""
    policy = POLICIES.get(settings.policy)
    return settings.resolve(architecture, policy.defaults if policy else {})


def make_policy(settings: Settings) -> Policy:
    """Make the policy that `settings` (resolved) name.

    Raises SettingsError where they do not fit together.
    """
    if settings.policy not in POLICIES:
        raise SettingsError("policy", f"{settings.policy!r} is not one of {', '.join(POLICIES)}")
    policy = POLICIES[settings.policy]
    if settings.share is not None and not issubclass(policy, ScaledPolicy):
        raise SettingsError("share", f"the policy {policy.name} takes no share target; leave it at auto")
    Windows.of(settings)
    block_weights(settings)
    return policy(settings)
