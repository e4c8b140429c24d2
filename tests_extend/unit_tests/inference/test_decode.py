"""Decode by each method against dense attention in fp64, and what it sends."""

import random
from itertools import accumulate

import pytest
import torch

from mindspeed_cp.attention import AttentionTerms
from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import (
    DecodeCase,
    Spans,
    State,
    agreement_of,
    decode_attention,
    decode_plan,
    decode_sent,
    take,
)
from mindspeed_cp.inference.decode import WAYS
from unit_tests.dense import dense_attention
from unit_tests.pairwise import pairwise

WAYS_OF_ALL = [
    (method, layout, backend)
    for method, (layouts, backends) in WAYS.items()
    for layout in layouts
    for backend in backends
]


def spans_of(size, lengths):
    """Tokens of each sequence in short stretches on any ranks; the last rank has none where there are others."""
    rng, held = random.Random(size), [[[] for _ in lengths] for _ in range(size)]
    for sample, length in enumerate(lengths):
        for first in range(0, length, 3):
            held[rng.randrange(max(size - 1, 1))][sample].append((first, min(first + 3, length)))
    return Spans(tuple(tuple(map(tuple, each)) for each in held))


def inputs(lengths, num_queries, heads, kv_heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = (heads, num_queries, 8), (kv_heads, max(lengths), 8), (kv_heads, max(lengths), 12)
    return [torch.randn(len(lengths), *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense(q, k, v, lengths, sinks=None, softcap=None):
    """The last queries of each sequence, over all up to each."""
    share = q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(share, 1).transpose(2, 3) / q.size(3) ** 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.tensor(lengths)[:, None] - q.size(2) + torch.arange(q.size(2))
    seen = torch.arange(k.size(2)) <= places[..., None]
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    lse = lse if sinks is None else torch.logaddexp(lse, sinks[:, None])
    return State((scores - lse[..., None]).exp() @ v.repeat_interleave(share, 1), lse)


def shares_of(size, layout, heads, batch):
    """The part of q that each rank has, as (dim, slice)."""
    if layout == "heads":
        return [(1, slice(heads // size * rank, heads // size * (rank + 1))) for rank in range(size)]
    if layout == "batch":
        ends = [0, *accumulate(batch // size + (rank < batch % size) for rank in range(size))]
        return [(0, slice(*ends[rank : rank + 2])) for rank in range(size)]
    return [(0, slice(None))] * size


def part(x, dim, of):
    return x[:, of] if dim else x[of]


def decode(size, way, lengths, num_queries, heads, kv_heads, *, dtype=torch.float64, **settings):
    """What each rank gets, and its communicator. Keys and values that pad a sequence are NaN."""
    method, layout, backend = way
    q, k, v = inputs(lengths, num_queries, heads, kv_heads, dtype)
    keys = spans_of(size, lengths)
    plan = decode_plan([(length - num_queries, length) for length in lengths], keys)
    world, shares = VirtualWorld(size, 20.0), shares_of(size, layout, heads, len(lengths))

    def on_rank(rank):
        own = [take(x, keys, rank) for x in (k, v)]
        for x in own:
            for sample in range(len(lengths)):
                x[sample, :, keys.length(rank, sample) :] = torch.nan
        group = VirtualCommunicator(world, range(size), rank, "decode")
        told = {"method": method, "q_layout": layout, "backend": backend, **settings}
        return decode_attention(part(q, *shares[rank]), *own, communicator=group, plan=plan, **told), group

    return world.run(on_rank), (q, k, v), shares


def assert_equal(found, expected, shares):
    for (state, _), share in zip(found, shares, strict=True):
        for one, other in zip(state, expected, strict=True):
            torch.testing.assert_close(one, part(other, *share), rtol=0, atol=1e-12)


AXES = {
    "size": [1, 2, 3, 4, 8],
    "way": WAYS_OF_ALL,
    "queries": [1, 3],
    "share": [1, 2, 4],
    "ragged": [True, False],
}


@pytest.mark.parametrize("row", pairwise(AXES), ids=lambda row: "-".join(map(str, row.values())))
def test_decode_equals_dense_attention(row):
    size, way = row["size"], row["way"]
    heads = 2 * row["share"] * (size if way[1] == "heads" else 1)
    batch = size if way[:2] == ("allgather_q", "batch") else 3
    lengths = [31 - 5 * (sample % 3) * row["ragged"] for sample in range(batch)]
    found, given, shares = decode(size, way, lengths, row["queries"], heads, heads // row["share"])
    assert_equal(found, dense(*given, lengths), shares)


@pytest.mark.parametrize("way", WAYS_OF_ALL, ids=str)
def test_without_a_plan_every_query_sees_every_key(way):
    q, k, v = inputs([9] * 3, 2, 6, 3)
    size, (method, layout, backend) = 3, way
    world, shares, keys = (
        VirtualWorld(size, 20.0),
        shares_of(size, layout, 6, 3),
        [slice(0, 4), slice(4, 4), slice(4, 9)],
    )

    def on_rank(rank):
        group = VirtualCommunicator(world, range(size), rank, "decode")
        own = part(q, *shares[rank]), k[:, :, keys[rank]], v[:, :, keys[rank]]
        return decode_attention(*own, communicator=group, method=method, q_layout=layout, backend=backend), group

    exact = dense_attention(q, k, v, q.new_zeros(*q.shape[:3], 12))
    assert_equal(world.run(on_rank), State(exact.out, exact.lse), shares)


def test_heads_of_a_rank_may_read_parts_of_several_key_heads():
    # 8 query heads on 4 ranks, 2 key heads: 4 query heads read one. 9 on 3 of 3 groups; 12 on 3 of 2 groups of 6.
    for size, heads, kv_heads in ((4, 8, 2), (3, 9, 3), (3, 12, 2)):
        way = "ring_q", "heads", "a2a"
        found, given, shares = decode(size, way, [14, 9], 1, heads, kv_heads)
        assert_equal(found, dense(*given, [14, 9]), shares)


@pytest.mark.parametrize("way", [way for way in WAYS_OF_ALL if way[2] == "a2a"], ids=str)
def test_sinks_and_softcap_count_once(way):
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)
    _, layout, _ = way
    lengths, size = [11, 7], 2
    shares = shares_of(size, layout, 4, 2)
    if layout == "heads":
        found, given, _ = decode(size, way, lengths, 1, 4, 2, terms=AttentionTerms(softcap=2.0))
        assert_equal(found, dense(*given, lengths, softcap=2.0), shares)
        return
    found, given, _ = decode(size, way, lengths, 1, 4, 2, terms=AttentionTerms(sinks=sinks, softcap=2.0))
    assert_equal(found, dense(*given, lengths, sinks, 2.0), shares)


@pytest.mark.parametrize("way", WAYS_OF_ALL, ids=str)
@pytest.mark.parametrize(("size", "batch", "queries"), [(2, 4, 1), (4, 4, 1), (4, 8, 3)])
def test_bytes_and_operations_are_those_of_the_formula_whatever_the_context(way, size, batch, queries):
    method, _, backend = way
    case = DecodeCase(size, batch, 8, 8, queries, value_head_size=12, dtype=torch.bfloat16)
    formula = decode_sent(case, method, backend)
    for length in (8, 80):
        found, _, _ = decode(size, way, [length] * batch, queries, 8, 4, dtype=torch.bfloat16)
        for _, group in found:
            assert (group.traffic.bytes_sent.total(), group.traffic.calls.total()) == formula


def test_error_in_bf16_does_not_grow_with_the_ranks():
    errors = []
    for size in (1, 2, 8):
        found, given, _ = decode(size, ("tree", "replicated", "a2a"), [96], 1, 64, 8, dtype=torch.bfloat16)
        exact = dense(*(x.double() for x in given), [96])
        errors.append((found[0][0].out.double() - exact.out).norm().item())
    assert max(errors) <= 1.1 * errors[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "tree", "q_layout": "heads"}, "for heads use allgather_q or ring_q"),
        ({"method": "ring_q", "q_layout": "batch", "backend": "ag_rs"}, "takes queries heads or batch by a2a"),
        ({"method": "gather"}, "give one of 'tree', 'allgather_q', 'ring_q'"),
        ({"method": "allgather_q", "q_layout": "batch"}, "3 sequences are no equal shares of 2 ranks"),
        ({"heads": 6}, "4 key heads divide the 6 query heads; shard q so"),
        ({"terms": AttentionTerms(bias=torch.zeros(1, 1, 1, 8))}, "a bias has rows of its own"),
        ({"method": "ring_q", "q_layout": "heads", "terms": AttentionTerms(alibi_slopes=torch.ones(2))}, "use tree"),
        ({"plan": decode_plan([(4, 5)] * 3, Spans(((((0, 5),),),)))}, "make it by decode_plan"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_a_method_cannot_do_is_refused_on_all_ranks_before_anything_is_sent(settings, sentence):
    settings = dict(settings)
    heads, layout, world = settings.pop("heads", 4), settings.get("q_layout"), VirtualWorld(2, 5.0)
    k = torch.zeros(3, 4, 5, 8)

    def on_rank(rank):
        q = torch.zeros(2 - rank if layout == "batch" else 3, heads // 2 if layout == "heads" else heads, 1, 8)
        group = VirtualCommunicator(world, range(2), rank, "decode")
        with pytest.raises(ValueError, match=sentence):
            decode_attention(q, k, k, communicator=group, agreement=agreement_of(group), **settings)
        return group.traffic.calls.total()

    assert world.run(on_rank) == [0, 0]
