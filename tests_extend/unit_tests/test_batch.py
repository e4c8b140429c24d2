"""A batch of packed documents, from what a user has of it to shards, labels and the plan of attention."""

import itertools
import random

import numpy as np
import pytest
import torch

from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.documents import cu_seqlens_of
from mindspeed_cp.layouts import Balanced, Contiguous, DocumentZigzag, Zigzag
from mindspeed_cp.plan import CAUSAL, FULL, Band

CU_SEQLENS = [0, 5, 6, 20]


def seen(batch):
    """Which places of a sample's stream see which: [B, S, S] bool, from the plan's tiles."""
    num_samples, length = len(batch.layout.samples), batch.layout.length
    places = [batch.shard(torch.arange(length).repeat(num_samples, 1), rank) for rank in range(batch.layout.num_ranks)]
    visible = torch.zeros(num_samples, length, length, dtype=torch.int64)
    for mine, theirs in itertools.product(range(batch.layout.num_ranks), repeat=2):
        for tile in batch.plan.tiles(mine, theirs):
            rows, keys = tile.num_queries, tile.num_keys
            after = torch.arange(keys) - (torch.arange(rows).unsqueeze(1) + keys - rows)
            inside = after >= (-rows - keys if tile.left is None else -tile.left)
            inside &= after <= (rows + keys if tile.right is None else tile.right)
            for sample in range(num_samples) if tile.sample is None else [tile.sample]:
                queries, seen_keys = places[mine][sample, tile.queries], places[theirs][sample, tile.keys]
                visible[sample, queries.unsqueeze(1), seen_keys] += inside.long()
    return visible


def by_hand(lengths, rule):
    """The mask of documents in which query i sees key j where rule(document, i, j)."""
    total = sum(lengths)
    mask = torch.zeros(total, total, dtype=torch.int64)
    starts = [0, *itertools.accumulate(lengths)]
    for document, length in enumerate(lengths):
        for i, j in itertools.product(range(length), repeat=2):
            mask[starts[document] + i, starts[document] + j] = int(rule(document, i, j))
    return mask


def test_cu_seqlens_may_be_a_list_a_tensor_or_an_array_of_either_integer_type():
    expected = PackedBatch.from_cu_seqlens(CU_SEQLENS, 4)
    for dtype in (torch.int32, torch.int64):
        assert PackedBatch.from_cu_seqlens(torch.tensor(CU_SEQLENS, dtype=dtype), 4) == expected
    for dtype in (np.int32, np.int64):
        assert PackedBatch.from_cu_seqlens(np.array(CU_SEQLENS, dtype=dtype), 4) == expected
        assert PackedBatch.from_cu_seqlens(list(np.array(CU_SEQLENS, dtype=dtype)), 4) == expected
    assert expected.layout.samples == ((5, 1, 14),)
    assert hash(expected.plan) == hash(PackedBatch.from_cu_seqlens(tuple(CU_SEQLENS), 4).plan)


def test_samples_have_cu_seqlens_of_their_own_also_as_rows_that_are_filled_up():
    expected = ((5, 1, 14), (20,))
    for given in (
        [CU_SEQLENS, [0, 20]],
        [torch.tensor(CU_SEQLENS), np.array([0, 20])],
        torch.tensor([CU_SEQLENS, [0, 20, 20, 20]]),
        np.array([CU_SEQLENS, [0, 20, 20, 20]]),
    ):
        assert PackedBatch.from_cu_seqlens(given, 4).layout.samples == expected


def test_document_ids_give_the_cu_seqlens():
    assert cu_seqlens_of([7, 7, 7, 2, 5, 5]) == [[0, 3, 4, 6]]
    assert cu_seqlens_of(torch.tensor([[1, 1, 2], [0, 1, 2]])) == [[0, 2, 3], [0, 1, 2, 3]]
    assert PackedBatch.from_cu_seqlens(cu_seqlens_of(np.array([3, 3, 4])), 2).layout.samples == ((2, 1),)


def test_layouts_go_by_name():
    for name, rule in (
        ("contiguous", Contiguous),
        ("zigzag", Zigzag),
        ("zigzag_by_document", DocumentZigzag),
        ("balanced", Balanced),
    ):
        assert isinstance(PackedBatch.from_cu_seqlens(CU_SEQLENS, 3, layout=name).layout, rule)
    assert PackedBatch.from_cu_seqlens(CU_SEQLENS, 3).layout.prefer == "locality"
    balance = PackedBatch.from_cu_seqlens(CU_SEQLENS, 3, prefer="balance", tokens=(0, 10, 10)).layout
    assert (balance.prefer, balance.num_tokens(0)) == ("balance", 0)


LENGTHS = (5, 1, 14)
MASKS = [
    ({}, lambda d, i, j: j <= i),
    ({"mask_type": "full"}, lambda d, i, j: True),
    ({"mask_type": "prefix", "prefix_lengths": [2, 0, 9]}, lambda d, i, j: j <= i or j < (2, 0, 9)[d]),
    ({"mask_type": "prefix", "prefix_lengths": 1}, lambda d, i, j: j <= i or j < 1),
    ({"window_size": (0, 0)}, lambda d, i, j: i == j),
    ({"window_size": (3, 0)}, lambda d, i, j: 0 <= i - j <= 3),
    ({"window_size": (-1, 2)}, lambda d, i, j: j - i <= 2),
    ({"window_size": (-1, -1)}, lambda d, i, j: True),
    (
        {"mask_type": ["full", "causal", None], "window_size": [None, None, (2, 0)]},
        lambda d, i, j: d == 0 or (d == 1 and j <= i) or (d == 2 and 0 <= i - j <= 2),
    ),
]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_by_document", "balanced"])
@pytest.mark.parametrize(("mask", "rule"), MASKS, ids=[str(mask) for mask, _ in MASKS])
def test_documents_see_what_the_mask_says_and_nothing_of_each_other(mask, rule, layout):
    batch = PackedBatch.from_cu_seqlens(CU_SEQLENS, 3, layout=layout, **mask)
    assert torch.equal(seen(batch)[0], by_hand(LENGTHS, rule))


def test_a_rule_is_that_of_its_own_document_in_every_sample():
    batch = PackedBatch.from_cu_seqlens([[0, 4, 8], [0, 8]], 2, window_size=[(0, 0), (1, 0), (2, 0)])
    visible = seen(batch)
    assert torch.equal(visible[0], by_hand((4, 4), lambda d, i, j: 0 <= i - j <= d))
    assert torch.equal(visible[1], by_hand((8,), lambda d, i, j: 0 <= i - j <= 2))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_by_document", "balanced"])
def test_padding_sees_nothing_and_is_not_seen_and_has_no_label(layout):
    batch = PackedBatch.from_cu_seqlens([0, 3, 7], 2, cu_seqlens_padded=[0, 4, 12], mask_type="full", layout=layout)
    is_text = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    documents = torch.tensor([0] * 4 + [1] * 8)
    same = documents.unsqueeze(1) == documents
    assert torch.equal(seen(batch)[0], same * is_text * is_text.unsqueeze(1))
    tokens = torch.arange(100, 112).unsqueeze(0)
    labels = batch.restore([batch.labels(tokens, rank) for rank in range(2)])
    assert labels[0].tolist() == [101, 102, -100, -100, 105, 106, 107, -100, -100, -100, -100, -100]
    masks = batch.restore([batch.loss_mask(rank) for rank in range(2)])
    assert torch.equal(masks, (labels != -100).float())


def test_shards_positions_labels_and_masks_of_ranks_make_up_the_batch():
    rng = random.Random(1)
    for layout in ("contiguous", "zigzag", "zigzag_by_document", "balanced"):
        num_ranks = rng.randrange(1, 6)
        batch = PackedBatch.from_cu_seqlens([[0, 5, 6, 20], [0, 9, 20]], num_ranks, layout=layout)
        tokens = torch.randint(100, (2, 20))
        ranks = range(num_ranks)
        assert torch.equal(batch.restore([batch.shard(tokens, rank) for rank in ranks]), tokens)
        positions = batch.restore([batch.position_ids(rank) for rank in ranks])
        assert positions.tolist() == [[*range(5), 0, *range(14)], [*range(9), *range(11)]]
        labels = batch.restore([batch.labels(tokens, rank, ignore_index=-1) for rank in ranks])
        expected = tokens.roll(-1, 1)
        expected[0, [4, 5, 19]] = expected[1, [8, 19]] = -1
        assert torch.equal(labels, expected)
        assert torch.equal(batch.restore([batch.loss_mask(rank) for rank in ranks]), (labels != -1).float())
        hidden = torch.randn(20, 2, 3)
        shards = [batch.shard(hidden, rank, dim=0, batch_dim=1) for rank in ranks]
        assert torch.equal(batch.restore(shards, dim=0, batch_dim=1), hidden)


def test_layers_with_masks_of_their_own_share_who_holds_what():
    batch = PackedBatch.from_cu_seqlens(CU_SEQLENS, 3)
    windowed = batch.with_mask(window_size=(4, 0))
    assert windowed.layout is batch.layout
    assert (batch.plan.bands, windowed.plan.bands) == (CAUSAL, (Band(4, 0),))
    assert batch.with_mask(mask_type="full").bands == FULL


def test_padding_is_seen_under_no_other_mask_either():
    ends, padded = [0, 3, 7], [0, 4, 12]
    batch = PackedBatch.from_cu_seqlens(ends, 2, cu_seqlens_padded=padded, layout="zigzag")
    for mask in ({"mask_type": "full"}, {"window_size": [(1, 0), (-1, 2)]}):
        expected = PackedBatch.from_cu_seqlens(ends, 2, cu_seqlens_padded=padded, layout="zigzag", **mask)
        assert batch.with_mask(**mask) == expected


def test_another_layout_has_the_same_documents_and_mask():
    batch = PackedBatch.from_cu_seqlens([0, 3, 7], 2, cu_seqlens_padded=[0, 4, 12], window_size=(1, 0))
    other = batch.with_layout("contiguous")
    assert (other.layout.samples, other.layout.padded) == (batch.layout.samples, True)
    assert torch.equal(seen(other), seen(batch))
    assert batch.with_layout("balanced") == batch


def test_balance_reckons_with_the_mask():
    cu_seqlens = [0, 512, 1024, 1536, 2048]
    sets = [(-1, -1), (0, 0), (0, 0), (0, 0)]
    batch = PackedBatch.from_cu_seqlens(cu_seqlens, 4, window_size=sets, prefer="balance")
    loads = [sum(batch.plan.area(mine, theirs) for theirs in range(4)) for mine in range(4)]
    assert max(loads) <= 1.02 * sum(loads) / 4


@pytest.mark.parametrize(
    ("cu_seqlens", "options", "message"),
    [
        ([1, 5], {}, r"cu_seqlens begins with 1; give 0, where the first document does\."),
        ([], {}, r"cu_seqlens begins with nothing; give 0"),
        ([0, 5, 3], {}, r"cu_seqlens\[2\] = 3 comes after 5, and documents follow each other; sort it, or sum"),
        ([0, 5, 5, 8], {}, r"cu_seqlens\[2\] = 5 ends a document of no tokens; leave that document out\."),
        ([0, -4], {}, r"cu_seqlens\[1\] = -4 comes after 0"),
        ([0, 2.5], {}, r"cu_seqlens holds 2\.5; it counts tokens: give integers\."),
        (torch.tensor([0.0, 5.0]), {}, r"cu_seqlens is of float32; it counts tokens: give int32 or int64\."),
        (np.array([0, 5], dtype=np.uint8), {}, r"cu_seqlens is of uint8"),
        (torch.empty(3, dtype=torch.int32, device="meta"), {}, r"cu_seqlens is on meta, .*or cu_seqlens\.cpu\(\)"),
        ([[0, 5], [0, 4]], {}, r"sample 1 has 4 tokens and sample 0 5; pad them to one length\."),
        ([0, 5], {"cu_seqlens_padded": [0, 4]}, r"document 0 has 5 tokens by cu_seqlens and 4 by .*; give 5 or more\."),
        ([0, 5], {"cu_seqlens_padded": [0, 5, 8]}, r"cu_seqlens has 1 documents and cu_seqlens_padded 2; both"),
        ([0, 5], {"num_ranks": 0}, r"1 samples over 0 ranks are no layout"),
        ([0, 5], {"tokens": (3, 3)}, r"tokens \(3, 3\) on 2 ranks do not make up a sample of 5; give 2 numbers from 0"),
        ([0, 5], {"layout": "striped"}, r"layout='striped' is unknown; give contiguous, zigzag, .* or balanced\."),
        ([0, 5], {"layout": "zigzag", "prefer": "balance"}, r"prefer='balance' says how layout='balanced' deals"),
        ([0, 5], {"window_size": (-2, 0)}, r"document 0 has window_size=\(-2, 0\); .* window of W tokens is \(W - 1"),
        ([0, 5], {"window_size": 3}, r"document 0 has window_size=3; give \(left, right\), on each side the number of"),
        ([0, 5], {"window_size": (2.5, 0)}, r"document 0 has window_size=\(2\.5, 0\); give \(left, right\)"),
        (torch.tensor([[0, 5, 3, 5]]), {}, r"cu_seqlens\[2\] = 3 comes after 5"),
        ([0, 5], {"mask_type": "causal", "window_size": (3, 0)}, r"mask_type='causal' beside window_size=\(3, 0\), "),
        ([0, 5], {"mask_type": "sliding"}, r"mask_type='sliding' is unknown; give causal, full or prefix, or a window"),
        ([0, 5], {"mask_type": "prefix"}, r"document 0 of 5 tokens has mask_type='prefix' and a prefix of None;"),
        ([0, 5], {"mask_type": "prefix", "prefix_lengths": 6}, r"a prefix of 6; give 0 to 5 in prefix_lengths\."),
        ([0, 5], {"prefix_lengths": 2}, r"prefix_lengths=2 is for mask_type='prefix', which no document has; give"),
        ([0, 5], {"window_size": [(1, 0), (2, 0)]}, r"window_size is for 2 documents, and the batch has 1; give"),
    ],
)  # fmt: skip
def test_what_is_no_batch_is_refused_in_one_line_with_values_and_a_way_out(cu_seqlens, options, message):
    with pytest.raises(ValueError, match=message) as refusal:
        PackedBatch.from_cu_seqlens(cu_seqlens, **{"num_ranks": 2, **options})
    assert "\n" not in str(refusal.value)


def test_documents_that_are_torn_apart_are_refused():
    with pytest.raises(ValueError, match=r"document 7 begins at token 0 and again at token 3; .* an id of their own\."):
        cu_seqlens_of([7, 7, 2, 7])
