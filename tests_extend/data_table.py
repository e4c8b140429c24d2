"""Every row of packed data, windows, sinks and dropout, on every algorithm against CP = 1, and what it notices.

    MEGATRON_LM=/path/to/Megatron-LM python tests_extend/data_table.py [row ...]
    python tests_extend/data_table.py windows dropout

The first table has the largest differences of losses and gradient norms; the second, for each mistake that is planted
in the library, how much it changes the losses. Bins of reinforcement learning need a checkout, and conversations one or
Megatron 0.19. Takes some minutes; exits with 1 where a row differs by more than rounding, or does not notice a mistake.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests_extend")]

from system_tests.conftest import TrainingPool  # noqa: E402
from system_tests.data_cases import DATA_ROWS, SEEN, STREAM_ROWS, runs_of  # noqa: E402
from system_tests.model_cases import ALGORITHMS, MOST  # noqa: E402
from system_tests.planted_cases import PLANTED  # noqa: E402


def main() -> int:
    """Print the tables; the exit status."""
    rows = DATA_ROWS | STREAM_ROWS
    names = sys.argv[1:] or [*rows]
    if unknown := [name for name in names if name not in rows]:
        print(f"there is no row {unknown[0]!r}; there are {', '.join(rows)}.", file=sys.stderr)
        return 2
    training, failed, noticed = TrainingPool(), False, []
    print("| data | " + " | ".join(ALGORITHMS) + " |\n|---" + "|---" * len(ALGORITHMS) + "|")
    for name in names:
        runs, cells, row = runs_of(training, name), [], rows[name]
        for algorithm in ALGORITHMS:
            found = runs.difference(algorithm)
            cells.append(str(found))
            failed |= not found.within(MOST)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        changes = {mistake: runs.difference(row.sample[0], mistake).losses for mistake in row.notices}
        failed |= not all(change > SEEN for change in changes.values())
        noticed.append([name, *(f"{changes[mistake]:.0e}" if mistake in changes else "" for mistake in PLANTED)])
    print("\n| data | " + " | ".join(PLANTED) + " |\n|---" + "|---" * len(PLANTED) + "|")
    for cells in noticed:
        print("| " + " | ".join(cells) + " |")
    training.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
