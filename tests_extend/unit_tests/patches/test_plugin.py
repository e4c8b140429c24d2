"""The groups that the layers of one rank share."""

from unit_tests import plugin_cases


def test_layers_over_a_group_that_is_not_megatrons_share_what_the_first_of_them_built(gloo):
    for rank, layers in enumerate(gloo.run_on_all(2, plugin_cases.build_layers)):
        assert (layers.first, layers.further, layers.left) == (1, 0, 0), rank
        assert layers.reason_to_stay is not None


def test_the_group_of_the_pipeline_stages_goes_with_megatrons(gloo):
    assert gloo.run_on_all(2, plugin_cases.join_stages) == [(1, 0)] * 2
