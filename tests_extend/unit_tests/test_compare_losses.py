"""The comparison of loss curves, which every training test and feature script rests on."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from system_tests import compare_losses


def log(losses: dict[int, float]) -> str:
    """Lines as Megatron prints them."""
    line = " [2026-01-01] iteration {:8d}/      20 | consumed samples: 2 | lm loss: {:.6E} | loss scale: 1 |"
    return "noise\n" + "\n".join(line.format(i, loss) for i, loss in losses.items())


def test_losses_are_read_by_iteration():
    assert compare_losses.losses_in(log({1: 7.25, 12: 0.5})) == {1: 7.25, 12: 0.5}


def test_largest_difference_is_relative():
    assert compare_losses.largest_difference({1: 2.0, 2: 4.0}, {1: 2.0, 2: 4.1}) == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [({}, {}), ({1: 1.0}, {}), ({1: 1.0, 2: 1.0}, {1: 1.0}), ({1: 1.0}, {1: float("nan")})],
    ids=["both empty", "one empty", "shorter", "not a number"],
)
def test_curves_that_cannot_be_compared_differ_infinitely(reference, candidate):
    assert compare_losses.largest_difference(reference, candidate) == float("inf")


class Run(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """The program on a curve of two iterations and on another one, in this process."""

    def run(candidate: dict[int, float], *options: str) -> Run:
        (tmp_path / "a.log").write_text(log({1: 2.0, 2: 1.0}))
        (tmp_path / "b.log").write_text(log(candidate))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["compare_losses.py", "a.log", "b.log", *options])
        return Run(compare_losses.main(), *capsys.readouterr())

    return run


def test_equal_curves_pass_and_are_drawn(tmp_path, compare):
    pytest.importorskip("matplotlib")
    run = compare({1: 2.0, 2: 1.000001}, "--plot", "sub/losses.png")
    assert run.returncode == 0
    assert "largest relative difference 1.00e-06 over 2 iterations: within 1e-05" in run.stdout
    assert (tmp_path / "sub" / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_full_disk_under_the_picture_does_not_lose_the_run(tmp_path, compare):
    pytest.importorskip("matplotlib")
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    (tmp_path / "losses.png").symlink_to("/dev/full")
    run = compare({1: 2.0, 2: 1.0}, "--plot", "losses.png")
    assert run.returncode == 0, run.stderr
    assert "over 2 iterations: within 1e-05" in run.stdout
    assert run.stderr.splitlines()[-1] == (
        "warning: losses.png could not be written (No space left on device); the losses are in a.log and b.log."
    )
    assert compare_losses.losses_in((tmp_path / "b.log").read_text()) == {1: 2.0, 2: 1.0}


def test_curves_that_differ_fail_whatever_becomes_of_the_picture(tmp_path, compare):
    pytest.importorskip("matplotlib")
    (tmp_path / "losses.png").mkdir()
    run = compare({1: 2.0, 2: 1.1}, "--plot", "losses.png")
    assert run.returncode == 1
    assert "warning: losses.png could not be written (Is a directory)" in run.stderr


def test_curves_that_differ_fail(tmp_path, compare):
    run = compare({1: 2.0, 2: 1.001})
    assert run.returncode == 1
    assert "ABOVE 1e-05" in run.stdout


def test_a_run_that_stopped_early_fails(tmp_path, compare):
    run = compare({1: 2.0})
    assert run.returncode == 1
    assert "a.log has 2 iterations with a loss, b.log has 1." in run.stdout


def test_losses_that_are_printed_alike_are_marked_as_such(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    compare_losses.plot({"a": {1: 2.0, 2: 1.0}, "b": {1: 2.0, 2: 1.00001}}, tmp_path / "losses.png")
    _, below = pyplot.gcf().axes
    different, alike = below.lines
    assert (list(different.get_xdata()), list(alike.get_xdata())) == ([2], [1])
    assert alike.get_label() == "none in the digits that are printed"
    pyplot.close("all")
