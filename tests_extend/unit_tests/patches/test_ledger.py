"""The ledger of patches says what the records say."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

ROOT = Path(__file__).resolve().parents[3]
LEDGER = ROOT / "patches" / "LEDGER.md"


@pytest.fixture
def run_ledger(adaptor, monkeypatch):
    """Run the script as a program, with this page for the ledger; its exit status."""

    def run(page, *arguments):
        main = runpy.run_path(str(ROOT / "scripts" / "write_ledger.py"))["main"]
        monkeypatch.setitem(main.__globals__, "PAGE", page)
        monkeypatch.setattr(sys, "argv", ["write_ledger.py", *arguments])
        return main()

    return run


def test_the_ledger_is_up_to_date(run_ledger, capsys):
    assert run_ledger(LEDGER, "--check") == 0
    assert capsys.readouterr().out == "up to date\n"


def test_that_check_sees_a_ledger_that_is_not_and_writing_mends_it(run_ledger, tmp_path, capsys):
    page = tmp_path / "LEDGER.md"
    for stale in (None, LEDGER.read_text().replace("`validate_args`", "`parse_args`")):
        if stale is not None:
            page.write_text(stale)
        assert run_ledger(page, "--check") == 1
        assert capsys.readouterr().out == "LEDGER.md is out of date: run python scripts/write_ledger.py\n"
    assert run_ledger(page) == 0
    assert page.read_text() == LEDGER.read_text()


def test_the_ledger_has_every_target_with_its_reasons(adaptor):
    words = " ".join(LEDGER.read_text().split())
    for patch in (*adaptor.registry.patches, *adaptor.cpu_registry.patches):
        module, attribute = patch.target.split(":")
        assert f"**{module}**:" in words
        assert f"`{attribute}`" in words
        assert f"why: {patch.why} - can go when: {patch.remove_when} " in words
        assert patch.upstream in words


def test_the_ledger_gives_a_reason_that_many_patches_share_once(adaptor):
    words = " ".join(LEDGER.read_text().split())
    shared = [patch.why for patch in adaptor.cpu_registry.patches]
    why = max(shared, key=shared.count)
    assert shared.count(why) > 40
    assert words.count(why) == 1
