"""Pages that a script writes from the code, as a whole or between marks, and checks for being up to date."""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

DRAWING = re.compile(r"(<!-- drawing: (\w+) -->\n).*?(<!-- end of drawing -->)", re.DOTALL)
"""A drawing in a page: its mark, its name and the mark of its end."""


def as_text(drawing: str) -> str:
    """A drawing as Markdown's preformatted text."""
    return f"```text\n{drawing}\n```"


def redrawn(page: str, drawings: Mapping[str, Callable[[], str]]) -> str:
    """The page with every drawing made anew. drawings: what each mark in it stands for."""
    return DRAWING.sub(lambda mark: f"{mark[1]}{drawings[mark[2]]()}\n{mark[3]}", page)


def write_or_check(page: Path, make: Callable[[str], str], *, script: str, description: str | None) -> int:
    """Read the command line, and write the page or, with --check, say whether it is up to date; the exit status.

    page: the one that is written unless --page names another. make: the page as it should be, from what it is now.
    script: the file name of the program, for the message. description: for its help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where it is out of date")
    parser.add_argument("--page", type=Path, default=page, help=f"{page.parent.name}/{page.name} if not another")
    args = parser.parse_args()
    present = args.page.read_text() if args.page.exists() else ""
    text = make(present)
    if args.check:
        print("up to date" if present == text else f"{args.page.name} is out of date: run python scripts/{script}")
        return int(present != text)
    args.page.write_text(text)
    return 0
