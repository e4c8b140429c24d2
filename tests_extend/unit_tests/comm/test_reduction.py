"""Sums over virtual ranks: values, bits, and the numbers that each rank sends."""

import pytest
import torch

from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.comm.reduction import all_reduce, all_reduce_numbers, reduce_scatter
from mindspeed_cp.testing.rank_pool import LIMIT_S


def on_ranks(size, function):
    world = VirtualWorld(size, LIMIT_S)
    return world.run(lambda rank: function(VirtualCommunicator(world, range(size), rank, "here")))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_reduce_scatter_gives_each_rank_its_part_of_the_sum(size):
    parts = torch.arange(size * size * 4.0).view(size, size, 4)
    for rank, part in enumerate(on_ranks(size, lambda each: reduce_scatter(each, parts[each.rank]))):
        assert torch.equal(part, parts.sum(dim=0)[rank])


@pytest.mark.parametrize(("size", "count"), [(1, 3), (2, 3), (3, 7), (4, 1)])
def test_all_reduce_sends_what_it_says_and_leaves_its_argument(size, count):
    def reduce(communicator):
        x = torch.full((count,), float(communicator.rank + 1))
        return all_reduce(communicator, x), x, communicator

    for total, x, communicator in on_ranks(size, reduce):
        assert total.tolist() == [size * (size + 1) / 2] * count
        assert x.tolist() == [communicator.rank + 1] * count
        sent = sum(communicator.traffic.bytes_sent.values())
        assert sent == all_reduce_numbers(count, size) * x.element_size()


def test_sums_of_bf16_are_rounded_once():
    # 256 + 1 is 256 in bf16, however often: only a sum in fp32 comes to 264.
    totals = on_ranks(9, lambda each: all_reduce(each, torch.tensor([256.0 if each.rank == 0 else 1.0]).bfloat16()))
    assert [total.item() for total in totals] == [264.0] * 9
