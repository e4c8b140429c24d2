"""Sequences of a batch of different lengths: each takes the pages of its own length, and is computed with as before."""

import pytest

from mindspeed_cp.inference import Sampling, Session, ShardedKVCache, Span
from unit_tests.inference import session_cases as cases
from unit_tests.inference.test_cache import appended, seen
from unit_tests.inference.test_session import on_virtual_ranks, written
from unit_tests.inference.toy_model import ToyModel, dense_choices

PAGE = 4
A_TOKEN = (2 * 3 + 2 * 2) * 8
"""Bytes of a token of `appended`, keys and values."""


def test_short_sequences_take_no_room_for_the_longest():
    lengths = (1000, 10, 30, 0)
    cache = ShardedKVCache(4, [None], page=PAGE)
    appended(cache, 0, [Span(0, length) for length in lengths])
    pages = sum(-(-length // PAGE) for length in lengths)
    assert cache.nbytes == pages * PAGE * A_TOKEN
    # They grow by themselves too: a page more for one of them is one for that one.
    appended(cache, 0, [Span(1000, 1000), Span(10, 10), Span(30, 33), Span(0, 0)])
    assert cache.nbytes == (pages + 1) * PAGE * A_TOKEN
    assert seen(cache, 0, [Span(1000, 1000), Span(10, 10), Span(30, 33), Span(0, 0)]) == [
        list(range(length)) for length in (1000, 10, 33, 0)
    ]


def test_sequences_of_about_one_length_lie_side_by_side():
    """One call of a kernel for all of them, though their last pages are not equally full."""
    cache = ShardedKVCache(3, [None], page=PAGE)
    spans = [Span(0, 14), Span(0, 16), Span(0, 13)]
    appended(cache, 0, spans)
    (slab,) = cache.slabs(0, cache.keys(0, spans))
    assert (slab.samples, slab.slots) == (slice(0, 3), Span(0, 16))
    apart = ShardedKVCache(3, [None], page=PAGE)
    appended(apart, 0, [Span(0, 14), Span(0, 3), Span(0, 13)])
    found = apart.slabs(0, apart.keys(0, [Span(0, 14), Span(0, 3), Span(0, 13)]))
    assert [(each.samples, each.slots) for each in found] == [
        (slice(0, 1), Span(0, 14)),
        (slice(1, 2), Span(0, 3)),
        (slice(2, 3), Span(0, 13)),
    ]


@pytest.mark.parametrize(("size", "decode"), [(1, "tree"), (2, "tree"), (2, "ring_q")])
def test_sessions_of_very_different_lengths_write_what_dense_attention_does(size, decode):
    """Two turns, the second one the other way round; a layer with a window, one without."""
    lengths, then = (50, 2, 20, 20), (1, 40, 2, 2)
    given, second = cases.prompts(*lengths), cases.prompts(*then, seed=1)

    def turns(ranks):
        session = Session(ToyModel(), 4, ranks, decode=decode, chunk=32, **cases.SMALL)
        first = written(session, given, 3)
        return first, written(session, second, 3)

    found = on_virtual_ranks(size, turns)
    assert found == [found[0]] * size
    first, more = found[0]
    for sample, prompt in enumerate(given):
        assert first[sample] == [choice.token for choice in dense_choices(prompt, 3, Sampling())]
        text = [*prompt, *first[sample], *second[sample]]
        assert more[sample] == [choice.token for choice in dense_choices(text, 3, Sampling())]
