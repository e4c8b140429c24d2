"""Fixtures of all unit tests."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mindspeed_cp.testing.rank_pool import LIMIT_S
from unit_tests.gloo_pool import GlooPool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    """Gloo ranks, alive for the whole session: `gloo.run(4, function, *args)`."""
    pool = GlooPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """As each rank: threads that wait for a core which a rank has are slower than none."""
    torch.set_num_threads(1)


MEGATRON_FIRST = """
from unit_tests.import_cases import print_bindings

print_bindings(megatron_first=True)
"""
AS_A_SCRIPT = """
import pickle, sys
from beside import VALUE

class Picklable:
    pass

pickle.dumps(Picklable())
print(__name__, sys.argv[1:], sys.argv[0] == __file__, sys.path[0], VALUE)

from unit_tests.import_cases import print_bindings, print_states_and_report

print_states_and_report()
print_bindings(megatron_first=False)
sys.exit(7)
"""


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Two programs with real Megatron, which takes seconds to import: one imports it "first", before the adaptor.

    The other one, "last", is a script run under `python -m mindspeed_cp`, from another folder than its own.
    """
    folder = tmp_path_factory.mktemp("script")
    (folder / "script.py").write_text(AS_A_SCRIPT)
    (folder / "beside.py").write_text("VALUE = 'beside'\n")
    # A checkout's megatron lies on PYTHONPATH.
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests_extend"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = {"first": ["-c", MEGATRON_FIRST], "last": ["-m", "mindspeed_cp", str(folder / "script.py"), "a", "--b"]}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = {
        order: subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, text=True, **pipes)
        for order, arguments in words.items()
    }
    printed = {order: program.communicate(timeout=LIMIT_S) for order, program in running.items()}
    return {
        order: subprocess.CompletedProcess(program.args, program.returncode, *printed[order])
        for order, program in running.items()
    }
