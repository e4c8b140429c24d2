"""The pages for users say what the code says: messages that it has, and the tables of Megatron's options."""

import ast
import re
from pathlib import Path

import pytest

from mindspeed_cp.config import flag
from mindspeed_cp.patches.unsupported import _DIFFERENCES, _REFUSALS

ROOT = Path(__file__).resolve().parents[3]
CODE = [*(ROOT / "mindspeed_cp").rglob("*.py"), *(ROOT / "patches").rglob("*.py")]
CODE.append(ROOT / "tests_extend" / "system_tests" / "compare_losses.py")
QUOTE = re.compile(r"\*\*`([^`]+)`\*\*")


def texts_of(source: str) -> list[str]:
    """Every string in a source, with an ellipsis where a value is filled in."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            texts.append("".join(str(part) for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


QUOTES = QUOTE.findall((ROOT / "docs" / "troubleshooting.md").read_text())
TEXTS = [text for path in CODE for text in texts_of(path.read_text())]


@pytest.mark.parametrize("quote", QUOTES)
def test_message_in_troubleshooting_is_one_that_the_code_has(quote):
    assert any(quote in text for text in TEXTS)


def test_that_check_sees_a_message_that_the_code_has_not():
    assert len(QUOTES) > 20
    assert not any("Has it fled in this version?" in text for text in TEXTS)


def test_strings_are_joined_and_filled_in_values_become_an_ellipsis():
    assert "cannot … it: use …." in texts_of("""f"cannot {verb} it: " "use " f"{way}." """)


def test_tables_of_megatron_s_options_are_as_the_records_have_them():
    page = (ROOT / "docs" / "megatron_options.md").read_text()
    tables = {
        "within each rank": [f"| `{flag(each.option)}` | {each.reason} |" for each in _DIFFERENCES],
        "refused": [f"| `{flag(each.option)}` | {each.reason}; {each.way_out} |" for each in _REFUSALS],
    }
    for name, rows in tables.items():
        assert page.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0].strip().splitlines()[2:] == rows


@pytest.mark.parametrize(
    "page", ["README.md", "docs/megatron_options.md", "docs/switch_it_on.md", "docs/troubleshooting.md"]
)
def test_links_within_the_repository_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
