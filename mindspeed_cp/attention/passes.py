"""How a rank plays a pass of a ring: its program, and the kernel calls that compute the tiles of each step.

Both are made once for a plan and a case, and kept with the plan. The backward pass computes every tile by the kernel
that computed it in the forward pass, whose state it needs.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mindspeed_cp.kernels import KernelRegistry, Term, TileCase, TileKernel
from mindspeed_cp.kernels.calls import Call, calls
from mindspeed_cp.kernels.wrapped import Turned
from mindspeed_cp.plan import AttentionPlan, Tile, within
from mindspeed_cp.program import KV, Phase, Program, Step, Transport, program
from mindspeed_cp.schedule import RingSchedule


@dataclass(frozen=True, eq=False)
class RingPass:
    """A rank's program, and the calls of kernels for the tiles of each step.

    transport, ahead: how its messages travel, and whether while a step is computed; `program` was given them.
    """

    transport: Transport
    ahead: bool
    program: Program
    phase: Phase
    calls: tuple[tuple[Call, ...], ...]

    def steps(self) -> Iterator[tuple[Step, tuple[Call, ...]]]:
        """Each step with its calls."""
        return zip(self.program.steps, self.calls, strict=True)


def forward_pass(
    plan: AttentionPlan,
    schedule: RingSchedule,
    rank: int,
    transport: Transport,
    pieces: int,
    kept: KV,
    ahead: bool,
    kernels: KernelRegistry,
    case: TileCase,
) -> RingPass:
    """The forward pass of a rank of the ring; arguments are those of `program`, and what calls are chosen by.

    case: of q, k and v of all heads. Raises NotImplementedError where no kernel takes a tile.
    """
    made = program(plan, schedule, rank, Phase.FORWARD, transport=transport, pieces=pieces, kept=kept, ahead=ahead)
    share = case.of_piece(pieces)
    return RingPass(
        transport,
        ahead,
        made,
        Phase.FORWARD,
        tuple(tuple(calls(step.tiles, case if step.piece is None else share, kernels)) for step in made.steps),
    )


def backward_pass(
    plan: AttentionPlan, schedule: RingSchedule, forward: RingPass, case: TileCase, kernels: KernelRegistry
) -> RingPass:
    """The pass in which every tile is computed by the kernel that computed it in the forward pass.

    Only the own block is in other tiles there, two parts of it; as a whole where a kernel does not take its parts, or
    has drawn dropout for the whole by its own coordinates.
    """
    rank, pieces = forward.program.rank, forward.program.pieces
    program_as_before = functools.partial(
        program, transport=forward.transport, pieces=pieces, kept=forward.program.kept, ahead=forward.ahead
    )
    of_block = {(step.owner, step.piece): (step, done) for step, done in forward.steps() if step.tiles}

    def share(step: Step) -> TileCase:
        return case if step.piece is None else case.of_piece(pieces)

    for in_two in (False,) if Term.KERNEL_DROPOUT in case.terms else (True, False):
        made = program_as_before(plan, schedule, rank, Phase.BACKWARD, in_two=in_two)
        try:
            each = tuple(
                _calls_as_before(step, *of_block.get((step.owner, step.piece), (step, ())), share(step), kernels)
                for step in made.steps
            )
        except NotImplementedError:
            continue
        return RingPass(forward.transport, forward.ahead, made, Phase.BACKWARD, each)
    raise AssertionError("the tiles of the forward pass were computed, and are not to be had again")


def _calls_as_before(
    step: Step, before: Step, done: Sequence[Call], case: TileCase, kernels: KernelRegistry
) -> tuple[Call, ...]:
    """The calls for a step's tiles by the kernels of the forward pass. Raises NotImplementedError where one refuses."""
    if not step.tiles or step.tiles == before.tiles:
        return tuple(done) if step.tiles else ()
    parts: dict[str, tuple[TileKernel, list[Tile]]] = {}
    for call in done:
        kernel = call.kernel.kernel if isinstance(call.kernel, Turned) else call.kernel
        parts.setdefault(kernel.name, (kernel, []))[1].extend(_common(call.tiles, step.tiles))
    return tuple(call for kernel, tiles in parts.values() for call in calls(tiles, case, kernels.alone(kernel)))


def _corners(tile: Tile) -> tuple[object, ...]:
    return tile.queries.start, tile.queries.stop, tile.keys.start, tile.keys.stop, tile.left, tile.right, tile.sample


def _common(tiles: Sequence[Tile], others: Sequence[Tile]) -> Iterator[Tile]:
    """What is in a tile of both. Most of many tiles are the same in both."""
    known = {_corners(tile) for tile in tiles} & {_corners(other) for other in others}
    yield from (tile for tile in tiles if _corners(tile) in known)
    others = [other for other in others if _corners(other) not in known]
    for tile in (tile for tile in tiles if _corners(tile) not in known):
        for other in others:
            common = within(tile, other.queries, other.keys) if tile.sample == other.sample else None
            if common is not None:
                yield common
