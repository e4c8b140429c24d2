"""Write the page about MindSpeed's flags from their records: what each does there, and what becomes of it here.

python scripts/write_mindspeed_flags.py            # writes docs/mindspeed_flags.md anew
python scripts/write_mindspeed_flags.py --check    # only says whether it is as the records have it
"""

import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from generated_page import write_or_check
from mindspeed_cp.patches.mindspeed.record import Record
from mindspeed_cp.patches.mindspeed.table import FLAGS, SECTIONS, VALUES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "mindspeed_flags.md"
HEAD = f"""# MindSpeed's flags

All flags of the training programs of MindSpeed and MindSpeed-LLM, {len(FLAGS)} of them, and {len(VALUES)} values
that they add to Megatron's: what each does there, and what becomes of it here.
`python scripts/write_mindspeed_flags.py` writes this page from the records in `patches/mindspeed`: edit those.

- **the same**: the plugin has it, with the same meaning
- **noted**: it changes no result; it is taken, and listed in one line
- **translated**: Megatron or the plugin spells it otherwise; they are given their own spelling
- **refused**: it would change the results and has no counterpart; the reason and a way out

Where something else is computed than MindSpeed would, or than the flag promises, a line says so at the start.

A flag or value that your release of Megatron has itself is Megatron's, whatever is said here. N is a whole number, X a
number, S text, and `...` means several.
"""
COLUMNS = ("| flag | there | here | |", "|---|---|---|---|")


def write_page() -> str:
    """The whole page: a table a subject, a row for the records that differ in nothing but the flag."""
    lines = [HEAD]
    for title, records in (*SECTIONS.items(), ("Values of Megatron's flags", VALUES)):
        lines += [f"## {title}", "", *COLUMNS, *_rows(records), ""]
    return "\n".join(lines)


def _rows(records: Iterable[Record]) -> list[str]:
    rows = []
    for (there, disposition, here), alike in groupby(records, lambda each: (each.there, each.disposition, each.here)):
        flags = ", ".join(f"`{each.name} {each.values}".strip() + "`" for each in alike)
        rows.append(f"| {flags} | {there} | {disposition.value} | {here} |")
    return rows


def main() -> int:
    """Read the command line and write; the exit status."""
    return write_or_check(PAGE, lambda _: write_page(), script=Path(__file__).name, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
