"""The Chinese README says what the English one says, as far as headings, commands, flags, links and numbers show it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LANGUAGE_LINK = re.compile(r"^\[(中文|English)\]\(README.*\)$", re.MULTILINE)
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)

KINDS = {
    "headings, by level": lambda text: [line.split()[0] for line in _prose(text).splitlines() if line.startswith("#")],
    "code blocks, comments apart": lambda text: [
        (language, re.sub(r" *#.*", "", code)) for language, code in BLOCK.findall(text)
    ],
    "names of commands, flags and files": lambda text: sorted(set(re.findall(r"`([^`]+)`", _prose(text)))),
    "links": lambda text: sorted(re.findall(r"\]\(([^)]+)\)", LANGUAGE_LINK.sub("", text))),
    "rows of tables": lambda text: [line.count("|") for line in _prose(text).splitlines() if line.startswith("|")],
    "numbers": lambda text: sorted(re.findall(r"\d+(?:\.\d+)*", _prose(text))),
}


def _prose(text: str) -> str:
    return BLOCK.sub("", text)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_both_readmes_have_the_same(kind):
    english, chinese = (KINDS[kind](read(name)) for name in ("README.md", "README.zh-CN.md"))
    assert len(english) >= 3
    assert english == chinese


@pytest.mark.parametrize("kind", KINDS)
def test_that_check_sees_a_readme_that_says_less(kind):
    text = read("README.md")
    assert KINDS[kind](text) != KINDS[kind](text[: text.index("## What is supported")])


@pytest.mark.parametrize(("name", "other"), [("README.md", "README.zh-CN.md"), ("README.zh-CN.md", "README.md")])
def test_each_readme_names_the_other(name, other):
    assert f"]({other})" in LANGUAGE_LINK.search(read(name)).group()


def test_every_page_of_the_documentation_is_linked():
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= {*KINDS["links"](read("README.md"))}


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)]+)\)", read(name)):
        assert (ROOT / link.partition("#")[0]).exists(), link
