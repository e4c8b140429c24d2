"""What unit and system tests share: tests that need the same processes run in one of pytest-xdist's workers."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

WORKER = {
    "gloo": "gloo",
    "training": "training",
    "adaptor": "patches",
    "programs": "patches",
    "endings": "imports",
    "interpreter": "triton",
}
"""Fixtures that are dear to make, because they start processes or import Megatron, and the group of their tests.

A group runs in one worker, so that there is one of each whatever the number of workers.
"""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook of that name.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the group of each test for `--dist loadgroup`, see scripts/test.sh, and have system tests go first.

    They take longest: the last ones of a run would keep one worker busy while the others have nothing left to do.
    """
    items.sort(key=lambda item: "system_tests" not in item.path.parts)
    for item in items:
        groups = {group for fixture, group in WORKER.items() if fixture in getattr(item, "fixturenames", ())}
        assert len(groups) <= 1, f"{item.nodeid} would have to run in two workers: {groups}"
        for group in groups:
            item.add_marker(pytest.mark.xdist_group(group))


class Ended(NamedTuple):
    """How a program has ended: its exit status, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """A program of scripts/ run by its command line, in this process: a fresh interpreter imports torch for seconds.

    `run_script("draw_schedule.py", "--check")`.
    """

    def run(name: str, *arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / name), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(SCRIPTS))  # As Python does for a program.
        capsys.readouterr()
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
            status: object = 0
        except SystemExit as end:
            status = end.code or 0
        assert isinstance(status, int)
        return Ended(status, *capsys.readouterr())

    return run
