"""Drawings of who holds which chunk and of what a ring does at each step, from the plan and the program themselves."""

from mindspeed_cp.layouts import EqualChunks
from mindspeed_cp.plan import FULL, AttentionPlan, Tile
from mindspeed_cp.program import Axis, Phase, Program, Step, program
from mindspeed_cp.schedule import RingSchedule


def draw_chunks(size: int) -> str:
    """Which rank holds each chunk of a sequence, and what a rank's queries see of each owner's keys."""
    shards = EqualChunks(size, tokens=2)
    plan = AttentionPlan(shards, shards)
    owner = {chunk: rank for rank in range(size) for chunk in shards.chunks(rank)}
    lines = [
        "chunk of the sequence  " + "".join(f"{chunk:3d}" for chunk in sorted(owner)),
        "held by rank           " + "".join(f"{owner[chunk]:3d}" for chunk in sorted(owner)),
        "",
        "queries of   keys of rank " + "".join(f"{rank:<12d}" for rank in range(size)).rstrip(),
    ]
    for query_rank in range(size):
        cells = (_draw_tiles(plan.tiles(query_rank, key_rank)) for key_rank in range(size))
        lines.append(f"rank {query_rank}                    " + "".join(f"{cell:12s}" for cell in cells).rstrip())
    return "\n".join(lines)


def _draw_tiles(tiles: tuple[Tile, ...]) -> str:
    drawn = []
    for tile in tiles:
        queries, keys = ("all" if part == slice(0, 2) else "half" for part in (tile.queries, tile.keys))
        drawn.append("triangle" if tile.right == 0 else f"{queries} x {keys}")
    return ", ".join(drawn) or "-"


def draw_ring(outer: int, inner: int) -> str:
    """Which block each rank works on at each step, and what travels meanwhile, where all see all."""
    schedule = RingSchedule(outer=outer, inner=inner)
    shards = EqualChunks(schedule.size, tokens=2)
    plan = AttentionPlan(shards, shards, FULL)
    programs = [program(plan, schedule, rank, Phase.BACKWARD) for rank in range(schedule.size)]
    width = max(4, len(str(schedule.size)) + 2)
    rings = [" ".join(f"{o * inner + i:>{width - 1}d}" for i in range(inner)) for o in range(outer)]
    lines = [f"step     {'  |'.join(rings)}   {'K/V on its way to rank 0':40s}dK/dV that leave rank 0"]
    for number, steps in enumerate(zip(*(each.steps for each in programs), strict=True)):
        cells = [f"{step.owner if step.tiles else '-':>{width - 1}}" for step in steps]
        owners = "  |".join(" ".join(cells[o * inner : (o + 1) * inner]) for o in range(outer))
        under_way = _draw_kv(programs[0], number)
        lines.append(f"{number:<9d}{owners}   {under_way:40s}{_draw_gradients(steps[0])}")
    return "\n".join(line.rstrip() for line in lines)


def _draw_kv(of_rank: Program, number: int) -> str:
    """The transfers of K/V to a rank that are under way while a step is computed, those that left earlier included."""
    owners = [step.owner for step in of_rank.steps]
    under_way = []
    for step in of_rank.steps[: number + 1]:
        for message in step.receives:
            needed_at = owners.index(message.owner)
            if needed_at > number:
                under_way.append(f"from {message.peer} for step {needed_at}")
    return ", ".join(under_way) or "nothing"


def _draw_gradients(step: Step) -> str:
    """What leaves after a step of rank 0."""
    if step.gives is None:
        return "nothing"
    what = "the sum" if step.gives.axis is Axis.ACROSS else "partials"
    return f"{what} for {step.gives.owner} to {step.gives.peer}"
