"""Translations of the accordion, the settings page and their messages: a JSON file a language, read by the hosts."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest

from klora.report import words
from klora.webui import analysis_page, analysis_run, args, options, several, ui
from tests.webui.recorded_gradio import RecordedGradio

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("zh_CN", "ja_JP")


class NoLoras:
    def names(self) -> list[str]:
        return []

    def knows(self, name: str) -> bool:
        return False

    def refresh(self) -> None:
        pass


class OptionInfo:
    """Keeps what a setting says; hosts put the explanation in parentheses."""

    said: ClassVar[list[str]] = []

    def __init__(self, _default: Any, label: str, *_component: Any, section: Any) -> None:
        self.said += [label, section[1]]

    def info(self, text: str) -> OptionInfo:
        self.said.append(f"({text})")
        return self

    def needs_reload_ui(self) -> OptionInfo:
        return self


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Everything that a person may read, each as a piece of text of its own."""
    gradio = RecordedGradio()
    shared, host_options = types.ModuleType("modules.shared"), types.ModuleType("modules.options")
    host_options.OptionHTML = lambda text: OptionInfo(text, text, section=options.SECTION)  # type: ignore[attr-defined]
    shared.OptionInfo = OptionInfo  # type: ignore[attr-defined]
    shared.opts = types.SimpleNamespace(add_option=lambda _key, _info: None)  # type: ignore[attr-defined]
    modules = {"gradio": gradio, "modules.shared": shared, "modules.options": host_options}
    for name, module in {"modules": types.ModuleType("modules"), **modules}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(OptionInfo, "said", [])
    ui.build("txt2img", NoLoras, lambda *_: ("", ""), misfit=lambda *_: "", save=lambda *_: "")
    options.register_options()
    hidden = {f"txt2img_klora_{name}" for name, option in args.setting_options().items() if option.hidden}
    shown = [made for made in gradio.made if made.kwargs.get("elem_id") not in hidden]
    found = {text for made in shown for text in made.texts} | {*OptionInfo.said, *_of_the_page(), *_of_the_script()}
    # The host translates neither a sign alone nor a name that is the same everywhere.
    return {text for text in found if re.search("[A-Za-z]", text) and text not in ("K", "K-LoRA")}


def _of_the_page() -> set[str]:
    constants = {value for name, value in vars(analysis_page).items() if name.isupper() and isinstance(value, str)}
    choose = {f"Choose a {side} LoRA" for side in ("subject", "style")}
    words_of_a_run = {analysis_run.SCORING, analysis_run.COMPARING, analysis_run.CANCELLED}
    words_of_a_run |= {ui.SAVE, ui.NOT_ONE_FILE, several.REMOVE}
    return {
        *words_of_a_run,
        *constants,
        *analysis_page.COUNTS,
        *analysis_page.POINTED,
        *words.WHEN,
        *words.PLACE_WORDS,
        *choose,
    }


def _of_the_script() -> set[str]:
    script = (ROOT / "javascript" / "klora.js").read_text(encoding="utf-8")
    return set(re.findall(r'\bsay\("([^"]+)"\)', script))


def translations(language: str) -> dict[str, str]:
    """Read a language's file, with no key in it twice."""

    def unique(pairs: list[tuple[str, str]]) -> dict[str, str]:
        assert len(pairs) == len(dict(pairs))
        return dict(pairs)

    text = (ROOT / "localizations" / f"{language}.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text, object_pairs_hook=unique)
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_that_can_be_read_lacks_a_translation(language: str, texts: set[str]) -> None:
    assert sorted(texts - translations(language).keys()) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_translated_that_is_not_there(language: str, texts: set[str]) -> None:
    assert sorted(translations(language).keys() - texts) == []


def test_the_hosts_translate_every_text(texts: set[str]) -> None:
    # They leave alone what holds a pictogram, which some arrows count as.
    assert not [text for text in texts if re.search("[\u2194-\u21aa\u2600-\u27bf\U0001f000-\U0001faff]", text)]


@pytest.mark.parametrize(
    ("language", "meant"),
    [
        ("zh_CN", {"Cancel": "取消", "Progress": "进度", "Refresh": "刷新", "Scale": "缩放", "value": "值"}),
        ("ja_JP", {"Cancel": "中止", "Progress": "進行度", "Refresh": "更新", "Scale": "スケール", "value": "値"}),
    ],
)
def test_words_that_the_hosts_have_too_mean_the_same_there(language: str, meant: dict[str, str]) -> None:
    # The hosts translate a text wherever on their page it stands.
    assert {word: translations(language)[word] for word in meant} == meant


def test_the_accordions_choose_messages_are_these(texts: set[str]) -> None:
    for side in ("subject", "style"):
        with pytest.raises(args.SettingsError) as caught:
            args.lora_name(side, None)
        assert str(caught.value).endswith(f"Choose a {side} LoRA")
