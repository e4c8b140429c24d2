"""What each kind of tensor parallelism costs one rank, from its layouts alone: bytes sent, memory held; and the best.

Shapes: B batch, S sequence, I features in, O features out, all of whole tensors.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mindspeed_cp.comm.reduction import all_reduce_numbers
from mindspeed_cp.tensor_parallel.collectives import check_even
from mindspeed_cp.tensor_parallel.grid import Axes, Grid
from mindspeed_cp.tensor_parallel.kinds import KINDS, Kind, KindName, LinearLayouts, Role, grids
from mindspeed_cp.tensor_parallel.layout import Layout
from mindspeed_cp.tensor_parallel.linear import Gathering, check_gathering


class LinearShape(NamedTuple):
    """A linear layer of whole tensors: X [B, S, I], W [O, I], Y [B, S, O]."""

    batch: int
    sequence: int
    inputs: int
    outputs: int
    bias: bool = True


class AttentionShape(NamedTuple):
    """Attention between two linear layers. keys: features of K and V together.

    Where the sequence is sharded there, blocks of K and V travel in a ring in both passes, and their gradients go home
    in the second: as many bytes again, of which a causal mask saves some.
    """

    batch: int
    sequence: int
    keys: int


Shape = LinearShape | AttentionShape


class Volume(NamedTuple):
    """Bytes that one rank sends in each pass."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """In both passes."""
        return self.forward + self.backward


class Memory(NamedTuple):
    """Bytes that one rank holds: its parameters, and what the forward pass keeps for the backward pass."""

    parameters: int
    saved: int


def mlp_shapes(batch: int, sequence: int, hidden: int, ffn: int, *, gated: bool = False) -> tuple[Shape, ...]:
    """The linear layers of an MLP hidden -> ffn -> hidden; a gate goes with the first, as one of twice its outputs."""
    return LinearShape(batch, sequence, hidden, ffn * (1 + gated)), LinearShape(batch, sequence, ffn, hidden)


def block_shapes(
    batch: int, sequence: int, hidden: int, ffn: int, *, keys: int | None = None, gated: bool = False
) -> tuple[Shape, ...]:
    """The linear layers and the attention of a transformer block. keys: features of K and V together, 2 * hidden."""
    keys = 2 * hidden if keys is None else keys
    return (
        LinearShape(batch, sequence, hidden, hidden + keys),
        AttentionShape(batch, sequence, keys),
        LinearShape(batch, sequence, hidden, hidden),
        *mlp_shapes(batch, sequence, hidden, ffn, gated=gated),
    )


def comm_volume(
    kind: Kind, grid: Grid, shapes: Sequence[Shape], *, gathering: Gathering = "keep", itemsize: int = 2
) -> Volume:
    """What one rank sends for layers in a row, the first of which is given a block's input.

    kind, grid: of a mesh, see plan_mesh. itemsize: bytes of a number. Norms, losses and embeddings are not in it: they
    send a few numbers a token (see docs/tensor_parallel.md).

    Raises ValueError where the grid does not divide a shape: the parts would not be equal; or is of another kind.
    """
    forward = backward = 0
    _check(kind, grid, gathering)
    for shape, layouts in _layouts_of(kind, shapes):
        if isinstance(shape, AttentionShape):
            sent = _attention_numbers(shape, layouts.output, grid)
        else:
            sent = _linear_numbers(shape, layouts, grid, gathering)
        forward, backward = forward + sent.forward, backward + sent.backward
    return Volume(forward * itemsize, backward * itemsize)


def memory(
    kind: Kind, grid: Grid, shapes: Sequence[Shape], *, gathering: Gathering = "keep", itemsize: int = 2
) -> Memory:
    """What one rank holds for linear layers in a row, see comm_volume. What attention keeps is not in it."""
    parameters = saved = 0
    _check(kind, grid, gathering)
    for shape, layouts in _layouts_of(kind, shapes):
        if isinstance(shape, LinearShape):
            x, weight, _, bias = _part_sizes(shape, layouts, grid)
            parameters += weight + bias
            by_x, by_weight = (_ranks(layouts, grid, role) for role in (Role.GATHER_INPUT, Role.GATHER_WEIGHT))
            saved += x
            if gathering == "keep":
                saved += x * (by_x - 1) + weight * by_weight * (by_weight > 1)
    return Memory(parameters * itemsize, saved * itemsize)


class Choice(NamedTuple):
    """A kind and its grid, and what one rank sends and holds."""

    kind: KindName
    grid: Grid
    volume: Volume
    memory: Memory


def choices(
    ranks: int,
    shapes: Sequence[Shape],
    *,
    kinds: Iterable[KindName] = tuple(KINDS),
    gathering: Gathering = "keep",
    itemsize: int = 2,
) -> list[Choice]:
    """All kinds and grids of so many ranks that divide the shapes, those that send least first."""
    found = []
    for name in kinds:
        for grid in grids(name, ranks):
            kind = KINDS[name]
            try:
                volume = comm_volume(kind, grid, shapes, gathering=gathering, itemsize=itemsize)
            except ValueError:
                continue
            held = memory(kind, grid, shapes, gathering=gathering, itemsize=itemsize)
            found.append(Choice(name, grid, volume, held))
    return sorted(found, key=lambda choice: (choice.volume.total, sum(choice.memory)))


def best(
    ranks: int,
    shapes: Sequence[Shape],
    *,
    kinds: Iterable[KindName] = tuple(KINDS),
    gathering: Gathering = "keep",
    itemsize: int = 2,
    memory_limit: float = math.inf,
) -> Choice:
    """The kind and grid that send least, of those whose parameters and saved tensors fit into `memory_limit` bytes.

    Raises ValueError where there is none.
    """
    there = choices(ranks, shapes, kinds=kinds, gathering=gathering, itemsize=itemsize)
    if not there:
        raise ValueError(f"no kind of tensor parallelism cuts these layers in {ranks} equal parts; use another number.")
    fitting = [choice for choice in there if sum(choice.memory) <= memory_limit]
    if not fitting:
        least = min(there, key=lambda choice: sum(choice.memory))
        raise ValueError(
            f"nothing fits into {memory_limit:,.0f} bytes a rank; {least.kind} on {least.grid} takes least, "
            f"{sum(least.memory):,} bytes; use more ranks, or gathering='again'."
        )
    return fitting[0]


def _check(kind: Kind, grid: Grid, gathering: Gathering) -> None:
    """Raise ValueError for a grid of another kind, or no such gathering."""
    check_gathering(gathering)
    if kind.axes != grid.axes:
        raise ValueError(
            f"{kind.name} has the axes {', '.join(kind.axes)}, and the grid has {', '.join(grid.axes)}; take both from "
            f"plan_mesh."
        )


class _Numbers(NamedTuple):
    """What is sent in each pass, in numbers instead of bytes."""

    forward: int
    backward: int


def _layouts_of(kind: Kind, shapes: Sequence[Shape]) -> list[tuple[Shape, LinearLayouts]]:
    """Each layer with its layouts; attention with those of the linear layer before it."""
    found: list[tuple[Shape, LinearLayouts]] = []
    given = kind.outer
    for shape in shapes:
        if isinstance(shape, LinearShape):
            layouts = kind.linear(given)
            given = layouts.output
        found.append((shape, layouts))
    return found


def _linear_numbers(shape: LinearShape, layouts: LinearLayouts, grid: Grid, gathering: Gathering) -> _Numbers:
    """Note [Roles] in numbers: a gather among n ranks of parts of m sends (n-1) m, and so does what undoes it."""
    x, weight, y, bias = _part_sizes(shape, layouts, grid)
    gathered = (_ranks(layouts, grid, Role.GATHER_INPUT) - 1) * x + (
        _ranks(layouts, grid, Role.GATHER_WEIGHT) - 1
    ) * weight
    scattered = (_ranks(layouts, grid, Role.SCATTER_OUTPUT) - 1) * y
    again = gathered if gathering != "keep" else 0
    reduced = _all_reduced(y, _axes(layouts, grid, Role.REDUCE_OUTPUT), grid)
    shared = _all_reduced(x, _axes(layouts, grid, Role.SHARE_INPUT), grid)
    shared += _all_reduced(weight, _axes(layouts, grid, Role.SHARE_WEIGHT), grid)
    shared += _all_reduced(bias, layouts.output.rows, grid)
    return _Numbers(gathered + scattered + reduced, again + gathered + scattered + shared)


def _attention_numbers(shape: AttentionShape, layout: Layout, grid: Grid) -> _Numbers:
    ring = grid.size_of(layout.sequence)
    block = shape.batch * shape.sequence * shape.keys // grid.size_of(layout.rows + layout.features)
    return _Numbers((ring - 1) * block, 2 * (ring - 1) * block)


def _all_reduced(count: int, axes: Axes, grid: Grid) -> int:
    return sum(all_reduce_numbers(count, grid.size_of((axis,))) for axis in axes)


def _axes(layouts: LinearLayouts, grid: Grid, role: Role) -> Axes:
    return tuple(axis for axis in grid.axes if layouts.role(axis) is role)


def _ranks(layouts: LinearLayouts, grid: Grid, role: Role) -> int:
    return grid.size_of(_axes(layouts, grid, role))


class _PartSizes(NamedTuple):
    """Numbers in one rank's part of each tensor."""

    x: int
    weight: int
    y: int
    bias: int


def _part_sizes(shape: LinearShape, layouts: LinearLayouts, grid: Grid) -> _PartSizes:
    batch, sequence, inputs, outputs, bias = shape
    tensors = {
        "X": ((batch, sequence, inputs), layouts.input.placement(3)),
        "W": ((outputs, inputs), layouts.weight),
        "Y": ((batch, sequence, outputs), layouts.output.placement(3)),
        "b": ((outputs,), layouts.bias),
    }
    sizes = []
    for name, (whole, placement) in tensors.items():
        check_even(name, whole, placement, grid)
        sizes.append(math.prod(whole) // math.prod(grid.size_of(axes) for axes in placement))
    x, weight, y, bias_part = sizes
    return _PartSizes(x, weight, y, bias_part if bias else 0)
