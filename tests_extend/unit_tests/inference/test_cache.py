"""The sharded K/V cache: who keeps what, and that what is kept stays where it is."""

import pytest
import torch

from mindspeed_cp.inference.cache import ShardedKVCache
from mindspeed_cp.inference.interleave import Interleaved, Span, local_length, owner, slot
from mindspeed_cp.plan import CAUSAL, AttentionPlan

GRIDS = [(size, interleave, first) for size in (1, 2, 3, 8) for interleave in (1, 4, 5) for first in (0, size - 1)]


def numbers(spans, rank_positions, heads=2, head_size=3):
    """Keys whose numbers say sample and position: [B, G, T, D], and values one above them."""
    width = max(map(len, rank_positions))
    k = torch.full((len(spans), heads, width, head_size), torch.nan, dtype=torch.float64)
    for sample, positions in enumerate(rank_positions):
        for place, position in enumerate(positions):
            k[sample, :, place] = 10_000 * sample + position
    return k, k[..., :2] + 0.5


def appended(cache, layer, spans, **options):
    """Append this rank's tokens of these positions."""
    layout = cache.layout(spans)
    k, v = numbers(spans, [list(layout.positions(cache.rank, sample)) for sample in range(len(spans))])
    cache.append(layer, k, v, spans, **options)


def seen(cache, layer, spans):
    """The positions of each sample that a view has, read off its numbers by the runs of its layout."""
    layout = cache.keys(layer, spans)
    k, v = cache.view(layer, layout)
    found = [[] for _ in spans]
    for run in layout.runs(cache.rank):
        for sample in range(len(spans)) if run.sample is None else (run.sample,):
            there = k[sample, 0, run.start : run.stop, 0] - 10_000 * sample
            assert torch.equal(there + 10_000 * sample + 0.5, v[sample, 1, run.start : run.stop, 1])
            assert there.tolist() == list(range(run.position, run.position + run.stop - run.start))
            found[sample] += there.int().tolist()
    return found


@pytest.mark.parametrize(
    ("lengths", "size", "interleave", "expected"),
    [
        ([1, 4, 5, 8, 9], 2, 4, [[1, 0], [4, 0], [4, 1], [4, 4], [5, 4]]),  # vllm-ascend's own table.
        ([0, 1, 7, 12, 13], 3, 2, [[0, 0, 0], [1, 0, 0], [3, 2, 2], [4, 4, 4], [5, 4, 4]]),
    ],
)
def test_local_lengths_are_those_of_the_golden_table(lengths, size, interleave, expected):
    assert [[local_length(each, rank, size, interleave) for rank in range(size)] for each in lengths] == expected


@pytest.mark.parametrize(("size", "interleave", "first"), GRIDS)
def test_every_position_has_one_owner_and_the_next_slot_there(size, interleave, first):
    counts = [0] * size
    for position in range(3 * size * interleave + 2):
        for rank in range(size):
            assert local_length(position, rank, size, interleave, first) == counts[rank]
        rank = owner(position, size, interleave, first)
        assert slot(position, size, interleave) == counts[rank]
        counts[rank] += 1


@pytest.mark.parametrize(("size", "interleave"), [(1, 1), (3, 4), (8, 1)])
def test_plan_of_stripes_has_every_pair_of_query_and_earlier_key_once(size, interleave):
    spans = (Span(5, 29), Span(0, 17), Span(30, 30))
    firsts = tuple(sample % size for sample in range(3))
    queries = Interleaved(size, spans, interleave, firsts)
    keys = Interleaved(size, tuple(Span(0, span.stop) for span in spans), interleave, firsts, aligned=True)
    plan = AttentionPlan(queries, keys, CAUSAL)
    pairs = sum(plan.area(one, other) for one in range(size) for other in range(size))
    assert pairs == sum(position + 1 for span in spans for position in range(*span))


@pytest.mark.parametrize("size", [1, 3])
def test_view_has_what_was_appended_in_order_whatever_the_steps(size):
    firsts = (0, 1 % size)
    for rank in range(size):
        cache = ShardedKVCache(2, [None], rank=rank, size=size, interleave=2, firsts=firsts, page=4)
        lengths = [0, 0]
        for steps in (3, 29), (10, 0), (1, 1), (1, 1), (40, 3):
            spans = [Span(length, length + step) for length, step in zip(lengths, steps, strict=True)]
            appended(cache, 0, spans)
            lengths = [span.stop for span in spans]
            expected = [
                [x for x in range(length) if owner(x, size, 2, first) == rank]
                for length, first in zip(lengths, firsts, strict=True)
            ]
            assert seen(cache, 0, spans) == expected
        assert cache.lengths == tuple(lengths)


def test_whole_tokens_are_kept_as_own_ones_are():
    spans, firsts = [Span(0, 13), Span(0, 6)], (0, 2)
    for rank in range(3):
        cache = ShardedKVCache(2, [None], rank=rank, size=3, firsts=firsts, interleave=2, page=4)
        cache.append(0, *numbers(spans, [list(range(*span)) for span in spans]), spans, whole=True)
        for found, span, first in zip(seen(cache, 0, spans), spans, firsts, strict=True):
            assert found == [x for x in range(*span) if owner(x, 3, 2, first) == rank]


def test_appending_moves_nothing_and_a_long_prompt_lies_together():
    cache = ShardedKVCache(1, [None], page=4)
    appended(cache, 0, [Span(0, 1000)])
    prompt = cache.slabs(0, cache.keys(0, [Span(0, 1000)]))
    assert len(prompt) == 1
    for position in range(1000, 1400):
        appended(cache, 0, [Span(position, position + 1)])
    now = cache.slabs(0, cache.keys(0, [Span(1399, 1400)]))
    assert now[0].k.data_ptr() == prompt[0].k.data_ptr()
    assert len(now) < 8
    kept = 1400 * (2 * 3 + 2 * 2) * 8
    assert kept <= cache.nbytes < 1.25 * kept


def test_what_is_kept_has_no_graph_behind_it():
    """Of an engine that has not said torch.no_grad()."""
    cache, k = ShardedKVCache(1, [None], page=4), torch.zeros(1, 2, 3, 3, requires_grad=True)
    cache.append(0, k * 2.0, k * 2.0, [Span(0, 3)])
    assert not any(x.requires_grad for x in cache.view(0, cache.keys(0, [Span(2, 3)])))


def test_keys_that_are_not_there_yet_are_refused():
    """A layer that asks before it appends, in pages that have room for more: it would see zeros."""
    cache = ShardedKVCache(1, [None, None], page=16)
    for layer in 0, 1:
        appended(cache, layer, [Span(0, 4)])
    appended(cache, 0, [Span(4, 5)])
    assert seen(cache, 0, [Span(4, 5)]) == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"keys up to position 5 are asked for, and layer 1 .* has 4; append them"):
        cache.view(1, cache.keys(1, [Span(4, 5)]))
    with pytest.raises(ValueError, match="keys of 2 samples of a cache of 1; give spans for all"):
        cache.slabs(0, cache.keys(0, [Span(4, 5)] * 2))
    with pytest.raises(ValueError, match=r"windows=\(None, 0\): a query sees itself"):
        ShardedKVCache(1, [None, 0])


def test_window_keeps_what_it_sees_in_memory_that_does_not_grow():
    cache, sizes = ShardedKVCache(2, [20, None], rank=1, size=2, interleave=2, firsts=(0, 1), page=4), []
    lengths = [0, 3]
    for layer in 0, 1:
        appended(cache, layer, [Span(0, 0), Span(0, 3)])
    for _ in range(60):
        spans = [Span(length, length + 5) for length in lengths]
        for layer in 0, 1:
            appended(cache, layer, spans)
        for sample, positions in enumerate(seen(cache, 0, spans)):
            first = max(0, spans[sample].start - 19)
            assert positions == [x for x in range(first, spans[sample].stop) if owner(x, 2, 2, sample) == 1]
        lengths = [span.stop for span in spans]
        sizes.append(cache._layers[0].nbytes)
    assert sizes[-1] == sizes[10]
    assert sizes[-1] * 5 < cache._layers[1].nbytes


def test_sample_that_waits_finds_its_page_when_it_goes_on():
    """Its window has nothing on this rank while the other sample's has moved on by pages."""
    cache = ShardedKVCache(2, [2], rank=0, size=4, interleave=1, page=2)
    appended(cache, 0, [Span(0, 4), Span(0, 40)])
    appended(cache, 0, [Span(4, 4), Span(40, 48)])
    appended(cache, 0, [Span(4, 9), Span(48, 49)])
    assert seen(cache, 0, [Span(4, 9), Span(48, 49)]) == [[4, 8], [48]]


def test_batch_grows_on_all_ranks_at_once():
    layout = Interleaved(4, tuple([Span(64, 65)] * 4), 64, firsts=(0, 1, 2, 3))
    assert [sum(len(range(*layout.slots(rank, each))) for each in range(4)) for rank in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("span", "shape", "dtype", "message"),
    [
        (Span(9, 12), (1, 2, 2, 3), None, "positions 9 to 12 leave a gap after the 8 .* append from 8 on"),
        (Span(7, 10), (1, 2, 2, 3), None, "positions 7 to 10 overlap the 8 .* append from 8 on"),
        (Span(8, 12), (1, 2, 4, 3), None, "of up to 4 new tokens of a sample rank 0 of 2 keeps 2 .* whole=True"),
        (Span(8, 12), (2, 2, 2, 3), None, "a cache of 1; give"),
        (Span(8, 12), (1, 4, 2, 3), None, "k of 2 heads of 3 .* make a cache for each model"),
        (Span(8, 12), (1, 2, 2, 3), torch.float32, "k of 2 heads of 3 in torch.float64"),
    ],
    ids=["gap", "overlap", "tokens", "batch", "heads", "dtype"],
)
def test_what_does_not_follow_is_refused(span, shape, dtype, message):
    cache = ShardedKVCache(1, [None], rank=0, size=2, interleave=2)
    appended(cache, 0, [Span(0, 8)])
    k = torch.zeros(shape, dtype=dtype or torch.float64)
    with pytest.raises(ValueError, match=message):
        cache.append(0, k, k[..., :2], [span])
