"""Gloo ranks that stay alive for the whole test session: send them a function, get back what each rank returns.

A function travels by name, so it must live in a module that a fresh process can import: a case module beside this one,
`unit_tests.ulysses_cases` (pytest's `pythonpath` holds tests_extend, and the ranks inherit sys.path). Arguments and
results travel by value. torch wants all ranks of the world to take part in every `new_group`: a function that makes
groups of its own runs on all `WORLD_SIZE` ranks, or finds them with `group_of` once `make_group` has made them.
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

WORLD_SIZE = 8
START_TIMEOUT_S = 120.0
COLLECTIVE_TIMEOUT = timedelta(seconds=120)
"""Ends a rank that hangs in gloo after pytest itself was killed and can no longer end it."""
GRACE_S = 2.0
"""How long the other ranks may still answer once one has failed; mostly they wait for it in a collective."""


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message says which and holds its traceback."""


class _Answer(NamedTuple):
    succeeded: bool
    value: Any


class GlooPool:
    """`WORLD_SIZE` processes of one thread each, started by the first run, and anew by the first after a failure."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._groups: set[tuple[int, ...]] = set()

    def run(
        self, ranks: int | Sequence[int], function: Callable[..., Any], *args: Any, timeout_s: float = 60.0
    ) -> list[Any]:
        """What `function(group, *args)` returns on each rank of a group, by rank within the group.

        ranks: the world's ranks that form the group, ascending; a number P stands for the first P.

        Raises RankFailure when a rank raises, dies or does not answer within `timeout_s`. The ranks are then ended, as
        messages may be left between them.
        """
        __tracebackhide__ = True
        members = _members(ranks)
        self.make_group(members)
        return self._run(members, timeout_s, _run_in_group, function, members, args)

    def make_group(self, ranks: int | Sequence[int]) -> None:
        """Make the group of these ranks, unless it is there: on its ranks, `group_of` then gives it."""
        members = _members(ranks)
        if not self._processes:
            self._start()
        if members not in self._groups:
            self._run(range(WORLD_SIZE), START_TIMEOUT_S, _make_group, members)
            self._groups.add(members)

    def _run(self, ranks: Sequence[int], timeout_s: float, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on each of `ranks`."""
        __tracebackhide__ = True
        message = pickle.dumps((function, args))
        try:
            for rank in ranks:
                self._connections[rank].send_bytes(message)
            return self._results(ranks, timeout_s)
        except BaseException:
            self._kill()
            raise

    def close(self) -> None:
        """End the ranks: each leaves when its connection closes; one that does not is killed."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5.0)
        self._kill()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gloo_pool_")
        # One server imports torch once and forks the ranks; it has no threads, so forking it is safe.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "torch"])
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        try:
            self._results(range(WORLD_SIZE), START_TIMEOUT_S)
        except BaseException:
            self._kill()
            raise

    def _results(self, ranks: Sequence[int], timeout_s: float) -> list[Any]:
        __tracebackhide__ = True
        answers = self._answers(ranks, timeout_s)
        if failures := [f"rank {rank} {answer.value}" for rank, answer in answers.items() if not answer.succeeded]:
            raise RankFailure("\n".join(failures))
        return [answers[rank].value for rank in ranks]

    def _answers(self, ranks: Sequence[int], timeout_s: float) -> dict[int, _Answer]:
        """Each rank's answer, in the order in which they come; last those who gave none, with the place they are at."""
        answers: dict[int, _Answer] = {}
        waiting = {self._connections[rank]: rank for rank in ranks}
        start = time.monotonic()
        deadline = start + timeout_s
        while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answers[rank] = _Answer(*pickle.loads(connection.recv_bytes()))
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(timeout=GRACE_S)
                    answers[rank] = _Answer(False, f"died with exit code {self._processes[rank].exitcode}")
                if not answers[rank].succeeded:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        elapsed = time.monotonic() - start
        for rank in waiting.values():
            answers[rank] = _Answer(False, f"had not answered after {elapsed:.0f} s, and was at\n{self._stack(rank)}")
        return answers

    def _stack(self, rank: int) -> str:
        """Where `rank` is at this moment."""
        assert self._folder is not None
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        return _stack_file(self._folder.name, rank).read_text()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._connections, self._folder, self._groups = [], [], None, set()


_GROUPS: dict[tuple[int, ...], dist.ProcessGroup] = {}
"""In a rank's process: the groups that have been made."""


def group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """In a rank's process: the group of these ranks of the world, which the pool has made."""
    return _GROUPS[tuple(ranks)]


def _make_group(members: tuple[int, ...]) -> None:
    _GROUPS[members] = dist.new_group(list(members), timeout=COLLECTIVE_TIMEOUT)
    # A group of the others: with use_local_synchronization torch makes a group's name from the number of groups that a
    # rank is in, and its ranks wait for each other forever where the numbers differ.
    if others := sorted(set(range(WORLD_SIZE)) - set(members)):
        dist.new_group(others, timeout=COLLECTIVE_TIMEOUT)


def _run_in_group(function: Callable[..., Any], members: tuple[int, ...], args: tuple[Any, ...]) -> Any:
    return function(group_of(members), *args)


def _members(ranks: int | Sequence[int]) -> tuple[int, ...]:
    members = tuple(range(ranks)) if isinstance(ranks, int) else tuple(ranks)
    assert members and list(members) == sorted(set(members)) and members[-1] < WORLD_SIZE, members
    return members


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"stack_{rank}"


def _serve(rank: int, folder: str, connection: Connection) -> None:
    """A rank's life: join the world, then run what arrives until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the connection.
    torch.set_num_threads(1)
    with _stack_file(folder, rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        _answer(connection, functools.partial(_join_world, rank, folder))
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                _answer(connection, functools.partial(_call, connection.recv_bytes()))


def _join_world(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, COLLECTIVE_TIMEOUT, WORLD_SIZE, rank)


def _call(message: bytes) -> Any:
    function, args = pickle.loads(message)
    return function(*args)


def _answer(connection: Connection, compute: Callable[[], Any]) -> None:
    try:
        answer = pickle.dumps((True, compute()))
    except Exception:
        answer = pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
    connection.send_bytes(answer)
