"""The order in which ranks meet owners, over every grid, and the drawings of the ring."""

import re
from pathlib import Path

import pytest

from mindspeed_cp.schedule import Hop, RingSchedule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
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


def test_drawings_are_as_the_code_has_them(run_script):
    assert run_script("draw_schedule.py", "--check")[:2] == (0, "up to date\n")


@pytest.mark.parametrize("drawing", ["chunks", "ring", "double_ring"])
def test_check_of_drawings_fails_on_a_changed_one(tmp_path, run_script, drawing):
    page = tmp_path / "architecture.md"
    text, changes = re.subn(rf"(<!-- drawing: {drawing} -->\n[^<]*?)0", r"\g<1>9", PAGE.read_text())
    assert changes == 1
    page.write_text(text)
    ended = run_script("draw_schedule.py", "--check", "--page", page)
    assert ended[:2] == (1, "architecture.md is out of date: run python scripts/draw_schedule.py\n")
    assert page.read_text() == text
