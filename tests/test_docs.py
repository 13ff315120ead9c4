"""The pages for people: their links lead somewhere, and their prose is wrapped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import klora

ROOT = Path(klora.__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "training" / "README.md"])
WIDTH, BYTES = 110, 120
"""Of a line of prose; the bytes are what some programs count for its length."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page: Path) -> Iterator[str]:
    """The lines outside blocks of code."""
    code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield line


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = [line.lstrip("#").strip() for line in prose(page) if re.match(r"#+ ", line)]
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pages
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", "\n".join(prose(page)))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        place, _, anchor = target.partition("#")
        there = (page.parent / place).resolve() if place else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT.resolve()), target
        assert not anchor or anchor in anchors(there), target


@pages
def test_only_tables_links_and_code_are_wider_than_prose(page: Path) -> None:
    wide = [line for line in prose(page) if len(line) > WIDTH or len(line.encode()) > BYTES]
    assert [line for line in wide if not re.match(r"\||!?\[[^]]*\]\([^)]*\)\W*$", line.strip())] == []


def test_every_page_is_named_where_a_reader_begins() -> None:
    start = ROOT / "docs" / "README.md"
    text = start.read_text(encoding="utf-8")
    others = [page for page in PAGES if page.parent == start.parent and page != start]
    assert [page.name for page in others if f"]({page.name}" not in text] == []


def test_the_tree_of_folders_has_every_folder_and_nothing_else() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.findall(r"^( *)(\w+)/ ", text.partition("```\n")[2].partition("```")[0], re.MULTILINE)
    named: list[Path] = []
    for indent, name in tree:
        above = [path for path in named if len(path.parts) == len(indent) // 2]
        named.append(above[-1] / name if above else Path(name))
    assert [path for path in named if not (ROOT / path).is_dir()] == []
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "klora").rglob("__init__.py")}
    # A policy's folder is one line with the files of the others.
    assert {path for path in packages if len(path.parts) <= 3} - set(named) == set()
