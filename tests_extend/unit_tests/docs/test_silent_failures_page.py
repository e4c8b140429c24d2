"""The list of silent failures: the tests that it names are there, and it names all of their own file."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parents[1] / "docs" / "silent_failures.md"
OWN = "attention/test_silent_failures.py"


def named_in(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (TESTS / file).read_text(), re.MULTILINE))


def test_every_silent_failure_has_a_test_that_is_there():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    named = [re.search(r"`([\w/]+\.py)::(test_\w+)` \|$", row) for row in rows]
    assert [row for row, test in zip(rows, named, strict=True) if not test or test[2] not in named_in(test[1])] == []
    assert {test[2] for test in named if test and test[1] == OWN} == named_in(OWN)
