"""The policies, one small file each; a new one is a file and a line in `POLICIES`."""

from __future__ import annotations

from klora.errors import SettingsError
from klora.fusion.policies.base import Policy
from klora.fusion.policies.direct import Direct
from klora.fusion.policies.fixed import Fixed
from klora.fusion.policies.k_lora import KLora, NoGamma, TopKOnly
from klora.fusion.policies.random import Random
from klora.settings import Settings

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (KLora, Direct, Fixed, Random, TopKOnly, NoGamma)
}


def make_policy(settings: Settings) -> Policy:
    """Make the policy that `settings` (resolved) name; raise SettingsError where they do not fit together."""
    if settings.policy not in POLICIES:
        raise SettingsError("policy", f"{settings.policy!r} is not one of {', '.join(POLICIES)}")
    policy = POLICIES[settings.policy]
    if not policy.balanced and settings.share is not None:
        raise SettingsError("share", f"the policy {policy.name} takes no share target; leave it at auto")
    return policy(settings)
