"""Fixtures of all unit tests."""

from collections.abc import Iterator

import pytest
import torch

from unit_tests.gloo_pool import GlooPool


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
