"""The page about MindSpeed's flags says what their records say."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "mindspeed_flags.md"


@pytest.fixture
def write(monkeypatch):
    """Run the script as a program on this page; its exit status."""

    def run(page, *arguments):
        main = runpy.run_path(str(ROOT / "scripts" / "write_mindspeed_flags.py"))["main"]
        monkeypatch.setitem(main.__globals__, "PAGE", page)
        monkeypatch.setattr(sys, "argv", ["write_mindspeed_flags.py", *arguments])
        return main()

    return run


def test_the_page_is_up_to_date(write, capsys):
    assert write(PAGE, "--check") == 0
    assert capsys.readouterr().out == "up to date\n"


def test_that_check_sees_a_page_that_is_not_and_writing_mends_it(write, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text().replace("--fix-router", "--fix-routes"))
    assert write(page, "--check") == 1
    assert write(page) == 0
    assert page.read_text() == PAGE.read_text()
