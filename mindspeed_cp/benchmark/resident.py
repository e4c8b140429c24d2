"""What the resident memory of a training process consists of: what is in use, and what the allocator keeps of the rest.

Note [Resident memory]
    The size of a process is not what its tensors take. malloc keeps most of what is given back to it, for later: in
    arenas, one for each thread that allocates, up to a threshold in each, and between blocks that are still in use. How
    much is in use it knows itself (mallinfo2), whoever has asked for it: tensors, messages under way, Python.

Linux with glibc.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


class _MallocInfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and newer."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks"),
            "keepcost",
        )
    )


@dataclass
class Resident:
    """In MiB. peak: the largest size of the process. in_use: the most that malloc had given at a time, as sampled.

    end: size of the process at the end. free: of that what malloc keeps for later. trimmed: after it was asked to give
    that back (malloc_trim). files: mapped from files, libraries for the most part. stacks: of threads; threads: how
    many there are.
    """

    peak: float = 0.0
    in_use: float = 0.0
    end: float = 0.0
    free: float = 0.0
    trimmed: float = 0.0
    files: float = 0.0
    stacks: float = 0.0
    threads: int = 0


@contextmanager
def watched(every_s: float = 0.002) -> Iterator[Resident]:
    """Measures this process while it is entered; complete when it is left. See Note [Resident memory]."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallocInfo
    found, done = Resident(), threading.Event()

    def sample() -> None:
        while not done.wait(every_s):
            info = libc.mallinfo2()
            found.in_use = max(found.in_use, (info.uordblks + info.hblkhd) / MIB)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        info = libc.mallinfo2()
        found.free = info.fordblks / MIB
        status = _status()
        found.peak, found.end, found.threads = status["VmHWM"], status["VmRSS"], threads()
        found.files, found.stacks = status["RssFile"] + status["RssShmem"], _stacks()
        libc.malloc_trim(0)
        found.trimmed = _status()["VmRSS"]


def threads() -> int:
    """Threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def _status() -> dict[str, float]:
    """Sizes by /proc/self/status, in MiB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[2:] == ["kB"]}


def _stacks() -> float:
    """Resident parts of what threads other than the first have for stacks, 8 MiB of addresses each."""
    resident, size = 0.0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if name == "Size:":
            size = int(rest[0])
        elif name == "Rss:" and size in (8192, 8188):
            resident += int(rest[0]) / 1024
    return resident
