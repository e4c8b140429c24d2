"""The ledger of patches says what the records say."""

from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

ROOT = Path(__file__).resolve().parents[3]
LEDGER = ROOT / "patches" / "LEDGER.md"


def test_the_ledger_is_up_to_date(adaptor, run_script):
    assert run_script("write_ledger.py", "--check")[:2] == (0, "up to date\n")


def test_that_check_sees_a_ledger_that_is_not_and_writing_mends_it(adaptor, run_script, tmp_path):
    page = tmp_path / "LEDGER.md"
    for stale in (None, LEDGER.read_text().replace("`validate_args`", "`parse_args`")):
        if stale is not None:
            page.write_text(stale)
        ended = run_script("write_ledger.py", "--check", "--page", page)
        assert ended[:2] == (1, "LEDGER.md is out of date: run python scripts/write_ledger.py\n")
    assert run_script("write_ledger.py", "--page", page).status == 0
    assert page.read_text() == LEDGER.read_text()


def test_the_ledger_has_every_target_with_its_reasons(adaptor):
    words = " ".join(LEDGER.read_text().split())
    for patch in (*adaptor.registry.patches, *adaptor.cpu_registry.patches):
        module, attribute = patch.target.split(":")
        assert f"**{module}**:" in words
        assert f"`{attribute}`" in words
        assert f"why: {patch.why} - remove when: {patch.remove_when} " in words
        assert patch.upstream in words


def test_the_ledger_gives_a_reason_that_many_patches_share_once(adaptor):
    words = " ".join(LEDGER.read_text().split())
    shared = [patch.why for patch in adaptor.cpu_registry.patches]
    why = max(shared, key=shared.count)
    assert shared.count(why) > 40
    assert words.count(why) == 1
