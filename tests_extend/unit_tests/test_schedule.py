"""The order in which ranks meet owners, over every grid, and the drawings of the ring."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from mindspeed_cp.schedule import Hop, RingSchedule

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = [
    RingSchedule(outer=outer, inner=inner) for outer in range(1, 17) for inner in range(1, 17) if outer * inner <= 16
]
"""Every grid of up to 16 ranks, all of them in each test: they are data, and a failure prints the one it was."""


def test_peer_is_undone_by_the_opposite_hop_and_counts_modulo_the_grid():
    for schedule in SCHEDULES:
        for rank in range(schedule.size):
            for hop in (Hop(1, 0), Hop(0, 1), Hop(3, 5), Hop(-2, 7)):
                peer = schedule.peer(rank, hop)
                assert divmod(peer, schedule.inner) == (
                    (rank // schedule.inner + hop.outer) % schedule.outer,
                    (rank % schedule.inner + hop.inner) % schedule.inner,
                )
                assert schedule.peer(peer, Hop(-hop.outer, -hop.inner)) == rank


def test_each_rank_meets_each_owner_once_itself_first_and_no_two_meet_one_at_the_same_time():
    for schedule in SCHEDULES:
        ranks = range(schedule.size)
        numbers = [[schedule.number(rank, owner) for owner in ranks] for rank in ranks]
        for rank in ranks:
            assert numbers[rank][rank] == 0
            assert sorted(numbers[rank]) == sorted(each[rank] for each in numbers) == list(ranks)


def test_a_double_ring_goes_round_one_inner_ring_after_the_other():
    schedule = RingSchedule(outer=2, inner=3)
    assert sorted(range(6), key=lambda owner: schedule.number(4, owner)) == [4, 3, 5, 1, 0, 2]


def check_drawings(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of the script in a checkout."""
    script = str(root / "scripts" / "draw_schedule.py")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


def test_drawings_are_as_the_code_has_them(monkeypatch, capsys):
    assert check_drawings(ROOT, monkeypatch) == 0
    assert capsys.readouterr().out == "up to date\n"


@pytest.mark.parametrize("drawing", ["chunks", "ring", "double_ring"])
def test_check_of_drawings_fails_on_a_changed_one(tmp_path, monkeypatch, capsys, drawing):
    for folder, name in (("scripts", "draw_schedule.py"), ("docs", "architecture.md")):
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / folder / name, tmp_path / folder / name)
    page = tmp_path / "docs" / "architecture.md"
    text, changes = re.subn(rf"(<!-- drawing: {drawing} -->\n[^<]*?)0", r"\g<1>9", page.read_text())
    assert changes == 1
    page.write_text(text)
    assert check_drawings(tmp_path, monkeypatch) == 1
    assert capsys.readouterr().out == "architecture.md is out of date: run python scripts/draw_schedule.py\n"
    assert page.read_text() == text
