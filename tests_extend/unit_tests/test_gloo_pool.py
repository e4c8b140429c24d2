"""The pool of gloo ranks itself: what it gives back, and that a rank's failure fails the test and no later one."""

import os
import pickle
import time
from pathlib import Path

import pytest

from mindspeed_cp.testing.rank_pool import RankFailure
from unit_tests import gloo_pool_cases as cases


def test_results_come_back_by_rank_within_the_group(gloo):
    assert gloo.run([1, 4, 6], cases.place, "x") == [(rank, 3, "x") for rank in range(3)]


def test_ranks_live_from_one_run_to_the_next(gloo):
    assert gloo.run(8, cases.pid) == gloo.run(8, cases.pid)
    assert os.getpid() not in gloo.run(8, cases.pid)


def test_a_rank_sends_to_another_in_any_group(gloo):
    assert gloo.run([2, 7], cases.pass_on) == [1.0, 0.0]


def test_a_rank_that_raises_fails_the_test_with_its_traceback_although_others_wait_for_it(gloo):
    with pytest.raises(
        RankFailure, match=r"(?s)rank 3 raised\nTraceback.*in fail\n.*ZeroDivisionError.*rank [15] had not"
    ):
        gloo.run([1, 3, 5], cases.fail, 1)
    assert len(gloo.run(8, cases.pid)) == 8


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_rank_that_hangs_fails_the_test_with_the_place_where_it_hangs_and_ends_with_what_it_has_started(gloo):
    started = gloo.run(2, cases.start_another)
    assert all(map(is_running, started))
    with pytest.raises(RankFailure, match=r"(?s)rank 1 had not answered after \d+ s, and was at\n.*in hang"):
        gloo.run(2, cases.hang, 1, timeout_s=5.0)
    deadline = time.monotonic() + 60.0
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, started))
    assert len(gloo.run(8, cases.pid)) == 8


def test_a_rank_that_dies_fails_the_test_with_its_exit_code(gloo):
    with pytest.raises(RankFailure, match="rank 0 died with exit code 7"):
        gloo.run(1, cases.die)
    assert len(gloo.run(8, cases.pid)) == 8


def test_what_no_other_process_can_import_is_refused(gloo):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        gloo.run(1, lambda group: None)
