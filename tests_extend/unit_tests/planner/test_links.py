"""Links: messages of one channel go one after another, and the busiest link is a lower bound."""

import pytest

from mindspeed_cp.planner import Compute, Network, Post, Wait, busiest_link_seconds, predicted_seconds

NETWORK = Network(num_ranks=2, ranks_per_node=1, fast_mbit=8.0, slow_mbit=8.0)
"""A million bytes a second."""


def two_messages(rank: int, channel: object) -> list[Compute | Post | Wait]:
    """Rank 0 sends half a million bytes twice; rank 1 works for half a second on each, as it comes."""
    sends, sources = ({1: 500_000}, ()) if rank == 0 else ({}, (0,))
    posts = [Post(number, sends, sources, channel) for number in range(2)]
    return [*posts, Wait(0), Compute(0.5 * rank), Wait(1), Compute(0.5 * rank)]


@pytest.mark.parametrize(("channel", "seconds"), [("K/V", 1.5), (None, 2.0)], ids=["one channel", "shared"])
def test_messages_of_one_channel_arrive_one_after_another(channel, seconds):
    assert predicted_seconds(NETWORK, lambda rank: two_messages(rank, channel)) == pytest.approx(seconds)


def test_the_busiest_link_carries_all_that_goes_over_it():
    assert busiest_link_seconds(NETWORK, lambda rank: two_messages(rank, None)) == pytest.approx(1.0)
