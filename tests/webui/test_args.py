from __future__ import annotations

import math
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.errors import KloraError, SettingsError
from klora.fusion.policies import POLICIES
from klora.settings import Settings, options, shown_options
from klora.webui.args import (
    ARG_ORDER,
    NONE,
    NOT_OURS,
    FusionRequest,
    asks_for_more,
    choices_of,
    json_schema,
    override,
    override_tag,
    read_args,
    read_values,
    text_of,
    truth,
)
from klora.webui.injection import add_tag, apply_request, rewrite
from klora.webui.prompt_tag import Tag, find_tag

PUBLISHED = [
    *("enabled", "subject", "style", "subject_strength", "style_strength", "balance", "share"),
    *("policy", "variant", "scale", "alpha", "beta", "k", "gamma"),
    *("scope", "other_layers", "text_encoder", "unpaired", "progress", "passes", "engine", "seed", "show_map"),
]

NAMES = st.text(st.characters(exclude_characters=":<>=\r\n", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name.strip() == name and name != NONE
)

LINES = st.text().filter(str.isprintable)
BLOCKS = st.lists(
    st.tuples(LINES.filter(lambda name: name.strip(":= ") and "," not in name), st.floats(-10, 10)), max_size=3
).map(lambda blocks: ", ".join(f"{name}: {weight}" for name, weight in blocks))


@st.composite
def settings_of_a_user(draw: st.DrawFn) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, option in shown_options().items():
        if name in NOT_OURS or draw(st.booleans()):
            continue
        if choices := choices_of(name, option):
            values[name] = draw(st.sampled_from(choices))
        elif option.free:
            values[name] = draw(BLOCKS if name.endswith("_blocks") else LINES).strip()
        elif option.kind is int:
            values[name] = draw(st.integers(int(option.low or 0), int(option.high or 2**40)))
        else:
            low, high = option.low if option.low is not None else 0.0, option.high if option.high is not None else 1e6
            values[name] = draw(st.floats(low, high, exclude_min=option.above is not None))
    try:
        read_values({"subject": "a", "style": "b", **values})
    except KloraError:
        for name in ("share", "alpha", "subject_from", "subject_to", "style_from", "style_to"):
            values.pop(name, None)
    return values


def requests() -> st.SearchStrategy[FusionRequest]:
    return st.builds(
        lambda subject, style, values: read_values({"subject": subject, "style": style, **values}),
        NAMES,
        NAMES,
        settings_of_a_user(),
    )


def test_the_positional_order_is_only_ever_appended_to() -> None:
    assert list(ARG_ORDER[: len(PUBLISHED)]) == PUBLISHED
    assert {*ARG_ORDER} == {*PUBLISHED, *options()} - {*NOT_OURS}


def test_nothing_or_unticked_asks_for_nothing() -> None:
    assert read_args([]) is None
    assert read_args([{}]) is None
    assert read_args([False, "dog", "ink"]) is None
    assert read_args([{"enabled": False, "beta": "rubbish"}]) is None


def test_an_object_that_says_anything_is_meant() -> None:
    request = read_args([{"subject": "dog", "style": "ink", "beta": 0.6}, NONE, "surplus defaults of the host"])
    assert request == FusionRequest("dog", "ink", Settings(beta=0.6))


def test_positional_and_object_mean_the_same() -> None:
    positional = [True, "dog", "ink", 0.9, 1.1, -0.5]
    by_name = {"subject": "dog", "style": "ink", "subject-strength": 0.9, "style_strength": "1.1", "balance": -0.5}
    assert read_args(positional) == read_args([by_name])


@given(requests())
def test_what_is_written_as_a_tag_reads_back_the_same(request_: FusionRequest) -> None:
    assert find_tag(f"a dog {request_.tag} on grass") == request_.tag


@given(requests(), st.booleans())
def test_positional_controls_read_back_the_same(request_: FusionRequest, show_map: bool) -> None:
    values = {**request_.settings.to_dict(), "enabled": True, "subject": request_.subject, "style": request_.style}
    values["show_map"] = show_map
    read = read_args([text_of(values[name]) for name in ARG_ORDER])
    assert read is not None
    assert (read.tag, read.show_map) == (request_.tag, show_map)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(ARG_ORDER) | st.text(), JSON) | st.none(), st.lists(JSON))
def test_anything_at_all_gives_a_request_or_an_error_that_names_a_field(given_: Any, more: list[Any]) -> None:
    field, request = "", None
    try:
        request = read_args([given_, *more])
    except SettingsError as error:
        field = error.field
    else:
        field = "none"
    assert field
    assert request is None or isinstance(request, FusionRequest)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"subject": "dog"}, "style"),
        ({"subject": NONE, "style": "ink"}, "subject"),
        ({"subject": 3, "style": "ink"}, "subject"),
        ({"subject": "dog", "style": "ink", "bta": 1}, "bta"),
        ({"subject": "dog", "style": "ink", "steps": 9}, "steps"),
        ({"subject": "dog", "style": "ink", "beta": -1}, "beta"),
        ({"subject": "dog", "style": "ink", "beta": math.nan}, "beta"),
        ({"subject": "dog", "style": "ink", "balance": True}, "balance"),
        ({"subject": "dog", "style": "ink", "policy": "nonsense"}, "policy"),
        ({"subject": "dog", "style": "ink", "policy": "random", "share": 0.5}, "share"),
        ({"subject": "dog", "style": "ink", "show_map": "perhaps"}, "show_map"),
        ({"enabled": "perhaps"}, "enabled"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_args([values])
    assert caught.value.field == field


@pytest.mark.parametrize("side", ["subject", "style"])
def test_a_menu_left_at_none_is_asked_for_in_words(side: str) -> None:
    with pytest.raises(SettingsError, match=rf"^Choose a {side} LoRA$") as caught:
        read_args([{"subject": "dog", "style": "ink", side: NONE}])
    assert (caught.value.field, caught.value.reason) == (side, f"Choose a {side} LoRA")


def test_too_many_values_are_refused() -> None:
    with pytest.raises(SettingsError):
        read_args([True, "dog", "ink"] + [None] * len(ARG_ORDER))


class Processing:
    """The part of a processing object that an injection touches."""

    def __init__(self, *prompts: str, hires: list[str] | None = None, overrides: dict[str, Any] | None = None) -> None:
        self.given = list(prompts)
        self.all_prompts = self.given
        self.main_prompt = prompts[0]
        self.enable_hr = hires is not None
        self.all_hr_prompts = hires
        self.comments: list[str] = []
        self.extra_generation_params: dict[str, Any] = {}
        if overrides is not None:
            self.klora_overrides = overrides

    def comment(self, text: str) -> None:
        self.comments.append(text)


ARGS = [{"subject": "dog", "style": "ink", "beta": 0.6}]
TAG = "<klora:dog:ink:beta=0.6>"


def test_the_accordion_writes_its_tag_into_every_prompt_and_edits_no_list() -> None:
    p = Processing("a", "b", hires=["c", "<klora:x:y>"])
    assert apply_request(p, ARGS) is not None
    assert p.all_prompts == [f"a {TAG}", f"b {TAG}"]
    assert p.all_hr_prompts == [f"c {TAG}", "<klora:x:y>"]
    assert p.main_prompt == f"a {TAG}"
    assert p.given == ["a", "b"]


def test_a_typed_tag_wins_over_the_accordion_good_or_bad() -> None:
    for typed in ("a <klora:x:y:0.5>", "a <klora:x>"):
        p = Processing(typed, hires=["c"])
        assert apply_request(p, ARGS) is None
        assert p.all_prompts == [typed]
        assert p.all_hr_prompts == ["c"]
        assert [one for one in p.comments if "the <klora:…> tag in the prompt counts" in one] == p.comments != []


@pytest.mark.parametrize("args", [[False], [False, "dog", "ink"], [{}], [{"show_map": True}], [{"enabled": False}]])
def test_a_typed_tag_alone_needs_no_word(args: list[Any]) -> None:
    p = Processing("a <klora:x:y>")
    apply_request(p, args)
    assert p.comments == []


@pytest.mark.parametrize("args", [{"beta": "much"}, {"bta": 1}, {"subject": "dog", "style": 3}, {"policy": "none"}])
def test_a_typed_tag_silences_no_bad_arguments(args: dict[str, Any]) -> None:
    p = Processing("a <klora:x:y>")
    apply_request(p, [args])
    assert p.all_prompts == ["a <klora:x:y>"]
    assert next(iter(args)).replace("subject", "style") in p.extra_generation_params["K-LoRA error"]
    assert "what is set beside it is bad" in p.comments[0]


@pytest.mark.parametrize(
    ("args", "more"),
    [
        ([], False),
        ([None, "dog"], False),
        ([False, "dog"], False),
        ([True], False),
        ([{"enabled": True, "show_map": True}], False),
        ([{"enabled": True, "subject": "dog"}], True),
        ([{"enabled": True, "subject": NONE}], True),
        ([{"enabled": True, "beta": 0.4}], True),
        ([{"enabled": False, "beta": 0.4}], False),
    ],
)
def test_whether_the_accordion_asks_for_more_than_the_map(args: list[Any], more: bool) -> None:
    assert asks_for_more(args) is more


@pytest.mark.parametrize("values", [{"enabled": "perhaps"}, {"enabled": True, "show_map": "perhaps"}])
def test_what_is_neither_yes_nor_no_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        asks_for_more([values])
    assert caught.value.field == list(values)[-1]


@pytest.mark.parametrize("args", [ARGS, [False]])
@pytest.mark.parametrize("typed", ["<klora:dog", "<klora:", "<klora:>", "<KLORA:x:y>", "<Klora:x", "<k-lora:x:y>"])
def test_what_only_looks_like_a_tag_is_told_of_and_the_accordion_acts(typed: str, args: list[Any]) -> None:
    p = Processing(f"a {typed}", hires=["c"])
    assert (apply_request(p, args) is not None) == (args is ARGS)
    assert [TAG in prompt for prompt in [*p.all_prompts, *(p.all_hr_prompts or [])]] == [args is ARGS] * 2
    assert len(p.comments) == 1
    assert "does nothing" in p.comments[0]
    assert "write <klora:subject:style>" in p.comments[0]


def test_bad_arguments_change_nothing() -> None:
    p = Processing("a")
    with pytest.raises(SettingsError):
        apply_request(p, [{"subject": "dog", "style": "ink", "k": 0.5}])
    assert p.all_prompts == ["a"]


def test_an_axis_changes_the_accordion_and_a_typed_tag() -> None:
    p = Processing("a", overrides={"beta": 0.9, "style": "oil"})
    apply_request(p, ARGS)
    assert p.all_prompts == ["a <klora:dog:oil:beta=0.9>"]
    p = Processing("a <klora:x:y:alpha=2> b <klora:second:one>", overrides={"beta": 0.9})
    apply_request(p, [False])
    assert p.all_prompts == ["a <klora:x:y:alpha=2:beta=0.9> b <klora:second:one>"]


def test_axes_of_both_names_need_no_accordion_and_other_axes_a_pair() -> None:
    p = Processing("a", overrides={"subject": "dog", "style": "ink"})
    apply_request(p, [False])
    assert p.all_prompts == ["a <klora:dog:ink>"]
    with pytest.raises(KloraError, match="axis needs a pair"):
        apply_request(Processing("a", overrides={"beta": 1.0}), [False])


def test_a_balance_axis_is_not_overruled_by_a_share() -> None:
    assert override_tag(Tag("a", "b", Settings(share=0.5)), {"balance": 1.0}).settings == Settings(balance=1.0)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_tag_is_found_by_the_host_after_any_prompt(prompt: str) -> None:
    import re

    tag = str(Tag("dog", "ink", Settings(beta=0.6)))
    found = [match.group(0) for match in re.finditer(r"<(\w+):([^>]+)>", add_tag(prompt, tag))]
    assert tag in found


def test_a_comment_at_the_end_does_not_swallow_the_tag() -> None:
    assert add_tag("a dog # remark", TAG) == f"{TAG} a dog # remark"
    assert add_tag("a dog <lora:x", TAG) == f"{TAG} a dog <lora:x"
    assert add_tag("", TAG) == TAG


def test_a_bad_typed_tag_stays_as_it_is() -> None:
    assert rewrite("a <klora:x>", {"beta": 1.0}) == "a <klora:x>"


def test_the_schema_describes_every_argument_in_order() -> None:
    schema = json_schema()
    assert list(schema["properties"]) == list(ARG_ORDER)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["policy"]["enum"] == list(POLICIES)
    assert schema["properties"]["balance"] == {
        "type": "number",
        "title": "Balance",
        "description": options()["balance"].help,
        "minimum": -2.0,
        "maximum": 2.0,
        "default": 0.0,
    }
    assert schema["properties"]["gamma"]["exclusiveMinimum"] == 0.0
    assert schema["properties"]["beta"]["default"] == "auto"
    assert all("title" in described for described in schema["properties"].values())


def test_an_axis_of_the_balance_drops_a_share_and_an_axis_of_both_keeps_it() -> None:
    assert override({"share": 0.5, "balance": 0.0}, {"balance": 1.0}) == {"balance": 1.0}
    assert override({}, {"balance": 1.0}) == {"balance": 1.0}
    assert override({"share": 0.5}, {"balance": 1.0, "share": 0.25}) == {"balance": 1.0, "share": 0.25}
    assert override({"share": 0.5}, {"scope": "all"}) == {"share": 0.5, "scope": "all"}


@pytest.mark.parametrize("text", ["true", "yes", "on", "1", " True ", "YES", "On"])
def test_words_for_yes(text: str) -> None:
    assert truth("enabled", text) is True


@pytest.mark.parametrize("text", ["false", "no", "off", "0", "", " False ", "NO", "Off"])
def test_words_for_no(text: str) -> None:
    assert truth("enabled", text) is False


@pytest.mark.parametrize("value", ["maybe", "XX", 2, None, [], float("nan")])
def test_anything_else_is_neither(value: Any) -> None:
    with pytest.raises(SettingsError, match="enabled"):
        truth("enabled", value)


def test_names_are_taken_without_the_space_around_them_and_an_empty_one_is_none() -> None:
    assert read_values({"subject": " dog ", "style": "ink"}).subject == "dog"
    for empty in ("", "  ", None):
        with pytest.raises(SettingsError) as caught:
            read_values({"subject": "dog", "style": empty})
        assert caught.value.field == "style"


def test_a_misspelt_argument_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(SettingsError, match=r"balence: unknown setting; did you mean balance\?"):
        read_values({"subject": "dog", "style": "ink", "balence": 1})
    with pytest.raises(SettingsError, match="known: enabled, subject, style"):
        read_values({"subject": "dog", "style": "ink", "zzzzzz": 1})
    with pytest.raises(SettingsError, match="3: unknown setting") as error:
        read_args([{3: 1, "subject": "dog"}])
    assert error.value.field == "3"


@pytest.mark.parametrize("args", [[True], [True, NONE, NONE], [True, "dog", NONE], [True, "", "ink", 0.5]])
def test_no_pair_in_the_accordion_is_off(args: list[Any]) -> None:
    assert read_args(args) is None


@given(st.text(min_size=1).filter(lambda name: name.strip() == name and name != NONE and name.isprintable()))
def test_any_name_of_a_file_can_stand_in_a_tag(name: str) -> None:
    tag = read_values({"subject": name, "style": "ink"}).tag
    assert find_tag(f"a dog {tag}") == tag
    if "%" not in name:
        assert unquote(tag.subject) == name


def test_signs_of_the_tag_s_own_are_written_as_in_urls() -> None:
    tag = read_values({"subject": "c:d", "style": "<b>=50%"}).tag
    assert str(tag) == "<klora:c%3Ad:%3Cb%3E%3D50%>"
