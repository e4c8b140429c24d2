"""Draw who holds which chunk and what a ring does at each step, from the plan and the program themselves.

python scripts/draw_schedule.py            # draws them anew into docs/architecture.md
python scripts/draw_schedule.py --check    # only says whether they are as the code has them
"""

import sys
from pathlib import Path

from generated_page import as_text, redrawn, write_or_check
from mindspeed_cp.planner.drawings import draw_chunks, draw_ring

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"

DRAWINGS = {
    "chunks": lambda: as_text(draw_chunks(4)),
    "ring": lambda: as_text(draw_ring(outer=1, inner=4)),
    "double_ring": lambda: as_text(draw_ring(outer=2, inner=4)),
}
"""What each mark in the page stands for."""


def main() -> int:
    """Read the command line and write; the exit status."""
    return write_or_check(PAGE, lambda page: redrawn(page, DRAWINGS), script=Path(__file__).name, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
