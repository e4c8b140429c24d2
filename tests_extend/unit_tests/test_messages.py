"""What messages offer."""

from mindspeed_cp.messages import divisors, or_list


def test_or_list_ends_a_sentence():
    assert [or_list(values) for values in ([2], [2, 4], [2, 4, 8])] == ["2", "2 or 4", "2, 4 or 8"]


def test_divisors_are_all_and_ascending():
    assert [divisors(number) for number in (1, 7, 12)] == [[1], [1, 7], [1, 2, 3, 4, 6, 12]]
