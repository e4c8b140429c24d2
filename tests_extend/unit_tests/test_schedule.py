"""The ring's schedule as data: who works on what, where blocks come from, and the drawings of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_cp.schedule import Hop, RingSchedule, Step

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = [
    RingSchedule(outer=outer, inner=inner) for outer in range(1, 17) for inner in range(1, 17) if outer * inner <= 16
]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: f"{each.outer}x{each.inner}")


@every_schedule
def test_each_rank_works_on_each_block_once_its_own_first(schedule):
    for rank in range(schedule.size):
        owners = [schedule.owner(rank, step) for step in schedule.steps]
        assert owners[0] == rank
        assert sorted(owners) == list(range(schedule.size))


@every_schedule
def test_no_two_ranks_work_on_a_block_at_the_same_step(schedule):
    for step in schedule.steps:
        assert len({schedule.owner(rank, step) for rank in range(schedule.size)}) == schedule.size


@every_schedule
def test_each_block_has_arrived_when_it_is_needed_and_is_held_by_who_sends_it(schedule):
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


@every_schedule
def test_blocks_leave_a_window_once_for_each_other_one_and_step_to_the_neighbour_else(schedule):
    hops = [hop for step in schedule.steps for hop in schedule.departures(step).values()]
    assert hops.count(Hop(1, 0)) == schedule.outer - 1
    assert hops.count(Hop(0, 1)) == schedule.outer * (schedule.inner - 1)
    assert len(hops) == schedule.size - 1


@every_schedule
def test_peer_is_undone_by_the_opposite_hop_and_counts_modulo_the_grid(schedule):
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


def check_drawings(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "scripts" / "draw_schedule.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_drawings_are_as_the_code_has_them():
    checked = check_drawings(ROOT)
    assert (checked.returncode, checked.stdout) == (0, "up to date\n"), checked.stderr


@pytest.mark.parametrize("drawing", ["chunks", "ring", "double_ring"])
def test_check_of_drawings_fails_on_a_changed_one(tmp_path, drawing):
    for folder, name in (("scripts", "draw_schedule.py"), ("docs", "architecture.md")):
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / folder / name, tmp_path / folder / name)
    assert check_drawings(tmp_path).returncode == 0
    page = tmp_path / "docs" / "architecture.md"
    text, changes = re.subn(rf"(<!-- drawing: {drawing} -->\n[^<]*?)0", r"\g<1>9", page.read_text())
    assert changes == 1
    page.write_text(text)
    checked = check_drawings(tmp_path)
    assert checked.returncode == 1
    assert checked.stdout == "architecture.md is out of date: run python scripts/draw_schedule.py\n"
    assert page.read_text() == text
