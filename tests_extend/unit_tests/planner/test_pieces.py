"""The number of pieces of the heads: one where the slow link does not bind, more where sums wait for it."""

import dataclasses

import pytest

from mindspeed_cp.planner import (
    AttentionPass,
    AttentionShape,
    Network,
    best_pieces,
    busiest_link_seconds,
    predicted_bytes,
    predicted_seconds,
)
from mindspeed_cp.program import Phase
from mindspeed_cp.topology import CPTopology

DOUBLE = CPTopology(outer=2, inner=2)
SHAPE = AttentionShape(num_tokens=4096, num_heads=8, num_kv_heads=4, head_size=16)


def network(slow_mbit: float) -> Network:
    return Network(num_ranks=4, ranks_per_node=2, fast_mbit=1e6, slow_mbit=slow_mbit)


def backward(pieces: int) -> AttentionPass:
    return AttentionPass(
        topology=DOUBLE, shape=SHAPE, phase=Phase.BACKWARD, flops_per_s=1e9, overlap=True, pieces=pieces
    )


def seconds(slow_mbit: float, pieces: int) -> float:
    return predicted_seconds(network(slow_mbit), backward(pieces).events)


def test_pieces_send_the_same_bytes_and_compute_as_long():
    by_pieces = [
        [sum(predicted_bytes(network(1.0), backward(pieces).events(rank), rank)) for rank in range(4)]
        for pieces in (1, 2, 4)
    ]
    assert by_pieces[0] == by_pieces[1] == by_pieces[2]
    assert backward(1).num_bytes() == sum(by_pieces[0])
    assert seconds(1e9, 1) == pytest.approx(seconds(1e9, 4), rel=1e-3)


def test_where_the_link_does_not_bind_there_is_one_piece():
    assert best_pieces(network(1e5), DOUBLE, SHAPE, flops_per_s=1e9) == 1


def test_where_a_sum_takes_as_long_as_an_inner_ring_pieces_hide_all_but_the_last():
    # Of 1 s or so of a foreign inner ring's kernels, a sum of 256 KiB takes about as long over 2 Mbit/s.
    one, four = seconds(2.0, 1), seconds(2.0, 4)
    assert best_pieces(network(2.0), DOUBLE, SHAPE, flops_per_s=1e9) == 4
    assert four < 0.9 * one


def test_pieces_that_cost_more_than_they_hide_are_not_made():
    assert best_pieces(network(2.0), DOUBLE, SHAPE, flops_per_s=1e9, launch_s=10.0) == 1


def test_what_does_not_travel_has_no_pieces():
    assert best_pieces(network(1.0), CPTopology(ulysses=4), SHAPE, flops_per_s=1e9) == 1


def test_a_ring_whose_links_take_as_long_as_its_kernel_is_nearer_to_them_in_pieces():
    topology, shape = CPTopology(inner=4), AttentionShape(num_tokens=16384, num_heads=8, num_kv_heads=8, head_size=32)

    def over_the_larger(pieces: int) -> float:
        one = AttentionPass(
            topology=topology, shape=shape, phase=Phase.BACKWARD, flops_per_s=20e9, overlap=True, pieces=pieces
        )
        links = network(35.2)
        kernel = predicted_seconds(network(1e9), one.events)
        return predicted_seconds(links, one.events) / max(kernel, busiest_link_seconds(links, one.events))

    assert over_the_larger(1) > 1.15 > 1.07 > over_the_larger(2)
    assert best_pieces(network(35.2), topology, shape, flops_per_s=20e9) > 1
    assert best_pieces(network(1e5), topology, shape, flops_per_s=20e9) == 1


def test_a_hybrid_cuts_the_heads_that_a_rank_is_left_with():
    hybrid = CPTopology(outer=2, inner=2, ulysses=2)
    of_eight = dataclasses.replace(network(2.0), num_ranks=8, ranks_per_node=4)
    assert best_pieces(of_eight, hybrid, SHAPE, flops_per_s=1e9) == 2
