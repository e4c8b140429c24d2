"""The formulas of docs/memory.md against the counter."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from mindspeed_cp.benchmark.cases import Algorithm
from mindspeed_cp.benchmark.memory import MemoryCase, count, join_fake_group, ours
from mindspeed_cp.topology import CPTopology

SCALARS = 64
"""Bytes of single numbers, which no formula has."""

Formula = Callable[[int, int, int], int]
"""Bytes from those of q, of k and v, and how many times as large a sum is."""


@pytest.fixture
def fake_group():
    assert not dist.is_initialized()
    yield
    dist.destroy_process_group()


def inputs(q: int, kv: int, wide: int) -> int:
    return 3 * q + kv


def always(q: int, kv: int, wide: int) -> int:
    return inputs(q, kv, wide) + wide * q + q + kv


def ring(q: int, kv: int, wide: int) -> int:
    return always(q, kv, wide) + 2 * kv + 2 * kv + wide * kv


def two_inner_rings(q: int, kv: int, wide: int) -> int:
    return ring(q, kv, wide) + kv + wide * kv


def many_inner_rings(q: int, kv: int, wide: int) -> int:
    return two_inner_rings(q, kv, wide) + kv + 2 * kv


def ulysses(q: int, kv: int, wide: int) -> int:
    return 2 * inputs(q, kv, wide) + q + kv


def hybrid(q: int, kv: int, wide: int) -> int:
    return ring(q, kv, wide) + inputs(q, kv, wide)


BF16, FP32 = torch.bfloat16, torch.float32
ROWS: list[tuple[CPTopology, torch.dtype, Formula]] = [
    (CPTopology(inner=4), BF16, ring),
    (CPTopology(inner=8), FP32, ring),
    (CPTopology(outer=2, inner=4), BF16, two_inner_rings),
    (CPTopology(outer=2, inner=4), FP32, two_inner_rings),
    (CPTopology(outer=4, inner=4), BF16, many_inner_rings),
    (CPTopology(outer=5, inner=4), FP32, many_inner_rings),
    (CPTopology(ulysses=4), BF16, ulysses),
    (CPTopology(ulysses=4), FP32, ulysses),
    (CPTopology(inner=4, ulysses=2), BF16, hybrid),
    (CPTopology(inner=5, ulysses=2), FP32, hybrid),
]


def peak(topology: CPTopology, dtype: torch.dtype, **options: object) -> tuple[int, MemoryCase]:
    case = MemoryCase(topology.size, 512 * topology.size, dtype=dtype)
    config = replace(Algorithm(name="", topology=topology).config, attention_mask_type="general", **options)
    join_fake_group(0, topology.size)
    return count(ours(config, 0), case.inputs()).peak, case


@pytest.mark.parametrize(("topology", "dtype", "formula"), ROWS, ids=lambda value: getattr(value, "__name__", None))
def test_the_peak_is_that_of_the_formula(fake_group, topology, dtype, formula):
    overlap = topology.ring_size > 1
    found, case = peak(topology, dtype, use_cp_send_recv_overlap=overlap)
    expected = formula(case.tensor, 2 * case.tensor, 4 // dtype.itemsize) + case.lse
    assert 0 <= found - expected < SCALARS
    if overlap:
        assert 0 <= peak(topology, dtype)[0] - (expected - 2 * case.tensor) < SCALARS


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_an_all_gather_holds_what_its_queries_see(fake_group, num_ranks):
    found, case = peak(CPTopology(inner=num_ranks), BF16, context_parallel_algo="kvallgather_cp_algo")
    kv = 2 * case.tensor
    assert 0 <= found - (always(case.tensor, kv, 2) + (num_ranks - 1) * kv + kv + 2 * kv + case.lse) < SCALARS


def test_a_ring_copies_no_message_of_its_backward_pass(fake_group):
    """Its own block and all gradients leave from where they are; dq, dk and dv are copied when they are rounded."""
    case = MemoryCase()
    join_fake_group(0, case.num_ranks)
    found = count(ours(Algorithm(name="", topology=CPTopology(inner=4)).config, 0), case.inputs())
    assert found.copied_backward == 3 * case.tensor
