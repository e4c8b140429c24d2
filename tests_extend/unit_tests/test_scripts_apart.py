"""scripts/ and tests_extend/ import nothing of each other: what both need is in the package, and tests run programs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("scripts", "tests_extend")


def names_of(root: Path, folder: str) -> set[str]:
    """By what a file of a folder can be imported, the folder itself or its subfolders on the path."""
    files = [path.relative_to(root) for path in (root / folder).rglob("*.py")]
    return {folder, *(part for file in files for part in file.with_suffix("").parts)} - {"__init__", "conftest"}


def imports_of(path: Path) -> Iterator[str]:
    """What a file imports, inside functions too, by the first part of its name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def crossings(root: Path) -> list[str]:
    """Every import from one folder into the other."""
    found = []
    for folder, other in (FOLDERS, FOLDERS[::-1]):
        foreign = names_of(root, other) - names_of(root, folder)
        for path in sorted((root / folder).rglob("*.py")):
            found += [f"{path.relative_to(root)}: {name}" for name in imports_of(path) if name in foreign]
    return found


def test_no_file_imports_from_the_other_folder():
    assert crossings(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        (
            "tests_extend/test_a.py",
            "from scripts.draw import f",
            "tests_extend/test_a.py: scripts",
        ),
        ("tests_extend/test_a.py", "def f():\n    import draw", "tests_extend/test_a.py: draw"),
        ("scripts/bench.py", "from unit_tests.cases import f", "scripts/bench.py: unit_tests"),
        ("scripts/bench.py", "import cases", "scripts/bench.py: cases"),
    ],
)
def test_planted_import_is_found(tmp_path, file, source, found):
    for path, text in (("scripts/draw.py", ""), ("tests_extend/unit_tests/cases.py", ""), (file, source)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert crossings(tmp_path) == [found]
