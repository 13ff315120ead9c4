"""One settings model: what it accepts, refuses and resolves."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.errors import SettingsError
from klora.fusion.policies import resolve
from klora.settings import Settings, options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -1),
        ("beta", -0.1),
        ("beta", "nan"),
        ("alpha", math.inf),
        ("balance", 2.5),
        ("share", 1.2),
        ("k", 0),
        ("k", 1.5),
        ("k", True),
        ("gamma", 0),
        ("scale", "s**"),
        ("scope", "everything"),
        ("text_encoder", None),
        ("steps", 0),
        ("subject_strength", "strong"),
        ("subject_strength", [1.0]),
        ("subject_strength", np.zeros((9, 9))),
        ("subject_strength", np.bool_(True)),
    ],
)
def test_an_impossible_value_is_refused_by_field(name: str, value: object) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.parse({name: value})
    assert caught.value.field == name
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_are_numbers() -> None:
    found = Settings.parse(
        {"balance": np.float32(0.5), "share": Fraction(1, 4), "steps": np.int64(12), "k": np.uint8(3)}
    )
    assert (found.balance, found.share, found.steps, found.k) == (0.5, 0.25, 12, 3)
    assert json.loads(json.dumps(found.to_dict()))["steps"] == 12


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(SettingsError, match="did you mean balance"):
        Settings.parse({"balence": 1})


def test_s_star_needs_an_alpha_above_zero() -> None:
    with pytest.raises(SettingsError, match="alpha"):
        Settings.parse({"scale": "s*", "alpha": 0})
    assert Settings.parse({"scale": "s", "alpha": 0}).alpha == 0


def test_an_alpha_of_zero_is_refused_when_the_model_leads_to_s_star() -> None:
    with pytest.raises(SettingsError, match="alpha"):
        Settings.parse({"alpha": 0}).resolve("FLUX")


@pytest.mark.parametrize(
    ("given_settings", "architecture", "expected"),
    [
        ({}, "SDXL", {"scale": "s", "alpha": 1.5, "beta": 0.5, "scope": "all", "other_layers": "both"}),
        ({}, None, {"scale": "s", "beta": 0.5, "text_encoder": "both"}),
        ({}, "FLUX", {"scale": "s*", "alpha": 1.5, "beta": 1.3}),
        ({"policy": "fixed"}, "FLUX", {"scale": "s", "beta": 0.5}),
        ({"variant": "official"}, "FLUX", {"scale": "s*", "beta": 1.275}),
        (
            {"variant": "official"},
            "SDXL",
            {"scale": "s", "beta": 0.5, "scope": "attention", "other_layers": "none", "text_encoder": "none"},
        ),
        ({"variant": "official", "scope": "linear"}, "SDXL", {"scope": "linear"}),
        ({"scale": "s", "beta": 0.25}, "FLUX", {"scale": "s", "beta": 0.25}),
    ],
)
def test_what_is_left_open_is_resolved_by_model_and_variant(
    given_settings: dict, architecture: str | None, expected: dict
) -> None:
    resolved = resolve(Settings.parse(given_settings), architecture).to_dict()
    assert {name: resolved[name] for name in expected} == expected


def _values(name: str) -> st.SearchStrategy:
    option = options()[name]
    if option.kind is str:
        return st.sampled_from(option.choices) if option.choices else st.just("k-lora")
    low = option.low if option.low is not None else 0.0
    high = option.high if option.high is not None else 1e6
    if option.kind is int:
        values = st.integers(math.ceil(low), math.floor(high))
    else:
        values = st.floats(low, high, exclude_min=option.above is not None)
    return st.one_of(st.none(), values) if option.optional else values


@given(st.fixed_dictionaries({name: _values(name) for name in options()}))
def test_settings_survive_json_and_text(values: dict) -> None:
    if values["scale"] == "s*" and values["alpha"] == 0:
        values["alpha"] = None
    settings = Settings.parse(values)
    assert Settings.parse(json.loads(json.dumps(settings.to_dict()))) == settings
    assert dataclasses.replace(Settings.parse(settings.changed()), engine=settings.engine) == settings
    as_text = {
        name.replace("_", "-"): "auto" if value is None else str(value) for name, value in settings.to_dict().items()
    }
    assert Settings.parse(as_text) == settings


NO_SETTING = st.text(max_size=3).filter(lambda name: name not in options())


@given(st.dictionaries(NO_SETTING, st.one_of(st.none(), st.text(), st.floats(), st.booleans()), max_size=3))
def test_hostile_values_raise_nothing_but_a_settings_error(values: dict) -> None:
    if not values:
        return
    with pytest.raises(SettingsError) as caught:
        Settings.parse(values)
    assert "\n" not in str(caught.value)
