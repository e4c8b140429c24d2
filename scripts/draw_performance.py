"""Draw the pictures of docs/performance.md anew from the tables that stand there.

python scripts/draw_performance.py [--output docs/images]
"""

import argparse
import re
from pathlib import Path

from mindspeed_cp.benchmark.plots import Times, plot_times
from mindspeed_cp.benchmark.training import Measurement, plot

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
LIMIT_MIB = 512.0


def table_of(page: str, heading: str) -> tuple[list[str], dict[str, list[str]]]:
    """The first table below a heading: the titles of its columns, and the cells of each row by its first."""
    lines = page.partition(f"## {heading}\n")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    width = len(rows[0])
    head, _, *body = [row for row in rows if len(row) == width]
    return head[1:], {row[0]: row[1:] for row in body}


def times_of(page: str, heading: str) -> Times:
    """A table of milliseconds, in seconds."""
    places, rows = table_of(page, heading)
    return {
        name: {float(place): float(cell) / 1e3 for place, cell in zip(places, cells, strict=True)}
        for name, cells in rows.items()
    }


def training_of(page: str) -> list[Measurement]:
    """The table of training; memory above the start."""
    lengths, rows = table_of(page, "Training")
    found = []
    for name, cells in rows.items():
        for length, cell in zip(lengths, cells, strict=True):
            if measured := re.fullmatch(r"(\d+) tokens/s, (\d+) MiB", cell):
                tokens = int(length.split()[0])
                found.append(Measurement(name, tokens, tokens / int(measured[1]), float(measured[2])))
    return found


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE.parent / "images")
    args = parser.parse_args()
    page = PAGE.read_text()
    nodes = "two nodes of two ranks"
    plot_times(
        times_of(page, "Growing sequences"),
        "tokens of the sequence",
        f"{nodes}, 100 Mbit/s between them, 8 heads",
        args.output / "time_over_tokens.png",
    )
    plot_times(
        times_of(page, "Faster links, grouped queries"),
        "Mbit/s between nodes",
        f"{nodes}, 16384 tokens, 8 heads over 2 K/V heads",
        args.output / "time_over_rate.png",
    )
    measured = training_of(page)
    plot(measured, dict.fromkeys((one.configuration for one in measured), 0.0), LIMIT_MIB, args.output / "training.png")


if __name__ == "__main__":
    main()
