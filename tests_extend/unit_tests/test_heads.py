"""Which heads each rank of a Ulysses group is sent, and gives to kernels."""

import itertools

import pytest

from mindspeed_cp.heads import HeadLayout


def layouts(most=12):
    for num_heads, degree in itertools.product(range(1, most + 1), repeat=2):
        for num_kv_heads in range(1, num_heads + 1):
            if num_heads % num_kv_heads == 0 and degree <= num_heads:
                yield HeadLayout(num_heads, num_kv_heads, degree)


def test_each_member_is_sent_what_its_query_heads_read_and_no_more():
    for layout in layouts():
        group = layout.num_heads // layout.num_kv_heads
        queries, keys = layout.queries.parts, layout.keys.parts
        assert [head for part in queries for head in range(part.start, part.stop)] == list(range(layout.num_heads))
        sizes = {part.stop - part.start for part in queries}
        assert max(sizes) - min(sizes) <= 1
        for mine, theirs in zip(queries, keys, strict=True):
            read = {head // group for head in range(mine.start, mine.stop)}
            assert set(range(theirs.start, theirs.stop)) == read


def test_kernels_read_for_each_query_head_its_own_kv_head():
    for layout in layouts():
        group = layout.num_heads // layout.num_kv_heads
        for mine, theirs, given in zip(layout.queries.parts, *layout.keys, strict=True):
            count = mine.stop - mine.start
            assert count % len(given) == 0
            found = [theirs.start + given[head // (count // len(given))] for head in range(count)]
            assert found == [head // group for head in range(mine.start, mine.stop)]


def test_heads_that_the_degree_divides_are_given_once():
    assert HeadLayout(16, 8, 4).keys.is_even
    assert not HeadLayout(16, 2, 4).keys.is_even
    assert not HeadLayout(6, 3, 4).queries.is_even


def test_fewer_query_heads_than_ranks_are_refused():
    with pytest.raises(ValueError, match=r"q has 3 heads, and the Ulysses degree is 4: .* a degree of 3 or less"):
        HeadLayout(3, 3, 4)
