"""The methods of a comparison: policies, each with settings of its own where it is given some."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from klora.errors import KloraError, SettingsError
from klora.fusion.policies import POLICIES
from klora.settings import Settings

ALL = "all"
# A value may hold commas (preset=0.5,0.5), but it never continues with a letter behind one.
_BETWEEN = re.compile(r",(?=\s*[A-Za-z])")


@dataclass(frozen=True)
class Method:
    """One way to fuse a pair; `name` is as a person writes it: the policy, then what it sets, behind colons."""

    name: str
    settings: Settings

    @property
    def forwards(self) -> int:
        """How many forwards of the denoiser one evaluation takes at most."""
        return POLICIES[self.settings.policy].forwards

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return slug(self.name)


def slug(name: str) -> str:
    """Write a name with signs that every file system takes."""
    return re.sub(r"[^\w.=+-]+", "_", name)


def read_methods(text: str, common: Settings) -> list[Method]:
    """Read `k-lora,direct:preset=0.5,0.5`, or `all` for every policy; `common` holds what is the same for all.

    Raises KloraError naming the policy or the setting at fault.
    """
    items = [item.strip() for item in _BETWEEN.split(text)]
    names = [name for item in items for name in (POLICIES if item == ALL else (item,))]
    return list({method.name: method for method in (_method(name, common) for name in names)}.values())


def _method(text: str, common: Settings) -> Method:
    policy, *parts = text.split(":")
    if policy not in POLICIES:
        raise KloraError(f"--policies: {policy!r} is not one of {ALL}, {', '.join(POLICIES)}")
    try:
        settings = Settings.parse({**common.to_dict(), **_own(text, parts), "policy": policy})
    except SettingsError as error:
        raise KloraError(f"--policies: {text}: {error}") from None
    return Method(text, settings)


def _own(text: str, parts: list[str]) -> Mapping[str, str]:
    pairs = [part.partition("=") for part in parts]
    if not all(equals for _, equals, _ in pairs):
        raise KloraError(f"--policies: {text}: settings follow a policy as :name=value")
    if any(name == "policy" for name, _, _ in pairs):
        raise KloraError(f"--policies: {text}: the policy is what comes first")
    return {name: value for name, _, value in pairs}
