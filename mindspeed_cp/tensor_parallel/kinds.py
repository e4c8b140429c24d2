"""The kinds of tensor parallelism as data: their axes, the grids that they take, and how a linear layer's tensors lie.

Note [Roles]
    A linear layer Y = X W^T has three tensors, and an axis of the grid shards at most one dim of each. What the axis
    does follows from that alone, and that is all there is to any kind:

        X       W      Y       the axis                               forward              backward
        rows    -      rows    runs the layer on several batches      nothing              dW all-reduced
        -       out    out     has columns of W (1D column)           nothing              dX all-reduced
        rows    out    out     has columns of W, and rows of X        X gathered           dX reduce-scattered
        in      out    out     has columns of W, and columns of X     X gathered           dX reduce-scattered
        rows    in     rows    keeps W in parts                       W gathered           dW reduce-scattered
        in      in     -       has a part of each product (1D row)    Y all-reduced        nothing
        in      in     rows    has a part of each product             Y reduce-scattered   dY gathered

    A kind is a choice of rows for its axes. 2D: j gathers X, i gathers W. 2.5D: depth runs 2D on several batches.
    3D: j gathers X, i gathers W, k scatters Y; in the next layer j and k change places, because Y lies as they left it.
    x*y: x gathers X, y scatters Y, and W stays where it is; the next layer has x and y change places.

Sources: 1D Megatron-LM arXiv:1909.08053, with sequence parallelism arXiv:2205.05198; 2D arXiv:2104.05343;
2.5D arXiv:2105.14500; 3D arXiv:2105.14450; x*y, where weights stay and activations travel: MindSpeed's TP-2D.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, NamedTuple

from mindspeed_cp.tensor_parallel.grid import Axes, Grid
from mindspeed_cp.tensor_parallel.layout import Layout, Placement

KindName = Literal["1d", "1d-sp", "2d", "2.5d", "3d", "xy"]


class Role(Enum):
    """What an axis does in a linear layer, see Note [Roles]."""

    IDLE = "idle"
    SHARE_WEIGHT = "share the weight"
    SHARE_INPUT = "share the input"
    GATHER_INPUT = "gather the input"
    GATHER_WEIGHT = "gather the weight"
    REDUCE_OUTPUT = "all-reduce the output"
    SCATTER_OUTPUT = "reduce-scatter the output"


ROLES: dict[tuple[str | None, str | None, str | None], Role] = {
    (None, None, None): Role.IDLE,
    ("rows", None, "rows"): Role.SHARE_WEIGHT,
    (None, "out", "out"): Role.SHARE_INPUT,
    ("rows", "out", "out"): Role.GATHER_INPUT,
    ("in", "out", "out"): Role.GATHER_INPUT,
    ("rows", "in", "rows"): Role.GATHER_WEIGHT,
    ("in", "in", None): Role.REDUCE_OUTPUT,
    ("in", "in", "rows"): Role.SCATTER_OUTPUT,
}
"""Role of an axis by what it shards of X, W and Y: Note [Roles] in one place."""


class LinearLayouts(NamedTuple):
    """How the tensors of a linear layer lie. weight: [out, in], as nn.Linear has it."""

    input: Layout
    weight: Placement
    output: Layout

    @property
    def bias(self) -> Placement:
        """Of the bias [out], which is added to the output."""
        return (self.output.features,)

    def role(self, axis: str) -> Role:
        """What an axis does. Asserts that the three tensors can lie so."""
        out, in_ = self.weight
        x = "rows" if axis in self.input.rows else "in" if axis in self.input.features else None
        w = "out" if axis in out else "in" if axis in in_ else None
        y = "rows" if axis in self.output.rows else "out" if axis in self.output.features else None
        assert (x, w, y) in ROLES, f"axis {axis} shards {x} of X, {w} of W and {y} of Y"
        return ROLES[x, w, y]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of tensor parallelism.

    axes: of its grids, the last one varying fastest. shapes: sizes of its axes in all grids of a number of ranks.
    linears: the linear layers there are; a layer is the one whose input lies as what it is given. The first is given a
    block's input, and the last gives its output. rule: which numbers of ranks it takes, in words.
    replicas: axes along which weights are replicated and activations are not.
    """

    name: KindName
    axes: Axes
    rule: str
    shapes: Callable[[int], Iterator[tuple[int, ...]]]
    linears: tuple[LinearLayouts, ...]
    replicas: Axes = ()

    @property
    def outer(self) -> Layout:
        """How activations lie between the blocks of a model."""
        return self.linears[0].input

    @property
    def inner(self) -> Layout:
        """How they lie within a block, where heads or the MLP's features are sharded."""
        return self.linears[0].output

    @property
    def vocabulary(self) -> Axes:
        """Axes that shard the vocabulary of the embedding: those that neither shard its features nor replicate it."""
        taken = self.outer.features + self.replicas
        return tuple(axis for axis in self.axes if axis not in taken)

    @property
    def moves_rows(self) -> bool:
        """Whether rows are gathered or scattered along an axis: then all its ranks have equally many."""
        return any(
            layouts.role(axis) is Role.SCATTER_OUTPUT
            or (layouts.role(axis) is Role.GATHER_INPUT and axis in layouts.input.rows)
            for layouts in self.linears
            for axis in self.axes
        )

    def linear(self, given: Layout) -> LinearLayouts:
        """The linear layer for an input that lies so. Raises ValueError where there is none."""
        for layouts in self.linears:
            if layouts.input == given:
                return layouts
        taken = " or ".join(f"with {layouts.input}" for layouts in self.linears)
        raise ValueError(f"a {self.name} linear layer takes an input {taken}, and this one is with {given}.")

    def within(self, *, batch: Axes = (), sequence: Axes = ()) -> "Kind":
        """The same kind where further axes have cut the batch and the sequence before."""
        linears = tuple(
            LinearLayouts(
                each.input.within(batch=batch, sequence=sequence),
                each.weight,
                each.output.within(batch=batch, sequence=sequence),
            )
            for each in self.linears
        )
        return replace(
            self, axes=batch + sequence + self.axes, linears=linears, replicas=batch + sequence + self.replicas
        )


def _any_number(ranks: int) -> Iterator[tuple[int, ...]]:
    yield (ranks,)


def _squares(ranks: int) -> Iterator[tuple[int, ...]]:
    yield from ((q, q) for q in range(1, ranks + 1) if q * q == ranks)


def _stacked_squares(ranks: int) -> Iterator[tuple[int, ...]]:
    yield from ((ranks // (q * q), q, q) for q in range(1, math.isqrt(ranks) + 1) if ranks % (q * q) == 0)


def _cubes(ranks: int) -> Iterator[tuple[int, ...]]:
    yield from ((q, q, q) for q in range(1, ranks + 1) if q**3 == ranks)


def _products(ranks: int) -> Iterator[tuple[int, ...]]:
    yield from ((ranks // x, x) for x in range(1, ranks + 1) if ranks % x == 0)


_WHOLE, _TP = Layout(), Layout(features=("tp",))
_TOKENS = Layout(sequence=("tp",))
_COLUMN, _ROW = (("tp",), ()), ((), ("tp",))
_SQUARE = Layout(batch=("i",), features=("j",))
_STACKED = Layout(batch=("depth", "i"), features=("j",))
_CUBE, _CUBE_TURNED = Layout(batch=("i", "j"), features=("k",)), Layout(batch=("i", "k"), features=("j",))
_BY_X, _BY_Y = Layout(sequence=("x",), features=("y",)), Layout(sequence=("y",), features=("x",))

KINDS: dict[KindName, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="1d",
            axes=("tp",),
            rule="any number of ranks",
            shapes=_any_number,
            linears=(LinearLayouts(_WHOLE, _COLUMN, _TP), LinearLayouts(_TP, _ROW, _WHOLE)),
        ),
        Kind(
            name="1d-sp",
            axes=("tp",),
            rule="any number of ranks",
            shapes=_any_number,
            linears=(LinearLayouts(_TOKENS, _COLUMN, _TP), LinearLayouts(_TP, _ROW, _TOKENS)),
        ),
        Kind(
            name="2d",
            axes=("i", "j"),
            rule="q x q ranks",
            shapes=_squares,
            linears=(LinearLayouts(_SQUARE, (("j",), ("i",)), _SQUARE),),
        ),
        Kind(
            name="2.5d",
            axes=("depth", "i", "j"),
            rule="depth x q x q ranks",
            shapes=_stacked_squares,
            linears=(LinearLayouts(_STACKED, (("j",), ("i",)), _STACKED),),
            replicas=("depth",),
        ),
        Kind(
            name="3d",
            # i cuts the parts of W that k or j have cut, and torch's DTensor wants the axis that cuts last to be last.
            axes=("k", "j", "i"),
            rule="q x q x q ranks",
            shapes=_cubes,
            linears=(
                LinearLayouts(_CUBE, (("j",), ("k", "i")), _CUBE_TURNED),
                LinearLayouts(_CUBE_TURNED, (("k",), ("j", "i")), _CUBE),
            ),
        ),
        Kind(
            name="xy",
            axes=("y", "x"),
            rule="x * y ranks",
            shapes=_products,
            linears=(
                LinearLayouts(_BY_X, (("x",), ("y",)), _BY_Y),
                LinearLayouts(_BY_Y, (("y",), ("x",)), _BY_X),
            ),
        ),
    )
}
"""All kinds. The names of the axes are the indices of the blocks: in 2D, rank (i, j) holds X_ij, W_ij and Y_ij."""


def grids(kind: KindName, ranks: int) -> list[Grid]:
    """All grids of a kind that so many ranks form. Raises ValueError for none."""
    if ranks < 1:
        raise ValueError(f"a mesh of {ranks} ranks; use 1 or more.")
    return [Grid(KINDS[kind].axes, sizes) for sizes in KINDS[kind].shapes(ranks)]


def choose_grid(
    kind: KindName, ranks: int, *, depth: int | None = None, x: int | None = None, y: int | None = None
) -> Grid:
    """The grid of a kind with so many ranks.

    depth: of 2.5D, 1 where it is not given (or whatever leaves a square, where 1 does not). x, y: of x*y; one follows
    from the other.

    Raises ValueError for a number of ranks or sizes that do not fit, with those that do.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no tensor parallelism {kind!r}; there is {', '.join(KINDS)}.")
    asked = {axis: size for axis, size in (("depth", depth), ("x", x), ("y", y)) if size is not None}
    for axis in asked:
        if axis not in KINDS[kind].axes:
            owner = next(name for name, each in KINDS.items() if axis in each.axes)
            raise ValueError(
                f"{axis}={asked[axis]} is given, and {kind} has no such axis; leave it out, or use {owner}."
            )
    if kind == "xy" and not asked:
        raise ValueError("xy is given neither x nor y; give one of them, and the other one follows.")
    there = grids(kind, ranks)
    fitting = [grid for grid in there if all(grid.size_of((axis,)) == size for axis, size in asked.items())]
    if fitting:
        return min(fitting, key=lambda grid: grid.sizes)
    sizes = "".join(f", {axis}={size}" for axis, size in asked.items())
    ways = [f"with {ranks} ranks {' or '.join(map(str, there))}"] if there else []
    if others := _numbers_that_fit(kind, ranks, asked):
        ways.append(f"{' or '.join(map(str, others))} ranks")
    raise ValueError(f"{kind} takes {KINDS[kind].rule}, not {ranks}{sizes}; use {', or '.join(ways)}.")


def _numbers_that_fit(kind: KindName, ranks: int, asked: dict[str, int]) -> list[int]:
    """The nearest numbers of ranks, one below and one above, that give a grid with the sizes asked for."""

    def fits(number: int) -> bool:
        return any(all(grid.size_of((axis,)) == size for axis, size in asked.items()) for grid in grids(kind, number))

    below = next((number for number in range(ranks - 1, 0, -1) if fits(number)), None)
    above = next((number for number in range(ranks + 1, 8 * ranks + 1) if fits(number)), None)
    return [number for number in (below, above) if number is not None]
