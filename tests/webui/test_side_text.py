"""Sides of several LoRAs as text: in a tag, in a menu, over the API, and in a pasted picture's text."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.errors import KloraError, SettingsError
from klora.webui.args import read_values
from klora.webui.infotext import from_infotext, rename_by_hash
from klora.webui.prompt_tag import Tag, find_tag
from klora.webui.several import added, rows_of
from klora.webui.side_text import join_side, split_side
from klora.webui.sides import find_side

names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)
weights = st.floats(-10, 10).map(lambda weight: weight or 0.0)
sides = st.lists(st.tuples(names, weights), min_size=1, max_size=4)


class Library:
    """Knows some names."""

    def __init__(self, *known: str) -> None:
        self.known = known

    def knows(self, name: str) -> bool:
        return name in self.known

    def find(self, name: str) -> Any:
        if name not in self.known:
            raise KloraError(f"there is no LoRA named {name!r}")
        return SimpleNamespace(name=name)


def found(text: str, *known: str) -> list[tuple[str, float]]:
    return [(one.lora.name, one.weight) for one in find_side(text, "subject", Library(*known))]  # type: ignore[arg-type]


@given(sides)
def test_what_is_written_is_read_back(side: list[tuple[str, float]]) -> None:
    assert split_side(join_side(side), "subject") == side


@given(sides, sides)
def test_a_tag_of_sides_is_read_back(subject: list[tuple[str, float]], style: list[tuple[str, float]]) -> None:
    request = read_values(
        {
            "subject": [{"name": name, "weight": weight} for name, weight in subject],
            "style": [{"name": name, "weight": weight} for name, weight in style],
        }
    )
    tag = find_tag(f"a cat {request.tag} on a mat")
    assert tag == request.tag
    assert split_side(tag.subject, "subject") == subject
    assert split_side(tag.style, "style") == style
    assert from_infotext({"Prompt": f"a cat {tag}"})["style"] == tag.style


def test_names_and_weights_are_found() -> None:
    assert found("dog*0.8 + coat*0.5", "dog", "coat") == [("dog", 0.8), ("coat", 0.5)]
    assert found("ink+grain", "ink", "grain") == [("ink", 1.0), ("grain", 1.0)]
    assert found("dog * -1", "dog") == [("dog", -1.0)]
    assert found("a%2Bb*2", "a+b") == [("a+b", 2.0)]
    with pytest.raises(KloraError, match="no LoRA named 'coat'"):
        found("dog + coat", "dog")
    for bad, error in (
        ("dog +", KloraError),
        ("*2", KloraError),
        ("dog*much", SettingsError),
        ("dog*11", SettingsError),
    ):
        with pytest.raises(error):
            found(bad, "dog")


def test_a_name_that_has_such_signs_itself_is_tried_first() -> None:
    assert found("dog*0.8 + coat", "dog*0.8 + coat", "dog", "coat") == [("dog*0.8 + coat", 1.0)]
    assert found("50%2B", "50%2B") == [("50%2B", 1.0)]
    assert found("a+b%3Ac", "a+b:c", "a") == [("a+b:c", 1.0)]


def test_a_list_of_one_is_that_one() -> None:
    assert read_values({"subject": ["dog"], "style": [{"name": "ink"}]}).tag == Tag.parse(["dog", "ink"])


@pytest.mark.parametrize(
    "bad", [[], [3], [""], [{"weight": 1}], [{"name": "dog", "wait": 1}], [{"name": "a", "weight": "x"}]]
)
def test_a_list_that_names_no_side_is_refused(bad: list[Any]) -> None:
    with pytest.raises(SettingsError, match=r"^subject: "):
        read_values({"subject": bad, "style": "ink"})


def test_every_part_of_a_pasted_side_is_found_by_its_hash() -> None:
    params = {
        "Prompt": "a cat <klora:dog*0.8 + coat*0.5:ink + gr%2Bain:0.9> <klora:dog:ink>",
        "Lora hashes": "dog: 111111111111, coat: 222222222222, gr+ain: 333333333333",
    }
    here = {"111111111111": "hound", "333333333333": "noise+"}
    rename_by_hash(params, lambda _name, value: here.get(value))
    assert params["Prompt"] == "a cat <klora:hound*0.8 + coat*0.5:ink + noise%2B:0.9> <klora:hound:ink>"


class Names:
    """Knows some names, one of them with a sign of the notation."""

    def names(self) -> list[str]:
        return ["dog", "coat", "a+b"]

    def knows(self, name: str) -> bool:
        return name in self.names()

    def refresh(self) -> None:
        pass


def test_the_menus_of_the_accordion_add_to_what_a_side_says() -> None:
    assert added("None", "a+b", Names) == "a+b"
    assert added("dog*0.8", "coat", Names) == "dog*0.8 + coat"
    assert added("dog*0.8 + coat*0.5", "a+b", Names) == "dog*0.8 + coat*0.5 + a%2Bb"
    assert added("a+b", "dog", Names) == "a%2Bb + dog"
    assert added("dog", "None", Names) == "dog"


@pytest.mark.parametrize("text", ["None", "", "dog", "a+b", "gone"])
def test_a_side_of_one_has_no_rows(text: str) -> None:
    assert rows_of((text, "coat"), Names) == ""


def test_a_side_of_several_has_a_row_for_each_with_its_weight() -> None:
    rows = re.findall(
        r'data-name="([^"]*)".*?>([^<]*)</span>.*?value="([^"]*)"', rows_of(("dog*0.8 + a%2Bb", "x"), Names)
    )
    assert rows == [("dog", "dog", "0.8"), ("a%2Bb", "a+b", "1")]
    assert re.findall('aria-label="([^"]*)"', rows_of(("dog*2", "x"), Names)) == ["dog", "Remove dog"]
    assert "<x>" not in rows_of(("<x>*2", "dog"), Names)
