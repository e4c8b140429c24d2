"""Who holds what, by each rule: over random documents, samples and ranks, and balance over a mix of documents."""

import random
from itertools import accumulate

import pytest

from mindspeed_cp.benchmark.documents import areas, lognormal_mix, received, unevenness
from mindspeed_cp.layouts import Balanced, Contiguous, DocumentZigzag, EqualChunks, Zigzag
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan, Band, Run, check_runs, joined, pairs_seen
from unit_tests.layout_cases import random_layouts


def tokens_by_sample(layout, rank):
    tokens = dict.fromkeys(range(len(layout.samples)), 0)
    for run in layout.runs(rank):
        tokens[run.sample or 0] += run.stop - run.start
    return set(tokens.values())


def test_every_layout_holds_each_token_once_in_as_few_runs_as_possible():
    rng = random.Random(1)
    for _ in range(150):
        for layout in random_layouts(rng):
            check_runs(layout)
            lengths = [length for sample in layout.samples for length in sample]
            held = [0] * len(lengths)
            for rank in range(layout.num_ranks):
                assert joined(layout.runs(rank)) == layout.runs(rank)
                for run in layout.runs(rank):
                    held[run.document] += run.stop - run.start
            assert held == lengths


def test_ranks_hold_as_many_tokens_of_each_sample_or_as_many_as_they_are_told():
    rng = random.Random(2)
    for _ in range(100):
        for layout in random_layouts(rng):
            tokens = [layout.num_tokens(rank) for rank in range(layout.num_ranks)]
            assert [tokens_by_sample(layout, rank) for rank in range(layout.num_ranks)] == [{each} for each in tokens]
            if layout.tokens is None:
                assert max(tokens) - min(tokens) <= 1
            else:
                assert tuple(tokens) == layout.tokens


def test_zigzag_and_contiguous_of_lengths_that_fit_are_the_equal_chunks():
    for num_ranks in range(1, 9):
        for tokens in (2, 4, 10):
            for kind, rule in (("zigzag", Zigzag), ("contiguous", Contiguous)):
                equal, layout = EqualChunks(num_ranks, tokens, kind), rule(num_ranks, ((num_ranks * tokens,),))
                for rank in range(num_ranks):
                    assert layout.runs(rank) == equal.runs(rank)


def test_zigzag_of_a_length_that_does_not_fit_by_hand():
    layout = Zigzag(3, ((11,),))
    assert [layout.runs(rank) for rank in range(3)] == [
        (Run(0, 2, 0), Run(2, 4, 9)),
        (Run(0, 2, 2), Run(2, 4, 7)),
        (Run(0, 3, 4),),
    ]


def test_zigzag_by_document_is_the_rule_for_packed_documents_of_whole_chunks():
    # As TransformerEngine has it: of each document's 2P chunks a rank takes those numbered r and 2P-1-r.
    num_ranks, documents = 3, (6, 24, 12)
    layout = DocumentZigzag(num_ranks, (documents,))
    for rank in range(num_ranks):
        taken = [
            (document, chunk * (length // 6) + token)
            for document, length in enumerate(documents)
            for chunk in (rank, 2 * num_ranks - 1 - rank)
            for token in range(length // 6)
        ]
        runs = layout.runs(rank)
        assert [(run.document, run.position + place) for run in runs for place in range(run.stop - run.start)] == taken


def test_zigzag_by_document_gives_every_rank_its_share_of_each_document():
    rng = random.Random(4)
    for _ in range(100):
        num_ranks, documents = rng.randrange(1, 9), lognormal_mix(rng.randrange(10**6), 60, 8)
        layout = DocumentZigzag(num_ranks, (documents,))
        for number, length in enumerate(documents):
            holders = [-1] * length
            for rank in range(num_ranks):
                for run in layout.runs(rank):
                    if run.document == number:
                        holders[run.position : run.position + run.stop - run.start] = [rank] * (run.stop - run.start)
            shares = [holders.count(rank) for rank in range(num_ranks)]
            assert max(shares) - min(shares) <= 1
            # From the first rank to the last, and back.
            turn = holders.index(max(holders))
            assert holders[:turn] == sorted(holders[:turn])
            assert holders[turn:] == sorted(holders[turn:], reverse=True)


def test_padding_is_cut_with_its_document_and_is_a_document_of_its_own():
    layout = DocumentZigzag(2, ((5, 3, 4, 0),), padded=True)
    assert [layout.runs(rank) for rank in range(2)] == [
        (Run(0, 2, 0, 0), Run(2, 4, 1, 1), Run(4, 5, 0, 2), Run(5, 6, 3, 2)),
        (Run(0, 3, 2, 0), Run(3, 4, 0, 1), Run(4, 6, 1, 2)),
    ]


def test_pairs_seen_are_those_of_brute_force():
    rng = random.Random(5)
    for bands in (
        CAUSAL,
        FULL,
        (Band(2, 0),),
        (Band(1, 3),),
        (Band(4, -2),),
        (Band(None, None, (0, 3)), Band(2, 0, (3, 9))),
    ):
        for _ in range(40):
            length = rng.randrange(1, 13)
            start, stop = sorted(rng.randrange(length + 1) for _ in range(2))
            seen = sum(
                first <= key < (length if last is None else last)
                and (behind is None or query - key <= behind)
                and (ahead is None or key - query <= ahead)
                for behind, ahead, (first, last) in bands
                for query in range(start, stop)
                for key in range(length)
            )
            assert pairs_seen(bands, length, start, stop) == seen


MIX = [lognormal_mix(seed, 2 ** (14 + seed % 4)) for seed in range(10)]


def balanced_mix(bands=CAUSAL, **options):
    for documents in MIX:
        layout = Balanced(8, (documents,), bands=bands, **options)
        yield AttentionPlan(layout, layout, bands)


def test_balance_gives_every_rank_the_same_area_from_16_chunks_on():
    for chunks in (16, 24):
        assert max(unevenness(areas(plan)) for plan in balanced_mix(prefer="balance", chunks=chunks)) <= 1.01


def test_locality_gives_nearly_the_same_area_and_needs_a_third_of_a_ring_s_tokens():
    plans = list(balanced_mix())
    assert sum(unevenness(areas(plan)) for plan in plans) / 10 <= 1.04
    assert sum(received(plan) / (7 * plan.queries.length) for plan in plans) / 10 <= 0.28


@pytest.mark.parametrize("prefer", ["locality", "balance"])
@pytest.mark.parametrize("bands", [FULL, (Band(300, 0),), (Band(64, 64),)])
def test_area_is_balanced_under_other_bands_too(bands, prefer):
    uneven = [unevenness(areas(plan)) for plan in balanced_mix(bands, prefer=prefer)]
    assert max(uneven) <= 1.06
    assert sum(uneven) / len(uneven) <= 1.03


@pytest.mark.parametrize(
    ("prefer", "num_ranks", "count", "most"),
    [
        ("locality", 64, 1000, 1.01),
        ("locality", 8, 1000, 1.01),
        ("locality", 64, 100, 1.12),
        ("balance", 64, 1000, 1.01),
        ("balance", 8, 1000, 1.01),
        ("balance", 64, 100, 1.01),
    ],
)
def test_many_documents_are_balanced_on_many_ranks(num_ranks, count, prefer, most):
    documents = lognormal_mix(count, 2**20, 2**20 / count)
    layout = Balanced(num_ranks, (documents,), prefer=prefer)
    loads = [
        sum(pairs_seen(CAUSAL, 0, run.position, run.position + run.stop - run.start) for run in layout.runs(rank))
        for rank in range(num_ranks)
    ]
    assert sum(loads) == sum(length * (length + 1) // 2 for length in documents)
    assert unevenness(loads) <= most


def test_documents_that_make_up_the_ranks_stay_whole():
    layout = Balanced(4, ((8, 8, 8, 8),))
    assert sorted(layout.runs(rank)[0].document for rank in range(4)) == [0, 1, 2, 3]
    plan = AttentionPlan(layout, layout)
    assert received(plan) == 0


def test_what_one_sample_leaves_uneven_the_next_makes_up_for():
    # Two documents on two ranks, none of them cut: the longer ones go to different ranks.
    layout = Balanced(2, ((6, 4), (6, 4)), tokens=(5, 5), chunks=1)
    plan = AttentionPlan(layout, layout)
    alone = Balanced(2, ((6, 4),), tokens=(5, 5), chunks=1)
    once = areas(AttentionPlan(alone, alone))
    both = areas(plan)
    assert abs(both[0] - both[1]) < 2 * abs(once[0] - once[1])


def test_padding_has_no_area():
    bands_of = ((1, ()), (3, ()))
    layout = Balanced(2, ((8, 4, 8, 4),), padded=True, bands_of=bands_of)
    assert areas(AttentionPlan(layout, layout, bands_of=dict(bands_of))) == [36, 36]


@pytest.mark.parametrize("rule", [Contiguous, Zigzag, DocumentZigzag, Balanced])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranks": 0}, "1 samples over 0 ranks are no layout; give 1 of each or more."),
        ({"samples": ()}, "0 samples over 2 ranks are no layout"),
        ({"samples": ((3, 0),)}, "sample 0: document 1 has 0 tokens; give 1 or more"),
        ({"samples": ((4,), (5, -1))}, "sample 1: document 1 has -1 tokens"),
        ({"samples": ((3, 1), (3, 2))}, "sample 1 has 5 tokens and sample 0 4; pad them to one length."),
        ({"samples": ((3, 0, 0, 2),), "padded": True}, "sample 0: document 1 has 0 tokens; give 1 or more"),
        ({"samples": ((3,),), "padded": True}, "sample 0 has 1 lengths; with padding give two for each document"),
    ],
)
def test_documents_that_are_no_stream_are_refused(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule(**{"num_ranks": 2, "samples": ((4,),), **options})


@pytest.mark.parametrize("tokens", [(4,), (5, -1), (2, 3)])
def test_tokens_that_do_not_make_up_a_sample_are_refused(tokens):
    with pytest.raises(ValueError, match="2 numbers from 0 on whose sum is 4"):
        Contiguous(2, ((4,),), tokens)


def test_what_a_rule_cannot_honour_is_refused():
    with pytest.raises(ValueError, match="leave tokens out, or take another layout"):
        DocumentZigzag(2, ((4,),), tokens=(1, 3))
    with pytest.raises(ValueError, match="give 'locality' or 'balance', and 1 chunk or more"):
        Balanced(2, ((4,),), prefer="speed")
    with pytest.raises(ValueError, match="there is no rank 2 among 2"):
        Zigzag(2, ((4,),)).runs(2)


def test_a_layout_is_equal_to_one_of_the_same_documents():
    first, second = (Balanced(2, ((6, 4),)) for _ in range(2))
    first.runs(0)
    assert first == second and hash(first) == hash(second)
    assert first != Zigzag(2, ((6, 4),))
    assert list(accumulate(first.num_tokens(rank) for rank in range(2))) == [5, 10]
