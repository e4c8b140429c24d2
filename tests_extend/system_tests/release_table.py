"""Print what scripts/test_megatron_matrix.sh has found, release by release and algorithm by algorithm.

    python release_table.py .matrix/0.16.1 .matrix/0.19.2

Reads the JUnit reports in these folders. A test's cell is what it recorded as `result`, in the row of its `check` and
the column of its `algorithm`.
"""

import argparse
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ALGORITHMS = ("ulysses", "ring", "double ring", "hybrid")
FAILED = "FAILED"


def read_folder(folder: Path) -> tuple[list[str], dict[str, dict[str, str]]]:
    """A release's sentences on its reports, with the tests that failed, and its cells by check and algorithm."""
    sentences: list[str] = []
    cells: dict[str, dict[str, str]] = {}
    for report in sorted(folder.glob("*.xml")):
        cases = list(ElementTree.parse(report).iter("testcase"))
        failed = [case for case in cases if _has(case, "failure", "error")]
        skipped = sum(_has(case, "skipped") for case in cases)
        passed = len(cases) - len(failed) - skipped
        sentences.append(f"{report.stem}: {passed} passed, {skipped} skipped, {len(failed)} failed")
        sentences += [f"  {FAILED} {case.get('classname')}::{case.get('name')}" for case in failed]
        for case in cases:
            properties = {each.get("name"): each.get("value", "") for each in case.iter("property")}
            if "check" in properties and "algorithm" in properties:
                result = FAILED if case in failed else properties.get("result", "")
                cells.setdefault(properties["check"], {})[properties["algorithm"]] = result
    return sentences, cells


def _has(case: ElementTree.Element, *outcomes: str) -> bool:
    return any(case.find(outcome) is not None for outcome in outcomes)


def table(folders: list[Path]) -> str:
    """All releases, each with its reports and then a row for each check."""
    lines = [f"{'release':8} {'check':34}" + "".join(f" {name:>14}" for name in ALGORITHMS)]
    for folder in folders:
        sentences, cells = read_folder(folder)
        lines += [f"{folder.name:8} {sentence}" for sentence in sentences or [f"{FAILED}: no report"]]
        for check, results in cells.items():
            lines.append(f"{folder.name:8} {check:34}" + "".join(f" {results.get(a, '-'):>14}" for a in ALGORITHMS))
    return "\n".join(lines)


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    print(table(parser.parse_args().folders))


if __name__ == "__main__":
    main()
