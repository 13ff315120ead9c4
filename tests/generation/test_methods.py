"""Methods of a comparison, as a person writes them."""

from __future__ import annotations

import pytest

from klora.errors import KloraError
from klora.fusion.policies import POLICIES
from klora.generation.methods import read_methods
from klora.settings import Settings


def test_all_means_every_policy_once() -> None:
    methods = read_methods("fixed, all", Settings())
    assert [method.name for method in methods] == ["fixed", *(name for name in POLICIES if name != "fixed")]


def test_a_method_has_settings_of_its_own_above_the_common_ones() -> None:
    one, two = read_methods("direct:preset=0.5,0.5,k-lora:scale=s*:alpha=1", Settings(alpha=1.2, steps=7))
    assert (one.settings.policy, one.settings.preset, one.settings.alpha) == ("direct", "0.5,0.5", 1.2)
    assert (two.settings.scale, two.settings.alpha, two.settings.steps) == ("s*", 1.0, 7)
    assert (one.slug, two.slug) == ("direct_preset=0.5_0.5", "k-lora_scale=s_alpha=1")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("best", "'best' is not one of all, k-lora"),
        ("", "'' is not one of"),
        ("k-lora:alpha=x", "k-lora:alpha=x: alpha: 'x'"),
        ("k-lora:alpha", ":name=value"),
        ("k-lora:colour=red", "unknown setting"),
        ("k-lora:policy=direct", "comes first"),
    ],
)
def test_what_is_no_method_is_named(text: str, named: str) -> None:
    with pytest.raises(KloraError, match="--policies") as caught:
        read_methods(text, Settings())
    assert named in str(caught.value)
