"""The examples run on 2 and on 4 ranks, and agree with one rank."""

import importlib
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mindspeed_cp.testing.rank_pool import RankPool
from preload import PRELOAD

FOLDER = Path(__file__).resolve().parents[3] / "scripts" / "examples"
NAMES = [path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem != "launch"]


def join_two(rank: int, folder: str) -> None:
    """A world of its own: the examples use all ranks that there are."""
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), 2, rank)


def join_four(rank: int, folder: str) -> None:
    """The same of four."""
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), 4, rank)


def run_examples() -> dict[str, dict[str, float]]:
    """In a rank's process: the largest differences of each example."""
    sys.path.insert(0, str(FOLDER))
    return {name: importlib.import_module(name).example(torch.device("cpu")) for name in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "join"), [(2, join_two), (4, join_four)], ids=["2 ranks", "4 ranks"])
def test_examples_agree_with_one_rank(ranks, join):
    pool = RankPool(ranks, PRELOAD, join)
    try:
        for differences in pool.call(range(ranks), 120.0, run_examples):
            assert set(differences) == {"guidance", "own_dit", "ring", "split_matrix", "ulysses"}
            for name, each in differences.items():
                assert max(each.values()) < 1e-5, (name, each)
    finally:
        pool.close()
