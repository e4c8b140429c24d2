"""What no batch is made of, nor its shards and labels: refused in one line, with what has come and what is taken."""

import numpy as np
import pytest
import torch

from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.layouts import Zigzag
from mindspeed_cp.sharding import SequenceLayout, restore, shard

NUMBERS = r"; give integers in a list, an array or a tensor on the CPU\."


def assert_refused(message, function, *args, **options):
    with pytest.raises(ValueError, match=message) as refused:
        function(*args, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("cu_seqlens", "options", "message"),
    [
        ("035", {}, "cu_seqlens is '035'" + NUMBERS),
        (["0", "3"], {}, r"cu_seqlens holds '0'; it counts tokens: give integers\."),
        (None, {}, "cu_seqlens is None" + NUMBERS),
        ({0, 3}, {}, r"cu_seqlens is \{0, 3\}" + NUMBERS),
        (dict.fromkeys(range(99)), {}, "cu_seqlens is a dict" + NUMBERS),
        ((end for end in (0, 3)), {}, "cu_seqlens is <generator .*>" + NUMBERS),
        (torch.tensor(5), {}, r"cu_seqlens is tensor\(5\)" + NUMBERS),
        ([0, float("nan")], {}, "cu_seqlens holds nan; it counts tokens"),
        ([0, float("inf")], {}, "cu_seqlens holds inf; it counts tokens"),
        ([0, 5 + 0j], {}, r"cu_seqlens holds \(5\+0j\); it counts tokens"),
        ([0, [1, 2]], {}, "cu_seqlens holds numbers beside lists of them; give one list for all samples, or one for"),
        ([[0, 5], 5], {}, "cu_seqlens holds numbers beside lists of them"),
        (torch.tensor([[[0, 3, 5]]]), {}, r"cu_seqlens holds lists of \[0, 3, 5\]; give one of integers for all"),
        ([torch.tensor([[0, 5], [0, 5]])], {}, r"cu_seqlens holds lists of \[0, 5\]"),
        ([0, 5], {"num_ranks": 2.0}, r"num_ranks=2\.0 is no integer; give the size of the context-parallel group\."),
        ([0, 5], {"num_ranks": True}, "num_ranks=True is no integer"),
        ([0, 5], {"num_ranks": None}, "num_ranks=None is no integer"),
        ([0, 5], {"tokens": 5}, "tokens is 5" + NUMBERS),
        ([0, 5], {"tokens": [2.5, 2.5]}, r"tokens holds 2\.5; it counts tokens: give integers\."),
        ([0, 5], {"prefer": ""}, "prefer='', .* give 'locality' or 'balance'"),
        ([0, 5], {"mask_type": 5}, "mask_type=5 is for no document; give one for all, or a list with one for each"),
        ([0, 5], {"mask_type": {"causal"}}, r"mask_type=\{'causal'\} is for no document"),
        ([0, 5], {"window_size": (True, False)}, r"document 0 has window_size=\(True, False\); give \(left, right\)"),
        ([0, 5], {"mask_type": "prefix", "prefix_lengths": True}, "a prefix of True; give 0 to 5 in prefix_lengths"),
        (
            [0, 3, 5],
            {"mask_type": ["causal", "prefix"], "prefix_lengths": [99, 1]},
            "document 0 of 3 tokens has a prefix of 99; give 0 to 3 in prefix_lengths, or None",
        ),
    ],
)  # fmt: skip
def test_what_no_batch_is_made_of_is_refused(cu_seqlens, options, message):
    assert_refused(message, PackedBatch.from_cu_seqlens, cu_seqlens, **{"num_ranks": 2, **options})


def test_numbers_may_be_tensors_of_no_dims_and_rules_tensors_or_arrays():
    def batch(**options):
        return PackedBatch.from_cu_seqlens([0, 3, 5], 2, **options)

    assert PackedBatch.from_cu_seqlens([torch.tensor(0), torch.tensor(3), np.array(5)], np.int64(2)) == batch()
    expected = batch(mask_type="prefix", prefix_lengths=[1, 2])
    for lengths in (torch.tensor([1, 2]), np.array([1, 2]), [torch.tensor(1), np.int64(2)]):
        assert batch(mask_type="prefix", prefix_lengths=lengths) == expected
    assert batch(mask_type="prefix", prefix_lengths=torch.tensor(1)) == batch(mask_type="prefix", prefix_lengths=1)
    assert batch(window_size=torch.tensor([1, 0])) == batch(window_size=(1, 0))
    assert batch(window_size=np.array([[1, 0], [2, 0]])) == batch(window_size=[(1, 0), (2, 0)])


def test_one_prefix_for_all_may_be_longer_than_a_document_that_has_none():
    batch = PackedBatch.from_cu_seqlens([0, 3, 9], 2, mask_type=["causal", "prefix"], prefix_lengths=5)
    assert batch == PackedBatch.from_cu_seqlens([0, 3, 9], 2, mask_type=["causal", "prefix"], prefix_lengths=[None, 5])


def test_what_is_no_layout_is_refused_with_the_layout_that_it_has():
    x = torch.zeros(1, 5)
    for given, way_out in (
        (PackedBatch.from_cu_seqlens([0, 5], 2), r"batch\.layout"),
        (SequenceLayout(size=2), r"layout\.of\(tokens of a rank\)"),
        (x, r"one of mindspeed_cp\.layouts"),
    ):
        message = rf"^a \w+ is given in place of a layout; give {way_out}\.$"
        assert_refused(message, shard, x, given, 0, 1)
        assert_refused(message, restore, x, given, 1)


def test_what_no_shard_is_cut_from_is_refused():
    batch, own = PackedBatch.from_cu_seqlens([[0, 3, 5], [0, 5]], 2), SequenceLayout(size=2)
    x = torch.zeros(2, 5)
    for rank in (True, 0.0, None, 2, -1):
        message = rf"^there is no rank {rank} among 2; give an integer from 0 to 1\.$"
        assert_refused(message, batch.shard, x, rank)
        assert_refused(message, batch.position_ids, rank)
        assert_refused(message, batch.loss_mask, rank)
    assert torch.equal(batch.shard(x, torch.tensor(1)), batch.shard(x, 1))
    assert_refused(r"a tensor of \(2, 5\) has 2 dims, and none is 5; .* of its tokens", batch.shard, x, 0, 5)
    assert_refused("none is 2; give the dim of its samples", batch.shard, x, 0, 1, batch_dim=2)
    assert_refused("none is 2; give the dim of its tokens", own.shard, x, 0, dim=2)
    for call in (batch.shard, own.shard):
        assert_refused("a ndarray is given in place of a tensor; give torch.as_t", call, x.numpy(), 0, dim=1)


@pytest.mark.parametrize(
    ("tokens", "ignore_index", "message"),
    [
        (torch.zeros(1, 5, dtype=torch.uint8), -100, "ignore_index=-100 is no integer that tokens of torch.uint8 hold"),
        (torch.zeros(1, 5, dtype=torch.int8), 300, "hold, -128 to 127; give one, or tokens"),
        (torch.zeros(1, 5, dtype=torch.int64), 1.5, "ignore_index=1.5 is no integer"),
        (torch.zeros(1, 5, dtype=torch.int64), True, "ignore_index=True is no integer"),
        (torch.zeros(1, 5, dtype=torch.bool), 0, "of torch.bool have no labels; give token ids"),
        (torch.zeros(1, 5), -100, r"tokens \(1, 5\) of torch.float32 have no labels; give token ids"),
        (torch.zeros(5, dtype=torch.int64), -100, r"tokens \(5,\) of torch.int64 have no labels"),
        (torch.zeros(1, 5, 2, dtype=torch.int64), -100, r"tokens \(1, 5, 2\) of torch.int64 have no labels"),
    ],
)  # fmt: skip
def test_labels_are_of_tokens_that_can_hold_what_is_ignored(tokens, ignore_index, message):
    batch = PackedBatch.from_cu_seqlens([0, 3, 5], 2)
    assert_refused(message, batch.labels, tokens, 0, ignore_index=ignore_index)


def test_labels_of_bytes_hold_an_index_that_fits():
    tokens = torch.tensor([[7, 8, 9]], dtype=torch.uint8)
    labels = PackedBatch.from_cu_seqlens([0, 3], 1).labels(tokens, 0, ignore_index=255)
    assert labels.tolist() == [[8, 9, 255]]


def test_a_list_of_shards_is_restored_only_where_each_is_as_long_as_its_rank_s():
    layout, whole = Zigzag(2, ((9,),)), torch.arange(9).view(1, 9)
    first, second = (shard(whole, layout, rank, 1) for rank in (0, 1))
    assert torch.equal(restore([first, second], layout, 1), whole)
    for given, message in (
        ([second, first], r"shards\[0\] \(1, 4\) has 4 tokens along dim 1, and the layout gives rank 0 5; give the"),
        ([first], r"1 shards are given, and the layout deals to 2 ranks; give one of each rank\."),
        ([first, second, first[:, :0]], "3 shards are given, and the layout deals to 2"),
        (
            [first, second.float()],
            r"shards\[1\] is \(1, 4\) torch.float32 .*; give shards that differ in tokens alone\.",
        ),
        ([first, second.expand(2, -1)], r"shards\[1\] is \(2, 4\)"),
        (None, "a NoneType is given in place of a tensor"),
    ):
        assert_refused(message, restore, given, layout, 1)
