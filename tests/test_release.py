"""One version everywhere, and entries that the indexes of extensions take as they are (docs/release.md)."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest

import klora

ROOT = Path(klora.__file__).parent.parent
RELEASES = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
GIT_URL = r"https://[^ ]+?(\.git)?"
TAGS = {
    *("script", "localization", "tab", "dropdown", "ads", "installed", "training", "models", "UI related"),
    *("prompting", "editing", "manipulations", "online", "animation", "query", "science", "extras"),
}
"""The tags that the index of A1111's extensions knows, and with it SD.Next's."""
SDNEXT: dict[str, type] = {
    **dict.fromkeys(("name", "url", "description", "long", "branch", "note"), str),
    **dict.fromkeys(("added", "created", "pushed", "updated"), datetime.datetime),
    **dict.fromkeys(("size", "stars", "issues", "commits", "status"), int),
    "tags": list,
}
"""What SD.Next's page of extensions reads of an entry in its extensions.json, and as what."""


def entry(name: str) -> Any:
    return json.loads((ROOT / "index" / name).read_text(encoding="utf-8"))


def test_the_changelog_opens_with_what_is_unreleased_and_then_this_version_with_its_date() -> None:
    (first, rest), (version, date), *_ = RELEASES
    assert (first, rest) == ("Unreleased", "")
    assert version == klora.__version__
    assert date.startswith(" - ")
    datetime.date.fromisoformat(date.removeprefix(" - "))


def test_the_citation_has_the_version_and_the_date_of_the_changelog() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [klora.__version__]
    assert re.findall(r"^date-released: (.+)$", citation, re.MULTILINE) == [RELEASES[1][1].removeprefix(" - ")]
    assert "arXiv:2502.18461" in citation


def test_the_package_says_its_version_nowhere_but_in_its_init() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert not re.search(r'^version = "', project, re.MULTILINE)
    said = [path for path in (ROOT / "klora").rglob("*.py") if f'"{klora.__version__}"' in path.read_text("utf-8")]
    assert said == [Path(klora.__file__)]


def test_an_installed_package_has_that_version() -> None:
    try:
        installed = importlib.metadata.distribution("klora")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("klora runs from its folder and is not installed")
    assert installed.version == klora.__version__


def test_the_index_of_a1111_takes_the_entry() -> None:
    found = entry("klora.json")
    assert found.keys() - {"added"} == {"name", "url", "description", "tags"}
    assert re.fullmatch(GIT_URL, found["url"])
    assert found["tags"] == ["manipulations", "models"]
    assert set(found["tags"]) <= TAGS
    assert all(isinstance(found[name], str) and found[name] for name in ("name", "url", "description"))
    if "added" in found:
        datetime.date.fromisoformat(found["added"])


def test_sdnext_takes_the_entry() -> None:
    [found] = entry("sdnext.json")
    assert {"name", "url", "description", "tags", "added"} <= found.keys() <= SDNEXT.keys()
    for name, value in found.items():
        if SDNEXT[name] is datetime.datetime:
            datetime.datetime.strptime(value.rstrip("Z").partition(".")[0], "%Y-%m-%dT%H:%M:%S")
        else:
            assert type(value) is SDNEXT[name], name
    assert len(found["description"]) <= 200
    assert found["status"] in range(7)
    assert set(found["tags"]) <= TAGS


def test_both_entries_are_of_one_repository() -> None:
    a1111, [sdnext] = entry("klora.json"), entry("sdnext.json")
    assert a1111["url"].removesuffix(".git") == sdnext["url"] == f"https://github.com/{sdnext['long']}"
    assert a1111["tags"] == sdnext["tags"]
