"""Collective operations of a group of gloo ranks: results, counts and refusals."""

import pytest
import torch

from mindspeed_cp.comm import Traffic
from unit_tests import communicator_cases as cases

GROUPS = ([0], [0, 1], [1, 3], [0, 2, 5], list(range(8)))
DTYPES = (torch.float64, torch.bfloat16, torch.int64, torch.bool)


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values that differ, as far as the dtype can tell them apart."""
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    return values % 3 == 0 if dtype == torch.bool else values.to(dtype)


@pytest.mark.parametrize(("ranks", "dtype"), zip(GROUPS, (*DTYPES, torch.float64), strict=True))
def test_all_to_all_gives_row_p_of_every_rank_to_rank_p(gloo, ranks, dtype):
    size = len(ranks)
    sends = numbered((size, size, 3, 2), dtype)
    for rank, received in enumerate(gloo.run(ranks, cases.communicate, "all_to_all", sends)):
        assert (received.rank, received.size) == (rank, size)
        assert received.result.dtype == dtype
        assert torch.equal(received.result, sends[:, rank])
        assert received.calls == {"all_to_all": 2}
        assert received.bytes_sent == {"all_to_all": 2 * (size - 1) * 6 * dtype.itemsize}


@pytest.mark.parametrize(
    ("ranks", "dtype", "shape"),
    [([0, 1], torch.float64, (5,)), ([0, 2, 5], torch.bool, (3, 2)), ([0, 1], torch.bool, (1, 3, 1, 2))],
)
def test_all_gather_stacks_what_each_rank_gives(gloo, ranks, dtype, shape):
    size = len(ranks)
    sends = numbered((size, *shape), dtype)
    for rank, received in enumerate(gloo.run(ranks, cases.communicate, "all_gather", sends)):
        assert (received.rank, received.size) == (rank, size)
        assert received.result.dtype == dtype
        assert torch.equal(received.result, sends)
        assert received.calls == {"all_gather": 2}
        assert received.bytes_sent == {"all_gather": 2 * (size - 1) * sends[0].nbytes}


def test_communicator_without_a_group_spans_all_ranks(gloo):
    assert gloo.run(8, cases.default_group_place) == [(rank, 8) for rank in range(8)]


@pytest.mark.parametrize("operation", ["all_to_all", "all_gather"])
def test_communicator_refuses_memory_that_is_not_contiguous(gloo, operation):
    refusal = ("AssertionError: communication needs contiguous memory; got strides (1, 2)", {})
    assert gloo.run(2, cases.communication_error, operation, torch.zeros(2, 2).t()) == [refusal] * 2


@pytest.mark.parametrize("place", ["start", "wait"])
def test_a_peer_that_is_gone_is_named_wherever_the_backend_finds_it(gloo, place):
    assert gloo.run(2, cases.lost_at, place) == [f"no answer from rank {rank} of the group: closed" for rank in (1, 0)]


def test_all_to_all_refuses_another_number_of_parts_than_ranks(gloo):
    refusal = ("ValueError: an all-to-all among 2 ranks sends 2 parts, not 3.", {})
    assert gloo.run(2, cases.communication_error, "all_to_all", torch.zeros(3, 2)) == [refusal] * 2


def test_traffic_adds_up_by_operation_until_cleared():
    traffic = Traffic()
    for operation, bytes_sent in [("all_to_all", 10), ("all_gather", 5), ("all_to_all", 1)]:
        traffic.record(operation, bytes_sent)
    assert traffic.calls == {"all_to_all": 2, "all_gather": 1}
    assert traffic.bytes_sent == {"all_to_all": 11, "all_gather": 5}
    traffic.clear()
    assert traffic == Traffic()
