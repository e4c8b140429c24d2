"""The ring's schedule as data: who works on what, where blocks come from, and the drawings of it."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from mindspeed_cp.schedule import Hop, RingSchedule, Step

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = [
    RingSchedule(outer=outer, inner=inner) for outer in range(1, 17) for inner in range(1, 17) if outer * inner <= 16
]
"""Every grid of up to 16 ranks, all of them in each test: they are data, and a failure prints the one it was."""


def test_each_rank_works_on_each_block_once_its_own_first():
    for schedule in SCHEDULES:
        for rank in range(schedule.size):
            owners = [schedule.owner(rank, step) for step in schedule.steps]
            assert owners[0] == rank
            assert sorted(owners) == list(range(schedule.size))


def test_no_two_ranks_work_on_a_block_at_the_same_step():
    for schedule in SCHEDULES:
        for step in schedule.steps:
            assert len({schedule.owner(rank, step) for rank in range(schedule.size)}) == schedule.size


def test_each_block_has_arrived_when_it_is_needed_and_is_held_by_who_sends_it():
    for schedule in SCHEDULES:
        arrived = {(rank, schedule.steps[0]): rank for rank in range(schedule.size)}
        for step in schedule.steps:
            worked_on = {rank: arrived.pop((rank, step)) for rank in range(schedule.size)}
            assert worked_on == {rank: schedule.owner(rank, step) for rank in range(schedule.size)}
            for rank, block in worked_on.items():
                for needed_at, hop in schedule.departures(step).items():
                    assert schedule.steps.index(needed_at) > schedule.steps.index(step)
                    to = schedule.peer(rank, hop)
                    assert (to, needed_at) not in arrived
                    arrived[to, needed_at] = block
        assert arrived == {}


def test_blocks_leave_a_window_once_for_each_other_one_and_step_to_the_neighbour_else():
    for schedule in SCHEDULES:
        hops = [hop for step in schedule.steps for hop in schedule.departures(step).values()]
        assert hops.count(Hop(1, 0)) == schedule.outer - 1
        assert hops.count(Hop(0, 1)) == schedule.outer * (schedule.inner - 1)
        assert len(hops) == schedule.size - 1


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


def test_steps_of_a_double_ring_are_window_by_window():
    schedule = RingSchedule(outer=2, inner=3)
    assert schedule.steps == (Step(0, 0), Step(0, 1), Step(0, 2), Step(1, 0), Step(1, 1), Step(1, 2))
    assert [step for step in schedule.steps if schedule.ends_window(step)] == [Step(0, 2), Step(1, 2)]
    assert [schedule.owner(4, step) for step in schedule.steps] == [4, 3, 5, 1, 0, 2]


def test_departures_of_a_double_ring():
    schedule = RingSchedule(outer=2, inner=2)
    assert [schedule.departures(step) for step in schedule.steps] == [
        {Step(1, 0): Hop(1, 0), Step(0, 1): Hop(0, 1)},
        {},
        {Step(1, 1): Hop(0, 1)},
        {},
    ]


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
