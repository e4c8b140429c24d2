"""In which order messages are started, and what together: gloo loses much of a rate unless receives come first."""

import pytest

from unit_tests import communicator_cases as cases

STEP = ["recv", "send"]
"""Of one message each way."""


@pytest.mark.parametrize(
    ("operation", "size", "order"),
    [
        ("all_gather", 3, STEP * 2),
        ("all_to_all", 3, ["recv"] * 2 + ["send"] * 2),
        ("all_to_all", 6, STEP * 5),
    ],
    ids=["all_gather", "all_to_all of few ranks, at once", "all_to_all of many, in rounds"],
)
def test_collectives_between_cpus_start_receives_first_and_on_the_backend_itself(gloo, operation, size, order):
    assert gloo.run(size, cases.posted, operation) == [order] * size


def test_messages_of_an_accelerator_start_in_one_batch_receives_first(gloo):
    assert gloo.run(6, cases.batches) == [[["irecv"] * 5 + ["isend"] * 5]] * 6


def test_a_second_message_to_a_rank_is_in_a_second_batch_at_both_ends_where_a_backend_takes_one(gloo):
    for rank, batches in enumerate(gloo.run(3, cases.batches_of_pairs)):
        others = [peer for peer in range(3) if peer != rank]
        assert batches == [[(way, peer, size) for way in ("irecv", "isend") for peer in others] for size in (1, 2)]
