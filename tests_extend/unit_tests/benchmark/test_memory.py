"""What a rank holds and copies, counted; and the counter itself."""

import pytest
import torch
import torch.distributed as dist

from mindspeed_cp.benchmark.cases import Algorithm
from mindspeed_cp.benchmark.memory import Counted, MemoryCase, PeakMemory, count, join_fake_group, ours
from mindspeed_cp.topology import CPTopology

CASE = MemoryCase()
TENSOR, LSE = CASE.tensor, CASE.lse
ULYSSES, RING = CPTopology(ulysses=4), CPTopology(inner=4)
DOUBLE, HYBRID = CPTopology(outer=2, inner=2), CPTopology(inner=2, ulysses=2)


@pytest.fixture
def fake_group():
    assert not dist.is_initialized()
    yield
    dist.destroy_process_group()


def counted(topology: CPTopology, rank: int, *, overlap: bool = False) -> Counted:
    join_fake_group(rank, CASE.num_ranks)
    return count(ours(Algorithm(name="", topology=topology, overlap=overlap).config, rank), CASE.inputs())


def test_a_pass_of_ulysses_copies_q_k_v_once_and_out_once_and_so_do_gradients(fake_group):
    found = counted(ULYSSES, 0)
    assert (found.copied_forward, found.copied_backward) == (4 * TENSOR, 4 * TENSOR)


@pytest.mark.parametrize(
    ("topology", "tensors"), [(ULYSSES, 4), (RING, 0), (DOUBLE, 0), (HYBRID, 4)], ids=lambda value: str(value)
)
def test_q_k_v_out_and_lse_are_saved_once(fake_group, topology, tensors):
    """A ring saves the tensors that it was given and its output; Ulysses those that it has exchanged."""
    assert counted(topology, 0).saved == tensors * TENSOR + LSE


@pytest.mark.parametrize(
    ("topology", "limit"),
    [(ULYSSES, 27.4e6), (RING, 43.1e6), (DOUBLE, 46.3e6), (HYBRID, 45.2e6)],
    ids=lambda value: str(value),
)
def test_peak_memory_of_each_algorithm(fake_group, topology, limit):
    assert max(counted(topology, rank, overlap=topology.ring_size > 1).peak for rank in range(4)) <= limit


def test_a_storage_counts_once_and_as_long_as_it_lives():
    given = torch.zeros(4)
    with PeakMemory() as counter:
        counter.hold(given)
        first = given + 1.0
        view = first[:2]
        del first
        assert counter.now == 32
        del view
        second = given.clone()
    assert (counter.now, counter.peak, counter.copied) == (32, 32, 16)
    assert second.shape == given.shape
