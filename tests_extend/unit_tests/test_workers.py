"""Tests that share what is dear to make run in one worker."""

import pytest


@pytest.fixture
def endings() -> None:
    """A fixture of a name that tests_extend/conftest.py gives a group to."""


def test_tests_that_share_a_fixture_are_of_one_group_for_the_workers(request, endings):
    if not request.config.getoption("loadgroup", False):
        pytest.skip("not among workers that take groups: scripts/test.sh")
    assert request.node.nodeid.endswith("@imports")
