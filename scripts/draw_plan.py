"""Draw who computes what of packed documents, and the table of area and bytes of the layouts, from the plan itself.

python scripts/draw_plan.py            # draws them anew into docs/layouts.md and docs/images/layouts.png
python scripts/draw_plan.py --check    # only says whether the table is as the code has it
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from generated_page import redrawn, write_or_check
from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.benchmark.documents import areas, lognormal_mix, received, unevenness
from mindspeed_cp.plan import AttentionPlan, Run

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, PICTURE = DOCS / "layouts.md", DOCS / "images" / "layouts.png"


class Rule(NamedTuple):
    """A layout as PackedBatch takes it."""

    name: str
    layout: str
    prefer: str | None = None


RULES = (
    Rule("contiguous", "contiguous"),
    Rule("zigzag over the stream", "zigzag"),
    Rule("zigzag by document", "zigzag_by_document"),
    Rule("balanced, locality", "balanced"),
    Rule("balanced, balance", "balanced", "balance"),
)
RANKS, LENGTH, SEEDS = 8, 2**15, range(10)
WINDOWS = {"causal": None, "window of a 64th": (LENGTH // 64 - 1, 0)}

DRAWN = RULES[1:4]
DRAWN_RANKS = 4
DRAWN_DOCUMENTS = (0, 52, 60, 64, 88, 96, 144)
DRAWN_WINDOWS = ((-1, 0), (-1, 0), (-1, -1), (-1, 0), (-1, 0), (11, 0))


def cu_seqlens(lengths: tuple[int, ...]) -> list[int]:
    """Where documents of these lengths begin, and where the last one ends."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends


def draw_table() -> str:
    """Each layout's unevenness, and what the ranks receive of others, over the mix; the worst in brackets."""
    lines = [
        f"| | {' | '.join(f'{name}: area, largest by mean | received' for name in WINDOWS)} | runs of a rank |",
        "|---|" + "---|---|" * len(WINDOWS) + "---|",
    ]
    for rule in RULES:
        cells = []
        for window in WINDOWS.values():
            plans = [_batch(cu_seqlens(lognormal_mix(seed, LENGTH)), rule, RANKS, window).plan for seed in SEEDS]
            uneven = [unevenness(areas(plan)) for plan in plans]
            share = [received(plan) / (LENGTH * (RANKS - 1)) for plan in plans]
            cells += [f"{sum(uneven) / len(uneven):.2f} ({max(uneven):.2f})", f"{sum(share) / len(share):.2f}"]
        runs = [len(plan.queries.runs(rank)) for plan in plans for rank in range(RANKS)]
        lines.append(f"| {rule.name} | {' | '.join(cells)} | {sum(runs) / len(runs):.0f} |")
    return "\n".join(lines)


def _batch(ends: list[int], rule: Rule, num_ranks: int, window: Any) -> PackedBatch:
    return PackedBatch.from_cu_seqlens(ends, num_ranks, window_size=window, layout=rule.layout, prefer=rule.prefer)


def draw_picture() -> None:
    """Queries down, keys across, in the order of the stream; each tile in the colour of the rank that computes it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(DRAWN), figsize=(15, 5.6), layout="constrained", dpi=110)
    for panel, rule in zip(panels, DRAWN, strict=True):
        plan = _batch(list(DRAWN_DOCUMENTS), rule, DRAWN_RANKS, list(DRAWN_WINDOWS)).plan
        image = _image(plan, [plt.get_cmap("tab10")(rank)[:3] for rank in range(DRAWN_RANKS)])
        panel.imshow(image, interpolation="nearest", extent=(0, DRAWN_DOCUMENTS[-1], DRAWN_DOCUMENTS[-1], 0))
        panel.set_xticks(DRAWN_DOCUMENTS)
        panel.set_yticks(DRAWN_DOCUMENTS)
        panel.tick_params(labelsize=7)
        share = received(plan) / (DRAWN_DOCUMENTS[-1] * (DRAWN_RANKS - 1))
        panel.set_title(
            f"{rule.name}\narea, largest by mean {unevenness(areas(plan)):.2f}; received {share:.2f} of a full ring's",
            fontsize=10,
        )
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{rank}") for rank in range(DRAWN_RANKS)]
    labels = [f"rank {rank}" for rank in range(DRAWN_RANKS)]
    figure.legend(handles, labels, loc="outside lower center", ncols=DRAWN_RANKS, frameon=False)
    figure.savefig(PICTURE)


def _image(plan: AttentionPlan, colours: list[tuple[float, ...]]) -> Any:
    """Red, green and blue of each pair of the stream; pale where the key has to travel."""
    length = DRAWN_DOCUMENTS[-1]
    image = [[(1.0, 1.0, 1.0)] * length for _ in range(length)]
    for query_rank in range(DRAWN_RANKS):
        queries = _stream(plan.queries.runs(query_rank))
        for key_rank in range(DRAWN_RANKS):
            keys = _stream(plan.keys.runs(key_rank))
            strength = 1.0 if key_rank == query_rank else 0.45
            colour = tuple(1 - strength * (1 - part) for part in colours[query_rank])
            for tile in plan.tiles(query_rank, key_rank):
                for row in range(tile.num_queries):
                    diagonal = row + tile.num_keys - tile.num_queries
                    first = 0 if tile.left is None else max(0, diagonal - tile.left)
                    stop = tile.num_keys if tile.right is None else min(tile.num_keys, diagonal + tile.right + 1)
                    for key in keys[tile.keys.start + first : tile.keys.start + stop]:
                        image[queries[tile.queries.start + row]][key] = colour
    return image


def _stream(runs: tuple[Run, ...]) -> list[int]:
    """The place in the stream of each of a rank's tokens."""
    return [
        DRAWN_DOCUMENTS[run.document] + run.position + token for run in runs for token in range(run.stop - run.start)
    ]


DRAWINGS: dict[str, Callable[[], str]] = {"layouts": draw_table}
"""What each mark in the page stands for."""


def draw_into(page: str) -> str:
    """The page with its table made anew."""
    return redrawn(page, DRAWINGS)


def main() -> int:
    """Read the command line and write; the exit status."""
    status = write_or_check(PAGE, draw_into, script=Path(__file__).name, description=__doc__)
    if "--check" not in sys.argv:
        draw_picture()
    return status


if __name__ == "__main__":
    sys.exit(main())
