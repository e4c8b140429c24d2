"""The page about MindSpeed's flags says what their records say."""

from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "mindspeed_flags.md"


def test_the_page_is_up_to_date(run_script):
    assert run_script("write_mindspeed_flags.py", "--check")[:2] == (0, "up to date\n")


def test_that_check_sees_a_page_that_is_not_and_writing_mends_it(run_script, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text().replace("--fix-router", "--fix-routes"))
    assert run_script("write_mindspeed_flags.py", "--check", "--page", page).status == 1
    assert run_script("write_mindspeed_flags.py", "--page", page).status == 0
    assert page.read_text() == PAGE.read_text()
