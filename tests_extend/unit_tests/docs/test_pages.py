"""The pages for users say what the code says: messages that it has, and the table of MindSpeed's flags."""

import ast
import re
from pathlib import Path

import pytest

from mindspeed_cp.config import flag
from mindspeed_cp.patches.mindspeed_flags import MINDSPEED_FLAGS, REFUSED_VALUES
from mindspeed_cp.patches.unsupported import _DIFFERENCES, _REFUSALS

ROOT = Path(__file__).resolve().parents[3]
CODE = [*(ROOT / "mindspeed_cp").rglob("*.py"), *(ROOT / "patches").glob("*.py")]
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


def test_table_of_mindspeed_s_flags_is_as_the_records_have_it():
    page = (ROOT / "docs" / "switch_it_on.md").read_text()
    table = page.partition("<!-- MindSpeed's other flags -->")[2].partition("<!-- end -->")[0].strip().splitlines()
    rows = []
    for each in MINDSPEED_FLAGS:
        why = "; other values: ".join(sentence for sentence in (each.note, each.refusal) if sentence)
        rows.append(f"| `{each.name}` | {each.disposition} | {why} |")
    rows += [
        f"| `{option} {value}` | refused | {why} |"
        for option, values in REFUSED_VALUES.items()
        for value, why in values.items()
    ]
    assert table[2:] == rows


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
