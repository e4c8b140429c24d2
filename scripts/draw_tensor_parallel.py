"""Draw which rank holds which block in each kind of tensor parallelism, and the table of costs, from the code itself.

python scripts/draw_tensor_parallel.py            # draws them anew into docs/tensor_parallel.md
python scripts/draw_tensor_parallel.py --check    # only says whether they are as the code has them
"""

import sys
from itertools import zip_longest
from pathlib import Path

from generated_page import as_text, redrawn, write_or_check
from mindspeed_cp.tensor_parallel import KINDS, Grid, choose_grid, comm_volume, memory, mlp_shapes
from mindspeed_cp.tensor_parallel.layout import Placement

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tensor_parallel.md"

DRAWN = (("1d", 4, {}), ("1d-sp", 4, {}), ("2d", 4, {}), ("2.5d", 8, {"depth": 2}), ("3d", 8, {}), ("xy", 6, {"x": 3}))
COUNTED = (
    ("1d", 16, {}),
    ("1d-sp", 16, {}),
    ("2d", 16, {}),
    ("2.5d", 16, {"depth": 4}),
    ("2.5d", 8, {"depth": 2}),
    ("3d", 8, {}),
    ("3d", 64, {}),
    ("xy", 16, {"x": 8}),
    ("xy", 16, {"x": 4}),
)
BATCH, SEQUENCE, HIDDEN = 16, 2048, 4096


def draw_blocks() -> str:
    """The blocks of X, W and Y of a kind's first linear layer, each with the ranks that hold it."""
    drawings = []
    for kind, ranks, sizes in DRAWN:
        grid, layouts = choose_grid(kind, ranks, **sizes), KINDS[kind].linears[0]
        blocks = [
            _draw("X", ("rows", "in"), layouts.input.placement(2), grid),
            _draw("W", ("out", "in"), layouts.weight, grid),
            _draw("Y", ("rows", "out"), layouts.output.placement(2), grid),
        ]
        widths = [max(map(len, lines)) for lines in blocks]
        rows = zip_longest(*blocks, fillvalue="")
        drawn = (
            "    ".join(line.ljust(width) for line, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )
        drawings.append("\n".join([f"{kind}: {grid}, rank = {_rank_formula(grid)}", *drawn]))
    return "\n\n".join(drawings)


def _rank_formula(grid: Grid) -> str:
    formula = grid.axes[0]
    for axis in grid.axes[1:]:
        formula = f"({formula})" if "+" in formula else formula
        formula = f"{formula} * {grid.size_of((axis,))} + {axis}"
    return formula


def _draw(name: str, dims: tuple[str, str], placement: Placement, grid: Grid) -> list[str]:
    """A matrix of blocks; a block that several ranks hold lists them."""
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank in range(grid.size):
        holders.setdefault(tuple(grid.index(rank, axes) for axes in placement), []).append(rank)
    rows, columns = (grid.size_of(axes) for axes in placement)
    cells = [[",".join(map(str, holders[row, column])) for column in range(columns)] for row in range(rows)]
    width = max(len(cell) for row in cells for cell in row)
    by = (f"{dim} by {', '.join(axes)}" for dim, axes in zip(dims, placement, strict=True) if axes)
    return [f"{name}: {'; '.join(by) or 'whole'}", *("  ".join(cell.ljust(width) for cell in row) for row in cells)]


def draw_costs() -> str:
    """An MLP's bytes and memory on one rank, as a table."""
    shapes = mlp_shapes(BATCH, SEQUENCE, HIDDEN, 4 * HIDDEN)
    lines = ["| | ranks | forward | backward | parameters | saved | saved, again |", "|---|---|---|---|---|---|---|"]
    for kind, ranks, sizes in COUNTED:
        grid = choose_grid(kind, ranks, **sizes)
        sent, held = comm_volume(KINDS[kind], grid, shapes), memory(KINDS[kind], grid, shapes)
        again = memory(KINDS[kind], grid, shapes, gathering="again")
        numbers = (sent.forward, sent.backward, held.parameters, held.saved, again.saved)
        lines.append(f"| {kind} {grid} | {ranks} | " + " | ".join(f"{number / 2**20:.0f}" for number in numbers) + " |")
    return "\n".join(lines)


DRAWINGS = {"blocks": lambda: as_text(draw_blocks()), "costs": draw_costs}
"""What each mark in the page stands for."""


def main() -> int:
    """Read the command line and write; the exit status."""
    return write_or_check(PAGE, lambda page: redrawn(page, DRAWINGS), script=Path(__file__).name, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
