"""An all-gather between two CPUs is an exchange: gloo's own posts sends first, and loses much of a link's rate."""

from unit_tests import communicator_cases as cases


def test_all_gather_between_two_cpus_posts_the_receive_first(gloo):
    assert gloo.run(2, cases.posted, "all_gather") == [["irecv", "isend"]] * 2
