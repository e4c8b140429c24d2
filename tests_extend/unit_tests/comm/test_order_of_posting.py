"""An all-gather between CPUs is a ring of exchanges: gloo's own posts sends first, and loses much of a link's rate."""

import pytest

from unit_tests import communicator_cases as cases


@pytest.mark.parametrize("size", [2, 3])
def test_each_step_of_an_all_gather_between_cpus_posts_the_receive_first(gloo, size):
    assert gloo.run(size, cases.posted, "all_gather") == [["irecv", "isend"]] * size
