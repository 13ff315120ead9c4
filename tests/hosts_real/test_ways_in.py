"""Tag, accordion and API mean the same, and an X/Y/Z plot varies them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hosts_real.server import ApiError, Picture, Server

TAG = "<klora:subj:style>"
BY_TAG = "<klora:subj:style:0.8:1.1:scale=s*:beta=0.6>"
BY_NAME = {
    "subject": "subj",
    "style": "style",
    "subject_strength": 0.8,
    "style_strength": 1.1,
    "scale": "s*",
    "beta": 0.6,
}
# enabled, subject, style, both strengths, balance, share, policy, variant, scale, α, β
BY_PLACE = [True, "subj", "style", 0.8, 1.1, 0, "auto", "k-lora", "paper", "s*", "auto", 0.6]


def call(server: Server, args: list[Any], tags: str = "", **changes: Any) -> Picture:
    return server.txt2img(tags, alwayson_scripts={"K-LoRA": {"args": args}}, **changes)


def told(picture: Picture) -> dict[str, str]:
    """What an image's text says of K-LoRA and of LoRA hashes."""
    entries = (entry.partition(": ") for entry in picture.infotext.splitlines()[-1].split(", "))
    return {key: value for key, _, value in entries if key.startswith(("K-LoRA", "Lora"))}


@pytest.mark.parametrize(
    "args", [[BY_NAME], BY_PLACE, [{**BY_NAME, "enabled": True}]], ids=["object", "places", "enabled"]
)
def test_all_ways_give_the_same_pixels_and_text(server: Server, args: list[Any]) -> None:
    tagged = server.txt2img(BY_TAG)
    called = call(server, args)
    assert called.same(tagged)
    assert called.comments == ""
    assert told(called) == told(tagged)
    assert called.infotext.splitlines()[0] == tagged.infotext.splitlines()[0]


def test_the_script_is_listed(server: Server) -> None:
    found = server.call("/sdapi/v1/scripts")
    assert "k-lora" in found["txt2img"]
    assert "k-lora" in found["img2img"]


def test_disabled_is_as_if_it_were_not_there(server: Server, plain: Picture) -> None:
    for args in ([], [False, "subj", "style"], [{"enabled": False, "subject": "subj", "style": "style"}]):
        picture = call(server, args)
        assert picture.same(plain)
        assert "K-LoRA" not in picture.infotext


def test_a_typed_tag_wins(server: Server) -> None:
    picture = call(server, [{"subject": "style", "style": "subj"}], TAG)
    assert picture.same(server.txt2img(TAG))


def test_hires_and_img2img_through_the_accordion(server: Server, plain: Picture) -> None:
    script = {"alwayson_scripts": {"K-LoRA": {"args": [BY_NAME]}}}
    assert server.hires(**script).same(server.hires(BY_TAG))
    assert server.img2img(plain, **script).same(server.img2img(plain, BY_TAG))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"beta": -1}, "beta"),
        ({"betta": 1}, "betta"),
        ({"subject": "nobody"}, "nobody"),
        ({"subject": "../subj"}, "../subj"),
        ({"subject": 7}, "subject"),
        ({"style": "a:b>"}, "a:b"),
    ],
)
def test_wrong_values_are_named(server: Server, plain: Picture, wrong: dict[str, Any], says: str) -> None:
    # No host lets a script answer 422 here.
    picture = call(server, [{**BY_NAME, **wrong}])
    assert picture.same(plain)
    assert says in picture.comments
    assert "K-LoRA error" in picture.infotext


def test_the_routes(server: Server) -> None:
    assert server.call("/klora/v1/version")["version"]
    assert "beta" in str(server.call("/klora/v1/schema"))
    found = server.call("/klora/v1/analyze", {"subject": "subj", "style": "style", "picture": True})
    assert found["picture"]
    assert found["warnings"] == []
    for body, status, says in (
        ({"subject": "subj", "style": "nobody"}, 404, "nobody"),
        ({"subject": "../../subj", "style": "style"}, 404, "subj"),
        ({"subject": "subj", "style": "style", "beta": -1}, 422, "beta"),
    ):
        with pytest.raises(ApiError) as failed:
            server.call("/klora/v1/analyze", body)
        assert failed.value.status == status
        assert says in failed.value.text
        assert str(server.data) not in failed.value.text


def test_an_analysis_names_what_does_not_fit_the_loaded_model(server: Server) -> None:
    server.txt2img(TAG)
    found = server.call("/klora/v1/analyze", {"subject": "other", "style": "other"})
    assert any("zero modules matched in the SD1 checkpoint" in warning for warning in found["warnings"])
    assert found["coverage"]["contested"]


def test_a_grid_over_a_tag(server: Server) -> None:
    grid = server.plot([("[K-LoRA] Balance", "-1, 0, 1"), ("[K-LoRA] Scale", "s, s*")], TAG)
    singles = grid.all[-6:]
    expected = [
        server.txt2img(f"<klora:subj:style:balance={balance}:scale={scale}>").pixels
        for scale in ("s", "s*")
        for balance in (-1, 0, 1)
    ]
    assert [(one == other).all() for one, other in zip(singles, expected, strict=True)] == [True] * 6


def test_a_grid_over_loras_in_the_accordion(server: Server) -> None:
    axes = [("[K-LoRA] Subject", "subj, subj_all"), ("[K-LoRA] Style strength", "0.5, 1")]
    grid = server.plot(axes, alwayson_scripts={"K-LoRA": {"args": [True, "style", "style"]}})
    expected = [
        server.txt2img(f"<klora:{subject}:style:1:{strength}>").pixels
        for strength in (0.5, 1)
        for subject in ("subj", "subj_all")
    ]
    assert [(one == other).all() for one, other in zip(grid.all[-4:], expected, strict=True)] == [True] * 4


def test_a_wrong_grid_makes_no_picture(server: Server) -> None:
    with pytest.raises(ApiError):
        server.plot([("[K-LoRA] Scale", "s, t")], TAG)
