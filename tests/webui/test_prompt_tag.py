"""Tags, good and bad: text → tag → text, and nothing but KloraError for nonsense."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.errors import KloraError
from klora.settings import Settings, shown_options
from klora.webui.prompt_tag import Tag, find_tag

_LETTERS = st.characters(blacklist_characters=":<>=", blacklist_categories=("Cc", "Cs", "Zl", "Zp"))
NAMES = st.text(_LETTERS, min_size=1).map(str.strip).filter(bool)


@st.composite
def settings(draw: st.DrawFn) -> Settings:
    values = {}
    for name, option in shown_options().items():
        if not draw(st.booleans()):
            continue
        # All numbers without a lowest value have a bound that is just too low.
        low = 1e-6 if option.low is None else option.low
        high = 1e6 if option.high is None else option.high
        if option.choices:
            values[name] = draw(st.sampled_from(option.choices))
        elif option.kind is float:
            values[name] = draw(st.floats(low, high))
        elif option.kind is int:
            values[name] = draw(st.integers(int(low), int(high)))
    if values.get("scale") == "s*" and values.get("alpha") == 0:
        del values["alpha"]
    return Settings(**values)


@given(NAMES, NAMES, settings())
def test_what_is_written_reads_back_the_same(subject: str, style: str, given: Settings) -> None:
    tag = Tag(subject, style, given)
    text = str(tag)
    assert Tag.parse(text[1:-1].split(":")[1:]) == tag
    found = find_tag(f"a dog, {text} in the snow <lora:x:1>")
    assert found == tag


# A host has split at ":" and stopped at ">".
PIECES = st.text(st.characters(blacklist_characters=":>"), max_size=20)


@given(st.lists(PIECES, max_size=12))
def test_nonsense_raises_nothing_else(items: list[str]) -> None:
    try:
        tag = Tag.parse(items)
    except KloraError:
        return
    assert Tag.parse(str(tag)[1:-1].split(":")[1:]) == tag


_PIECES = st.one_of(
    st.sampled_from([field.name for field in dataclasses.fields(Settings)]).flatmap(
        lambda name: st.one_of(st.text(max_size=8), st.floats().map(repr), st.integers().map(str)).map(
            lambda value: f"{name}={value}"
        )
    ),
    st.floats().map(repr),
    st.text(max_size=8),
)


@given(st.lists(_PIECES, max_size=5))
def test_almost_right_raises_nothing_else(items: list[str]) -> None:
    with contextlib.suppress(KloraError):
        Tag.parse(["dog", "ink", *items])


@given(st.text())
def test_any_prompt_can_be_searched(prompt: str) -> None:
    for text in (prompt, f"<klora:{prompt}"):
        with contextlib.suppress(KloraError):
            found = find_tag(text)
            assert found is None or "<klora:" in text


@given(st.text().filter(lambda prompt: "<klora:" not in prompt))
def test_a_tag_is_found_behind_any_prompt(prompt: str) -> None:
    assert find_tag(f"{prompt}<klora:a:b>") == Tag("a", "b", Settings())


@pytest.mark.parametrize("text", ["<klora:>", "<klora>", "<k-lora:a:b>", "<KLORA:a:b>", "klora:a:b", "<klora:a:b", ""])
def test_what_a_host_takes_for_no_tag_is_none(text: str) -> None:
    assert find_tag(text) is None


def test_two_strengths_then_names() -> None:
    tag = find_tag("x <klora: dog : ink :0.9:1.1:scale=S*:beta=0.6:text-encoder=none> y")
    assert tag is not None
    assert (tag.subject, tag.style) == ("dog", "ink")
    assert tag.settings == Settings(subject_strength=0.9, style_strength=1.1, scale="s*", beta=0.6, text_encoder="none")
    assert str(tag) == "<klora:dog:ink:0.9:1.1:scale=s*:beta=0.6:text_encoder=none>"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<klora:dog>", "a subject and a style"),
        ("<klora::ink>", "a subject and a style"),
        ("<klora:dog:0.5=x>", "a subject and a style"),
        ("<klora:dog:ink:1:1:1>", "one number too many"),
        ("<klora:dog:ink:x>", "'x' is not a number"),
        ("<klora:dog:ink:beta=1:beta=2>", "given twice"),
        ("<klora:dog:ink:1:subject_strength=2>", "given twice"),
        ("<klora:dog:ink:betta=1>", "did you mean beta?"),
        ("<klora:dog:ink:beta=nan>", "not a finite number"),
        ("<klora:dog:ink:k=1.5>", "whole number"),
        ("<klora:dog:ink:scale=s**>", "'s**' is not one of"),
        ("<klora:dog:ink:beta>", "'beta' is not a number"),
    ],
)
def test_a_bad_tag_is_quoted_with_its_fault(text: str, says: str) -> None:
    with pytest.raises(KloraError) as failed:
        find_tag(text)
    assert text in str(failed.value)
    assert says in str(failed.value)


def test_a_setting_is_given_once_however_its_name_is_written() -> None:
    with pytest.raises(KloraError, match="text_encoder: is given twice"):
        Tag.parse(["dog", "ink", "text-encoder=none", "text_encoder=both"])


def test_free_text_may_hold_the_signs_of_a_tag_and_numbers_may_not_be_quoted() -> None:
    tag = Tag("dog", "ink", Settings(policy="dynamic", style_refs="a=b:c>d<e|f,g(h)[i]100%;j"))
    text = str(tag)
    assert set(text[1:-1].partition("style_refs=")[2]).isdisjoint(":<>()[]|,")
    assert find_tag(f"a dog {text}") == tag
    with pytest.raises(KloraError, match="balance"):
        Tag.parse(["dog", "ink", "balance=%31"])
