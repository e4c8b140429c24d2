"""The process groups of each axis: which ranks they hold, which are shared, and what is left of them."""

from datetime import timedelta

import pytest
import torch

from mindspeed_cp.topology import CPTopology
from unit_tests import ring_cases as cases
from unit_tests.dense import assert_equal_to
from unit_tests.ring_cases import Built, grid_id, grid_name
from unit_tests.ulysses_cases import restored

ULYSSES, RING, DOUBLE = CPTopology(ulysses=4), CPTopology(inner=4), CPTopology(outer=2, inner=2)
HYBRID, HYBRID_DOUBLE = CPTopology(inner=2, ulysses=2), CPTopology(outer=2, inner=2, ulysses=2)


@pytest.mark.parametrize(
    ("topology", "overlap", "distinct", "made"),
    [
        (ULYSSES, False, 0, 0),
        (ULYSSES, True, 0, 0),
        (RING, False, 1, 0),
        (RING, True, 2, 1),
        (DOUBLE, False, 1, 0),
        (DOUBLE, True, 3, 2),
        (HYBRID, False, 1, 0),
        (HYBRID, True, 2, 1),
        (HYBRID_DOUBLE, False, 1, 0),
        (HYBRID_DOUBLE, True, 3, 2),
    ],
    ids=grid_id,
)
def test_groups_are_made_where_messages_must_not_queue_and_are_gone_once_destroyed(
    gloo, topology, overlap, distinct, made
):
    for rounds in gloo.run_on_all(topology.size, cases.build_and_destroy, topology, overlap):
        assert len(rounds) == 2
        for built in rounds:
            assert (built.distinct, built.made, built.left) == (distinct, made, 0)


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [1, 3, 5, 7], [0, 1, 6, 7]])
@pytest.mark.parametrize("overlap", [False, True])
def test_groups_of_a_hybrid_are_neighbours_and_a_ring_across_them_in_the_groups_own_order(gloo, ranks, overlap):
    a, b, c, d = ranks
    distinct, made = (2, 1) if overlap else (1, 0)

    def built(ulysses: list[int], ring: list[int]) -> list[Built]:
        return [Built(ulysses, ring, distinct, made, 0)] * 2

    assert gloo.run_on_all(ranks, cases.build_and_destroy, HYBRID, overlap) == [
        built([a, b], [a, c]),
        built([a, b], [b, d]),
        built([c, d], [a, c]),
        built([c, d], [b, d]),
    ]


def test_groups_of_a_hybrid_with_a_double_ring(gloo):
    for rank, rounds in enumerate(gloo.run_on_all(8, cases.build_and_destroy, HYBRID_DOUBLE, True)):
        first, parity = rank // 2 * 2, rank % 2
        assert rounds == [Built([first, first + 1], list(range(parity, 8, 2)), 3, 2, 0)] * 2


def test_groups_of_one_axis_are_the_context_parallel_group_itself(gloo):
    ranks = [1, 3, 5, 7]
    assert gloo.run(ranks, cases.build_and_destroy, ULYSSES, False) == [[Built(ranks, None, 0, 0, 0)] * 2] * 4
    assert gloo.run(ranks, cases.build_and_destroy, RING, False) == [[Built(None, ranks, 1, 0, 0)] * 2] * 4


def test_made_groups_have_the_timeout_that_was_asked_for(gloo):
    timeout = timedelta(seconds=77)
    assert gloo.run_on_all(4, cases.made_timeouts, HYBRID, timeout) == [[timeout]] * 4


@pytest.mark.parametrize("topology", [RING, DOUBLE, HYBRID], ids=grid_name)
def test_attention_is_exact_in_a_group_of_other_ranks_than_the_first(gloo, topology):
    case = cases.case_on(topology, overlap=True, heads=2)
    assert_equal_to(cases.dense(case), restored(case, gloo.run_on_all([1, 3, 5, 7], cases.attend_in_own_groups, case)))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("topology", [RING, DOUBLE, HYBRID], ids=grid_name)
def test_two_context_parallel_groups_are_built_and_used_at_the_same_time(gloo, topology, overlap):
    case, members = cases.case_on(topology, overlap=overlap), ((0, 1, 2, 3), (4, 5, 6, 7))
    for ranks in members:
        gloo.make_group(ranks)
    shards = gloo.run(8, cases.attend_in_one_of, members, case)
    exact = cases.dense(case)
    assert_equal_to(exact, restored(case, shards[:4]))
    assert all(
        torch.equal(x, y) for a, b in zip(shards[:4], shards[4:], strict=True) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("topology", [CPTopology(inner=2), CPTopology(inner=4, ulysses=2)], ids=grid_name)
def test_groups_refuse_a_group_of_another_size(gloo, topology):
    message = (
        f"the context-parallel group has 4 ranks and the configured topology {topology.size}: configure mindspeed_cp "
        "and initialize_model_parallel with the same context_parallel_size."
    )
    assert gloo.run(4, cases.build_error, topology) == [message] * 4
