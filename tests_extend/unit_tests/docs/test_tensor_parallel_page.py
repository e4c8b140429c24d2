"""The page of tensor parallelism: drawings and numbers are the code's, and the tests that it names are there."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parents[1] / "docs" / "tensor_parallel.md"


def test_drawings_and_costs_are_as_the_code_has_them(run_script):
    assert re.findall(r"<!-- drawing: (\w+) -->", PAGE.read_text()) == ["blocks", "costs"]
    assert run_script("draw_tensor_parallel.py", "--check")[:2] == (0, "up to date\n")


def test_tests_that_the_page_names_are_there():
    named = set(re.findall(r"`(test_\w+)[\[`]", PAGE.read_text()))
    there = {
        name for file in TESTS.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert named
    assert named <= there
