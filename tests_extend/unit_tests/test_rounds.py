"""Rounds of an all-to-all: one message to and from each rank, and all ranks leave their node in the same ones."""

import pytest

from mindspeed_cp.rounds import rounds, rounds_under_way


@pytest.mark.parametrize("size", [1, 2, 3, 6, 12, 16])
def test_in_each_round_every_rank_hears_from_the_one_that_sends_to_it(size):
    by_rank = [rounds(rank, size) for rank in range(size)]
    for number in range(size - 1):
        senders = {by_rank[rank][number][0]: rank for rank in range(size)}
        assert senders == {rank: by_rank[rank][number][1] for rank in range(size)}
    assert all(sorted(to for to, _ in each) == sorted({*range(size)} - {rank}) for rank, each in enumerate(by_rank))


@pytest.mark.parametrize(("size", "per_node"), [(8, 4), (16, 4), (12, 4), (9, 3)])
def test_all_ranks_leave_their_node_in_the_same_rounds(size, per_node):
    crossing = {tuple(to // per_node != rank // per_node for to, _ in rounds(rank, size)) for rank in range(size)}
    assert crossing == {(False,) * (per_node - 1) + (True,) * (size - per_node)}


@pytest.mark.parametrize(("size", "most"), [(2, 1), (4, 3), (5, 2), (16, 2)])
def test_of_few_ranks_all_rounds_are_under_way_at_once_and_of_many_two(size, most):
    assert min(rounds_under_way(size), len(rounds(0, size))) == most
