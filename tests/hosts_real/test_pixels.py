"""What a tag makes of a picture, against the host's own LoRAs."""

from __future__ import annotations

import pytest

from tests.hosts_real.server import Picture, Server

TAG = "<klora:subj:style>"
SUBJECT_ONLY, STYLE_ONLY = "alpha=0:beta=0", "alpha=0:beta=1000000"


def test_a_second_run_gives_the_same_pixels(server: Server, plain: Picture) -> None:
    first = server.txt2img(TAG)
    assert server.txt2img(TAG).same(first)
    assert first.distance(plain) > 5


@pytest.mark.parametrize("kind", ["", "_all", "_te"], ids=["attention", "all modules", "with a text encoder"])
def test_a_forced_winner_is_the_plain_lora(server: Server, kind: str) -> None:
    names = f"subj{kind}:style{kind}"
    # Of the text encoder's part, the one whose UNet part is not there either.
    forced_subject = server.txt2img(f"<klora:{names}:{SUBJECT_ONLY}:text_encoder=subject>")
    forced_style = server.txt2img(f"<klora:{names}:{STYLE_ONLY}:text_encoder=style>")
    subject, style = server.txt2img(f"<lora:subj{kind}:1>"), server.txt2img(f"<lora:style{kind}:1>")
    assert forced_subject.distance(subject) <= 1
    assert forced_style.distance(style) <= 1
    fused = server.txt2img(f"<klora:{names}>")
    assert fused.distance(subject) > 5
    assert fused.distance(style) > 5


def test_strengths_are_the_plain_lora_s(server: Server) -> None:
    forced = server.txt2img(f"<klora:subj:style:0.6:1.2:{SUBJECT_ONLY}>")
    assert forced.distance(server.txt2img("<lora:subj:0.6>")) <= 1
    forced = server.txt2img(f"<klora:subj:style:0.6:1.2:{STYLE_ONLY}>")
    assert forced.distance(server.txt2img("<lora:style:1.2>")) <= 1


def test_the_direct_policy_is_two_plain_loras(server: Server) -> None:
    direct = server.txt2img("<klora:subj:style:policy=direct>")
    assert direct.distance(server.txt2img("<lora:subj:1><lora:style:1>")) <= 1


@pytest.mark.parametrize("kind", ["", "_te"], ids=["attention", "with a text encoder"])
def test_a_peft_pair_is_its_kohya_twin(server: Server, kind: str) -> None:
    # No host itself loads this spelling, or not all of it: reForge loads the text encoder's part.
    assert server.txt2img(f"<lora:subj{kind}_peft:1>").distance(server.txt2img(f"<lora:subj{kind}:1>")) > 5
    kohya = server.txt2img(f"<klora:subj{kind}:style{kind}>")
    assert server.txt2img(f"<klora:subj{kind}_peft:style{kind}_peft>").distance(kohya) <= 1
    assert server.txt2img(f"<klora:subj{kind}_peft:style{kind}>").distance(kohya) <= 1


def test_every_setting_reaches_the_picture(server: Server) -> None:
    default = server.txt2img(TAG)
    for setting in ("balance=1", "scale=s*", "alpha=0.5", "beta=1", "k=8", "gamma=0.7", "policy=fixed"):
        assert not server.txt2img(f"<klora:subj:style:{setting}>").same(default), setting
    named = server.txt2img("<klora:subj:style:scale=s:alpha=1.5:beta=0.5:scope=all:progress=absolute>")
    assert named.same(default)


def test_other_loras_stay_as_they_are(server: Server) -> None:
    both = server.txt2img(f"<lora:subj_all:0.5><klora:subj:style:{SUBJECT_ONLY}>")
    assert both.distance(server.txt2img("<lora:subj_all:0.5><lora:subj:1>")) <= 1


@pytest.mark.parametrize("order", ["<{kind}:subj:1><klora:subj:style>", "<klora:subj:style><{kind}:subj:1>"])
@pytest.mark.parametrize("kind", ["lora", "lyco"])
def test_the_same_file_in_a_plain_tag_is_silenced(server: Server, kind: str, order: str) -> None:
    picture = server.txt2img(order.format(kind=kind))
    # Not every host knows the other kind.
    assert kind == "lyco" or "subj is asked for by another tag or setting too" in picture.comments
    assert picture.distance(server.txt2img(TAG)) <= 1


@pytest.mark.parametrize(
    ("tag", "says"),
    [
        ("<klora:subj>", "it must name a subject and a style"),
        ("<klora:subj:nobody>", "there is no LoRA named 'nobody'"),
        ("<klora:subj:stile>", "did you mean style?"),
        ("<klora:subj:style:beta=-1>", "<klora:subj:style:beta=-1>: beta"),
        ("<klora:subj:style:betta=1>", "did you mean beta?"),
        ("<klora:subj:style:1:1:1>", "one number too many"),
        ("<klora:subj:style:1:nan>", "style_strength"),
        ("<klora:subj:../subj>", "there is no LoRA named"),
        ("<klora:broken:style>", "broken"),
        ("<klora:other:style>", "other"),
    ],
)
def test_a_bad_tag_is_named_and_the_picture_is_made_without(
    server: Server, plain: Picture, tag: str, says: str
) -> None:
    picture = server.txt2img(tag)
    assert picture.same(plain)
    assert says in picture.comments
    assert "K-LoRA error" in picture.infotext
    assert str(server.data) not in picture.comments + picture.infotext


def test_of_two_tags_the_first_counts(server: Server) -> None:
    picture = server.txt2img("<klora:subj:style><klora:style:subj>")
    assert "only the first" in picture.comments
    assert picture.same(server.txt2img(TAG))


def test_the_negative_prompt_s_tags_are_words(server: Server) -> None:
    made = []
    taus = server.taus(lambda: made.append(server.txt2img(negative_prompt=f"blurry {TAG}")))
    assert taus == []
    assert "K-LoRA variant" not in made[0].infotext
    assert "in the negative prompt is plain text" in made[0].infotext


def test_no_tag_no_trace(server: Server, plain: Picture) -> None:
    assert "K-LoRA" not in plain.infotext
    picture = server.txt2img("<klora:subj:style:beta=0.6>")
    assert "K-LoRA beta: 0.6" in picture.infotext
    assert "Lora hashes" in picture.infotext
