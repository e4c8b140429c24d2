"""The ledger of patches says what the records say."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

ROOT = Path(__file__).resolve().parents[3]


def run_ledger(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(root / "scripts" / "write_ledger.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_the_ledger_is_up_to_date():
    done = run_ledger(ROOT, "--check")
    assert (done.returncode, done.stdout) == (0, "up to date\n"), done.stderr


def test_that_check_sees_a_ledger_that_is_not_and_writing_mends_it(tmp_path):
    for folder, name in (("scripts", "write_ledger.py"), ("patches", "LEDGER.md")):
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / folder / name, tmp_path / folder / name)
    ledger = tmp_path / "patches" / "LEDGER.md"
    text = ledger.read_text()
    ledger.write_text(text.replace("`validate_args`", "`parse_args`"))
    checked = run_ledger(tmp_path, "--check")
    assert (checked.returncode, checked.stdout) == (
        1,
        "LEDGER.md is out of date: run python scripts/write_ledger.py\n",
    )
    assert run_ledger(tmp_path).returncode == 0
    assert ledger.read_text() == text


def test_the_ledger_has_every_target_with_its_reasons_once(adaptor):
    words = " ".join((ROOT / "patches" / "LEDGER.md").read_text().split())
    for patch in (*adaptor.registry.patches, *adaptor.cpu_registry.patches):
        module, attribute = patch.target.split(":")
        assert f"**{module}**:" in words
        assert f"`{attribute}`" in words
        assert f"why: {patch.why} - can go when: {patch.remove_when} " in words
        assert patch.upstream in words
    assert words.count("Megatron names the device 'cuda'") == 1
