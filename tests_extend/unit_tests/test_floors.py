"""Floors: a module imports only from floors below its own, or from its own package; vendors are imported on use."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = (
    {"topology", "schedule", "rounds", "plan", "balance", "heads", "messages"},
    {"layouts", "program"},
    {"sharding", "documents", "handles", "derivatives"},
    {"config", "patching", "device", "batch"},
    {"kernels", "comm", "choice", "planner"},
    {"attention", "tensor_parallel", "relayout"},
    {"patches", "testing", "diffusion", "inference"},
    {"megatron_adaptor", "benchmark"},
    {"launch"},
    # The program starts the adaptor, and so stands above it.
    {"__main__"},
)
WITHOUT_TORCH = {*FLOORS[0], *FLOORS[1], "planner"}
VENDORS = {"torch_npu", "triton", "flash_attn", "megatron", "transformer_engine", "apex", "diffusers", "transformers"}


class Import(NamedTuple):
    """A module or name that a file imports, by its full name."""

    file: str
    importer: str
    name: str
    line: int
    inside_function: bool


def floor_of(part: str) -> int | None:
    """The floor of a module or package directly in mindspeed_cp; None where it has none."""
    return next((number for number, parts in enumerate(FLOORS) if part in parts), None)


def source_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Every file of the library, with the name by which it is imported."""
    for folder, package in ((root / "mindspeed_cp", "mindspeed_cp"), (root / "patches", "mindspeed_cp.patches")):
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder)
            # mindspeed_cp/patches is a link to ../patches, which is read by itself.
            if package == "mindspeed_cp" and inner.parts[0] == "patches":
                continue
            parts = [package, *inner.with_suffix("").parts]
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, module: str) -> Iterator[Import]:
    """Every name that a file imports, those inside functions too; `torch.distributed.x` counts as an import of it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, inside_function: bool) -> Iterator[Import]:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names = ["torch.distributed"]
        yield from (Import(path.name, module, name, node.lineno, inside_function) for name in names)
        inside_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types_alone(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside_function)

    yield from visit(ast.parse(path.read_text()), False)


def _for_types_alone(node: ast.AST) -> bool:
    """Whether it is `if TYPE_CHECKING:`, which no program runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def violation(found: Import) -> str | None:
    """What rule an import breaks, in a sentence; None where it keeps them all."""
    where = f"{found.importer}, line {found.line}"
    vendor, *_ = found.name.split(".")
    if vendor in VENDORS and not found.inside_function:
        return f"{where}: imports {vendor} at the top; import it on use."
    part = [*found.importer.split("."), ""][1]
    own_floor = floor_of(part)
    if part and own_floor is None:
        return f"{where}: {part} stands on no floor; give it one in {Path(__file__).name}."
    if part in WITHOUT_TORCH and vendor == "torch":
        return f"{where}: {part} knows integers and slices, not torch."
    if not f"{found.name}.".startswith("mindspeed_cp.") or found.name.startswith("mindspeed_cp.__version__"):
        return None
    imported = [*found.name.split("."), ""][1]
    if not part:
        return f"{where}: the package itself imports nothing of its own."
    if imported == part and found.importer.count(".") + (found.file == "__init__.py") > 1:
        return None
    floor = floor_of(imported)
    if floor is None:
        return f"{where}: {found.name} stands on no floor; give it one in {Path(__file__).name}."
    if floor >= own_floor:
        return f"{where}: {part} on floor {own_floor} imports {imported} from floor {floor}."
    return None


def violations(root: Path) -> list[str]:
    """Every import below `root` that breaks a rule."""
    found = (violation(item) for path, module in source_files(root) for item in imports_of(path, module))
    return [sentence for sentence in found if sentence]


def test_every_file_imports_from_floors_below_only():
    assert violations(ROOT) == []


def test_every_file_of_the_library_is_read():
    modules = {module for _, module in source_files(ROOT)}
    assert {"mindspeed_cp", "mindspeed_cp.__main__", "mindspeed_cp.kernels.choose"} <= modules
    assert {"mindspeed_cp.patches", "mindspeed_cp.patches.attention"} <= modules
    assert len(modules) == len({path for path, _ in source_files(ROOT)})
    for _, module in source_files(ROOT):
        assert module == "mindspeed_cp" or floor_of(module.split(".")[1]) is not None


PLANTED = [
    ("mindspeed_cp/topology.py", "import mindspeed_cp.config", "topology on floor 0 imports config from floor 3."),
    ("mindspeed_cp/config.py", "from mindspeed_cp import patching", "config on floor 3 imports patching from floor 3."),
    ("mindspeed_cp/comm/groups.py", "from ..kernels import choose", "comm on floor 4 imports kernels from floor 4."),
    (
        "mindspeed_cp/kernels/choose.py",
        "def f():\n    from mindspeed_cp.attention.build import build_attention",
        "kernels on floor 4 imports attention from floor 5.",
    ),
    (
        "mindspeed_cp/attention/__init__.py",
        "from mindspeed_cp.patches.plugin import Plugin",
        "attention on floor 5 imports patches from floor 6.",
    ),
    (
        "mindspeed_cp/tensor_parallel/linear.py",
        "from mindspeed_cp.attention import build_attention",
        "tensor_parallel on floor 5 imports attention from floor 5.",
    ),
    (
        "patches/plugin.py",
        "import mindspeed_cp.megatron_adaptor",
        "patches on floor 6 imports megatron_adaptor from floor 7.",
    ),
    (
        "mindspeed_cp/__init__.py",
        "from mindspeed_cp.config import flag",
        "the package itself imports nothing of its own.",
    ),
    ("mindspeed_cp/utils.py", "import sys", "utils stands on no floor; give it one in test_floors.py."),
    (
        "mindspeed_cp/attention/ring.py",
        "from mindspeed_cp.utils import x",
        "mindspeed_cp.utils.x stands on no floor; give it one in test_floors.py.",
    ),
    (
        "mindspeed_cp/plan.py",
        "import torch.distributed as dist",
        "plan knows integers and slices, not torch.",
    ),
    (
        "mindspeed_cp/program.py",
        "def f():\n    from torch import Tensor",
        "program knows integers and slices, not torch.",
    ),
    ("mindspeed_cp/planner/clock.py", "import torch", "planner knows integers and slices, not torch."),
    (
        "patches/attention.py",
        "from megatron.core import parallel_state",
        "imports megatron at the top; import it on use.",
    ),
    (
        "mindspeed_cp/kernels/npu.py",
        "try:\n    import torch_npu\nexcept ImportError:\n    torch_npu = None",
        "imports torch_npu at the top; import it on use.",
    ),
    ("mindspeed_cp/config.py", "class A:\n    import apex.amp", "imports apex at the top; import it on use."),
]


@pytest.mark.parametrize(("file", "source", "sentence"), PLANTED)
def test_planted_violation_is_found(tmp_path, file, source, sentence):
    plant(tmp_path, file, source)
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].partition(": ")[2] == sentence


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("mindspeed_cp/config.py", "from mindspeed_cp.topology import CPTopology"),
        ("mindspeed_cp/kernels/__init__.py", "from mindspeed_cp.kernels.choose import KERNELS"),
        ("mindspeed_cp/kernels/choose.py", "from .protocol import TileCase"),
        ("mindspeed_cp/kernels/npu.py", "def f():\n    import torch_npu"),
        ("mindspeed_cp/comm/groups.py", "import torch.distributed as dist"),
        ("mindspeed_cp/attention/ring.py", "def f():\n    from mindspeed_cp.comm import Traffic"),
        ("mindspeed_cp/__main__.py", "import mindspeed_cp.megatron_adaptor\nfrom mindspeed_cp import __version__"),
    ],
)
def test_import_that_keeps_the_rules_is_accepted(tmp_path, file, source):
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []


def plant(root: Path, file: str, source: str) -> None:
    """Write one source file below `root`."""
    path = root / file
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
