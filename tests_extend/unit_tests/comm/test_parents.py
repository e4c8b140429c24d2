"""Grids and sizes that follow each other over groups that are made once, between processes."""

import re
from unittest import mock

import torch
import torch.distributed as dist

from mindspeed_cp.attention import build_attention
from mindspeed_cp.comm import ContextParallelGroups, ProcessGroupCommunicator, groups
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.plan import CAUSAL, FULL, Band
from mindspeed_cp.program import Transport
from mindspeed_cp.topology import CPTopology
from unit_tests import plan_cases as cases
from unit_tests.dealt import contiguous, zigzag
from unit_tests.dense import assert_equal_to
from unit_tests.plan_cases import PlanCase

ALL = tuple(range(8))
RAGGED = [[11, 1, 5], [3, 14], [17]]
"""Documents of three samples."""

ROUNDS = [
    # Hybrid with a double ring over all; members of unequal lengths.
    [(ALL, PlanCase(zigzag([3, 1, 2, 0, 1, 2, 1, 1] * 2), CPTopology(outer=2, inner=2, ulysses=2), overlap=True))],
    # Two sizes side by side, one of them in an order of its own.
    [
        ((6, 1, 3), PlanCase(contiguous([9, 0, 8], RAGGED), CPTopology(inner=3), FULL, transport=Transport.DIRECT)),
        ((0, 2, 4, 5, 7), PlanCase(zigzag([2] * 10), CPTopology(ulysses=5), (Band(5, 0),), overlap=True)),
    ],
    # Another grid of the first size, then the same attention with its K/V all at once.
    [(ALL, PlanCase(zigzag([2] * 16), CPTopology(outer=4, inner=2), (Band(4, 0),), overlap=True))],
    [(ALL, PlanCase(zigzag([2] * 16), CPTopology(outer=4, inner=2), CAUSAL, transport=Transport.ALL_GATHER))],
]


def test_grids_and_sizes_change_from_batch_to_batch_and_no_process_group_is_made(gloo):
    ranks = gloo.run(8, cases.attend_on_the_same_parents, ROUNDS)
    assert [each.made for each in ranks] == [0] * 8
    for number, attentions in enumerate(ROUNDS):
        for members, case in attentions:
            shards = [ranks[member].found[number] for member in members]
            assert_equal_to(cases.dense(case), cases.restored(case, shards))


def gathered_in_a_part_of_a_part(group: dist.ProcessGroup) -> list[int] | None:
    """Of ranks 5, 3 and 1, in this order, the first and the last."""
    rank = dist.get_rank(group)
    if rank not in (5, 1):
        return None
    part = ProcessGroupCommunicator(group).subset([5, 3, 1]).subset([0, 2])
    return [part.rank, *part.all_gather(torch.tensor([rank])).flatten().tolist()]


def test_a_subset_of_a_subset_is_told_by_the_numbers_of_the_one_it_is_of(gloo):
    ranks = gloo.run(8, gathered_in_a_part_of_a_part)
    assert (ranks[5], ranks[1], ranks[3]) == ([0, 5, 1], [1, 5, 1], None)


def opened(group: dist.ProcessGroup) -> tuple[int, int]:
    """Groups over which a sum is taken while they are built as on an accelerator, and those that there are."""
    summed = []
    with (
        mock.patch.object(groups, "accelerator", lambda: "cpu"),
        mock.patch.object(dist, "all_reduce", lambda x, group: summed.append(group)),
    ):
        built = ContextParallelGroups.build(CPTopology(outer=2, inner=4), group, overlap=True)
    there = {each.group for each in built.parents}
    dist.barrier(group)
    built.destroy()
    return len(there & set(summed)), len(summed)


def test_each_group_is_opened_by_all_of_its_ranks_once(gloo):
    assert gloo.run(8, opened) == [(3, 3)] * 8


def error_where_one_rank_names_a_transport(group: dist.ProcessGroup) -> str:
    config = ContextParallelConfig(context_parallel_size=2, context_parallel_algo="megatron_cp_algo")
    named = Transport.DIRECT if dist.get_rank(group) else None
    try:
        build_attention(config, group, transport=named)(*torch.ones(3, 1, 1, 4, 8))
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_transport_is_named_by_all_ranks_or_by_none(gloo):
    for message in gloo.run(2, error_where_one_rank_names_a_transport):
        assert re.search(
            r"rank 0: [^;]*; [^;]* outer ring 1; call 1; rank 1: .* outer ring 1, K/V by direct; ", message
        )
