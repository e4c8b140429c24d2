"""The generator of tables: every two values meet, in not many more cases than the two longest axes need."""

from itertools import combinations, product

from unit_tests.pairwise import pairwise


def test_every_two_values_meet_in_about_as_few_cases_as_the_two_longest_axes_have_pairs():
    axes = {"a": range(3), "b": "uvwxyz", "c": [True, False], "d": range(5), "e": range(2)}
    cases = pairwise(axes)
    for one, other in combinations(axes, 2):
        assert {(case[one], case[other]) for case in cases} == set(product(axes[one], axes[other]))
    assert len(cases) <= 1.3 * 30
