"""Rank processes that stay alive for many tests or measurements: send them a function, get back what each rank returns.

A function travels by name, so it must live in a module that a fresh process can import: a case module beside the tests,
`unit_tests.ulysses_cases` (pytest's `pythonpath` holds tests_extend, and the ranks inherit sys.path). Arguments and
results travel by value.
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
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

LIMIT_S = 240.0
"""How long ranks may take: a limit for those that hang, far above what a slow and busy machine needs."""
GRACE_S = 2.0
"""How long the other ranks may idle once one has failed; mostly they wait for it in a collective."""


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message says which and holds its traceback."""


class _Answer(NamedTuple):
    succeeded: bool
    value: Any


class _Idleness:
    """For how long none of some processes has computed anything.

    On a busy machine a rank gets little done in a second, and one that hangs nothing.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._used, self._since = self._cpu_time(), time.monotonic()

    def seconds(self) -> float:
        """Up to now."""
        used = self._cpu_time()
        if used != self._used:
            self._used, self._since = used, time.monotonic()
        return time.monotonic() - self._since

    def _cpu_time(self) -> list[str]:
        """User and system time of each main thread; empty where the system does not tell, and only the clock counts.

        Other threads, such as a profiler's, wake up now and then whatever the rank does.
        """
        times: list[str] = []
        for pid in self._pids:
            with contextlib.suppress(OSError):
                times += Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return times


class RankPool:
    """`size` processes of one thread each, started by the first call, and anew by the first after a failure.

    All of them at once, for they join one another; where each joins `alone`, only those that a call needs.

    preload: modules that one server imports before it forks the ranks. It must have no threads then, and there is one
    in a process: the first pool's. Where there are none, each rank is a fresh interpreter.
    join: called in each process as `join(rank, folder)` before anything else, with a folder that all ranks share.
    """

    def __init__(
        self, size: int, preload: Sequence[str], join: Callable[[int, str], None], *, alone: bool = False
    ) -> None:
        self.size, self._alone = size, alone
        self._preload, self._join = list(preload), join
        self._processes: dict[int, BaseProcess] = {}
        self._connections: dict[int, Connection] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def call(self, ranks: Sequence[int], timeout_s: float, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on each of `ranks`, which run it at the same time.

        Raises RankFailure when a rank raises, dies or does not answer within `timeout_s`. Its ranks are then ended,
        as messages may be left between them.
        """
        __tracebackhide__ = True
        message = pickle.dumps((function, args))
        needed = ranks if self._alone else range(self.size)
        try:
            self._start([rank for rank in needed if rank not in self._processes])
            for rank in ranks:
                self._connections[rank].send_bytes(message)
            return self._results(ranks, timeout_s)
        except BaseException:
            self._kill(needed)
            raise

    @property
    def started(self) -> bool:
        """Whether the processes are there."""
        return bool(self._processes)

    def close(self) -> None:
        """End the ranks: each leaves when its connection closes; one that does not is killed."""
        for connection in self._connections.values():
            connection.close()
        for process in self._processes.values():
            process.join(timeout=5.0)
        self._kill(range(self.size))

    def _start(self, ranks: Sequence[int]) -> None:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="rank_pool_")
        context: ForkServerContext | SpawnContext = multiprocessing.get_context("spawn")
        if self._preload:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(self._preload)
        for rank in ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._folder.name, self._join, theirs))
            process.start()
            theirs.close()
            self._processes[rank], self._connections[rank] = process, ours
        self._results(ranks, LIMIT_S)

    def _results(self, ranks: Sequence[int], timeout_s: float) -> list[Any]:
        __tracebackhide__ = True
        answers = self._answers(ranks, timeout_s)
        if failures := [f"rank {rank} {answer.value}" for rank, answer in answers.items() if not answer.succeeded]:
            raise RankFailure("\n".join(failures))
        return [answers[rank].value for rank in ranks]

    def _answers(self, ranks: Sequence[int], timeout_s: float) -> dict[int, _Answer]:
        """Each rank's answer, in the order of their answering; last those who never did, with where they hang."""
        answers: dict[int, _Answer] = {}
        waiting = {self._connections[rank]: rank for rank in ranks}
        start = time.monotonic()
        deadline = start + timeout_s
        idle: _Idleness | None = None  # Of the others, once one has failed.
        while waiting and time.monotonic() < deadline and (idle is None or idle.seconds() < GRACE_S):
            patience = 0.2 if idle else max(0.0, deadline - time.monotonic())
            for connection in wait(list(waiting), timeout=patience):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = _Answer(*pickle.loads(connection.recv_bytes()))
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(timeout=LIMIT_S)
                    answers[rank] = _Answer(False, f"died with exit code {self._processes[rank].exitcode}")
                if not answers[rank].succeeded:
                    idle = idle or _Idleness([self._pid(other) for other in waiting.values()])
        elapsed = time.monotonic() - start
        for rank in waiting.values():
            answers[rank] = _Answer(False, f"had not answered after {elapsed:.0f} s, and was at\n{self._stack(rank)}")
        return answers

    def _stack(self, rank: int) -> str:
        """Where `rank` is at this moment."""
        assert self._folder is not None
        file = _stack_file(self._folder.name, rank)
        os.kill(self._pid(rank), signal.SIGUSR1)
        stack, deadline = "", time.monotonic() + 20.0
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if (written := file.read_text()) and written == stack:
                break
            stack = written
        return stack

    def _pid(self, rank: int) -> int:
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def _kill(self, ranks: Sequence[int]) -> None:
        for rank in set(ranks) & set(self._processes):
            # What a rank has started outlives it otherwise, such as a server of multiprocessing's.
            for child in _children(self._pid(rank)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            process = self._processes.pop(rank)
            process.kill()
            process.join()
            self._connections.pop(rank).close()
        if self._folder is not None and not self._processes:
            self._folder.cleanup()
            self._folder = None


def _children(pid: int) -> list[int]:
    """Processes that the main thread of another has started; none where the system does not tell."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"stack_{rank}"


def _serve(rank: int, folder: str, join: Callable[[int, str], None], connection: Connection) -> None:
    """A rank's life: join the others, then run what arrives until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the connection.
    torch.set_num_threads(1)
    with _stack_file(folder, rank).open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file)
        _answer(connection, functools.partial(join, rank, folder))
        while True:
            try:
                message = connection.recv_bytes()
            except (EOFError, ConnectionResetError):
                return
            _answer(connection, functools.partial(_call, message))


def _call(message: bytes) -> Any:
    function, args = pickle.loads(message)
    return function(*args)


def _answer(connection: Connection, compute: Callable[[], Any]) -> None:
    try:
        answer = pickle.dumps((True, compute()))
    except Exception:
        answer = pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
    connection.send_bytes(answer)
