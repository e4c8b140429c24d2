"""The page of tensor parallelism: drawings and numbers are the code's, and the tests that it names are there."""

import re
from pathlib import Path

import draw_tensor_parallel
from generated_page import DRAWING

TESTS = Path(__file__).resolve().parents[1]


def test_drawings_and_costs_are_as_the_code_has_them():
    page = draw_tensor_parallel.PAGE.read_text()
    assert len(DRAWING.findall(page)) == len(draw_tensor_parallel.DRAWINGS)
    assert draw_tensor_parallel.draw_into(page) == page


def test_tests_that_the_page_names_are_there():
    named = set(re.findall(r"`(test_\w+)[\[`]", draw_tensor_parallel.PAGE.read_text()))
    there = {
        name for file in TESTS.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert named
    assert named <= there
