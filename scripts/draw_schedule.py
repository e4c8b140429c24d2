"""Draw who holds which chunk and what a ring does at each step, from the layout and the schedule themselves.

python scripts/draw_schedule.py            # draws them anew into docs/architecture.md
python scripts/draw_schedule.py --check    # only says whether they are as the code has them
"""

import argparse
import re
import sys
from pathlib import Path

from mindspeed_cp.layout import MaskKind, SequenceLayout
from mindspeed_cp.schedule import Hop, RingSchedule, Step

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"
DRAWING = re.compile(r"(<!-- drawing: (\w+) -->\n).*?(<!-- end of drawing -->)", re.DOTALL)


def draw_chunks(size: int) -> str:
    """Which rank holds each chunk of a sequence, and what a rank's queries see of each owner's keys."""
    layout = SequenceLayout(size=size)
    owner = {chunk: rank for rank in range(size) for chunk in layout.chunk_ids(rank)}
    lines = [
        "chunk of the sequence  " + "".join(f"{chunk:3d}" for chunk in range(layout.num_chunks)),
        "held by rank           " + "".join(f"{owner[chunk]:3d}" for chunk in range(layout.num_chunks)),
        "",
        "queries of   keys of rank " + "".join(f"{rank:<12d}" for rank in range(size)).rstrip(),
    ]
    for query_owner in range(size):
        cells = (_draw_work(layout, query_owner, key_owner) for key_owner in range(size))
        lines.append(f"rank {query_owner}                    " + "".join(f"{cell:12s}" for cell in cells).rstrip())
    return "\n".join(lines)


def _draw_work(layout: SequenceLayout, query_owner: int, key_owner: int) -> str:
    work = layout.work(query_owner, key_owner, causal=True, num_tokens=2)
    if work is None:
        return "-"
    queries, keys = ("all" if part == slice(0, 2) else "half" for part in (work.queries, work.keys))
    return "triangle" if work.mask is MaskKind.TRIANGLE else f"{queries} x {keys}"


def draw_ring(outer: int, inner: int) -> str:
    """Which block each rank works on at each step, and what travels meanwhile."""
    schedule = RingSchedule(outer=outer, inner=inner)
    width = max(4, len(str(schedule.size)) + 2)
    windows = [" ".join(f"{w * inner + i:>{width - 1}d}" for i in range(inner)) for w in range(outer)]
    head = "rank     " + "  |".join(windows)
    lines = [f"{head}   K/V on its way{'':32}dK/dV on its way"]
    for step in schedule.steps:
        owners = [
            " ".join(f"{schedule.owner(w * inner + i, step):>{width - 1}d}" for i in range(inner)) for w in range(outer)
        ]
        name = f"({step.window},{step.offset})"
        lines.append(f"{name:9s}{'  |'.join(owners)}   {_draw_kv(schedule, step):46s}{_draw_gradients(schedule, step)}")
    return "\n".join(line.rstrip() for line in lines)


def _draw_kv(schedule: RingSchedule, step: Step) -> str:
    """The transfers of K/V that are under way while `step` is computed, those that left earlier included."""
    under_way = []
    for start in schedule.steps[: schedule.steps.index(step) + 1]:
        for needed_at, hop in schedule.departures(start).items():
            if schedule.steps.index(needed_at) > schedule.steps.index(step):
                under_way.append(f"{_draw_hop(hop)} for ({needed_at.window},{needed_at.offset})")
    return ", ".join(under_way) or "nothing"


def _draw_gradients(schedule: RingSchedule, step: Step) -> str:
    """What leaves after `step` in the backward pass."""
    leaving = []
    if step.offset:
        leaving.append(f"partials {_draw_hop(Hop(0, -step.offset))}")
    if schedule.ends_window(step) and step.window:
        leaving.append(f"the window's sum {_draw_hop(Hop(-step.window, 0))}")
    return ", ".join(leaving) or "nothing"


def _draw_hop(hop: Hop) -> str:
    return f"{hop.inner:+d} in window" if hop.outer == 0 else f"{hop.outer:+d} window"


DRAWINGS = {
    "chunks": lambda: draw_chunks(4),
    "ring": lambda: draw_ring(outer=1, inner=4),
    "double_ring": lambda: draw_ring(outer=2, inner=4),
}
"""What each mark in the page stands for."""


def draw_into(page: str) -> str:
    """The page with every drawing made anew."""
    return DRAWING.sub(lambda mark: f"{mark[1]}```text\n{DRAWINGS[mark[2]]()}\n```\n{mark[3]}", page)


def main() -> int:
    """Read the command line and draw; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where one is out of date")
    args = parser.parse_args()
    page = PAGE.read_text()
    drawn = draw_into(page)
    if args.check:
        print("up to date" if drawn == page else f"{PAGE.name} is out of date: run python scripts/draw_schedule.py")
        return int(drawn != page)
    PAGE.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
