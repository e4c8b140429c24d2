"""Collectives between CPUs are made of exchanges: gloo's own post sends first, and lose much of a link's rate."""

import pytest

from unit_tests import communicator_cases as cases


@pytest.mark.parametrize(("operation", "size"), [("all_gather", 2), ("all_gather", 3), ("all_to_all", 3)])
def test_each_step_of_a_collective_between_cpus_posts_the_receive_first(gloo, operation, size):
    assert gloo.run(size, cases.posted, operation) == [["irecv", "isend"]] * size
