"""Tensors, positions and labels cut by any layout, against the stream token by token."""

import random

import pytest
import torch

from mindspeed_cp.layouts import Contiguous, EqualChunks, Zigzag
from mindspeed_cp.sharding import has_next, places, positions, restore, shard, shift_labels
from unit_tests.layout_cases import random_layouts


def document_of_each_token(layout, sample):
    """Document, position in it and whether it is padding, of each token of a sample's stream."""
    documents = layout.samples[sample]
    return [
        (number, position, layout.padded and number % 2 == 1)
        for number, length in enumerate(documents)
        for position in range(length)
    ]


def layouts(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        yield from random_layouts(rng)


def test_shards_hold_what_the_runs_say():
    for layout in layouts(1, 10):
        num_samples, length = len(layout.samples), sum(layout.samples[0])
        stream = torch.arange(num_samples * length).view(num_samples, length)
        first = [sum(map(len, layout.samples[:sample])) for sample in range(num_samples)]
        for rank in range(layout.num_ranks):
            expected = torch.full((num_samples, layout.num_tokens(rank)), -1)
            for run in layout.runs(rank):
                sample = run.sample or 0
                start = sum(layout.samples[sample][: run.document - first[sample]]) + run.position
                expected[sample, run.start : run.stop] = stream[sample, start : start + run.stop - run.start]
            assert torch.equal(shard(stream, layout, rank, dim=1), expected)


def test_restore_inverts_shard_along_any_dim():
    rng = random.Random(2)
    for layout in layouts(2, 10):
        batch_dim, dim = rng.sample(range(3), 2)
        shape = [2, 2, 2]
        shape[batch_dim], shape[dim] = len(layout.samples), sum(layout.samples[0])
        whole = torch.randn(shape)
        shards = [shard(whole, layout, rank, dim - 3, batch_dim=batch_dim) for rank in range(layout.num_ranks)]
        assert all(each.is_contiguous() for each in shards)
        assert torch.equal(restore(shards, layout, dim, batch_dim=batch_dim), whole)
        assert torch.equal(restore(torch.cat(shards, dim), layout, dim, batch_dim=batch_dim - 3), whole)


def test_a_batch_of_samples_that_are_cut_alike_may_be_of_any_size_and_stand_anywhere():
    layout = Zigzag(3, ((4, 7),))
    tokens = torch.arange(11)
    for rank in range(3):
        held = shard(tokens, layout, rank, dim=0)
        assert torch.equal(shard(tokens.expand(5, 2, 11), layout, rank, dim=-1), held.expand(5, 2, -1))


def test_positions_are_those_in_the_document_and_places_those_in_the_stream():
    for layout in layouts(3, 10):
        for rank in range(layout.num_ranks):
            in_document, in_stream = positions(layout, rank), places(layout, rank)
            assert in_document.shape == in_stream.shape == (len(layout.samples), layout.num_tokens(rank))
            for sample in range(len(layout.samples)):
                known = document_of_each_token(layout, sample)
                assert in_document[sample].tolist() == [known[place][1] for place in in_stream[sample].tolist()]


def test_labels_are_the_next_token_of_the_document_and_padding_has_none():
    for layout in layouts(4, 8):
        num_samples, length = len(layout.samples), sum(layout.samples[0])
        tokens = torch.randint(1000, (num_samples, length))
        labels, labelled = shift_labels(tokens, layout, ignore_index=-1), has_next(layout)
        for sample in range(num_samples):
            known = [*document_of_each_token(layout, sample), (None, 0, False)]
            for place, (document, _, is_padding) in enumerate(known[:-1]):
                follows = not is_padding and known[place + 1][0] == document
                assert labelled[sample, place] == follows
                assert labels[sample, place] == (tokens[sample, place + 1] if follows else -1)


def test_the_gradient_of_a_shard_lies_where_its_tokens_are():
    for layout in layouts(5, 3):
        whole = torch.zeros(len(layout.samples), sum(layout.samples[0]), 2, requires_grad=True)
        for rank in range(layout.num_ranks):
            shard(whole, layout, rank, dim=1).sum().mul(rank + 1).backward()
        ranks = [torch.full_like(shard(whole, layout, rank, dim=1), rank + 1.0) for rank in range(layout.num_ranks)]
        assert torch.equal(whole.grad, restore(ranks, layout, dim=1))


def test_an_index_is_made_once_for_equal_layouts_and_serves_training_though_made_in_inference_mode():
    with torch.inference_mode():
        made = places(Zigzag(2, ((3, 6),)), 1, torch.device("cpu"))
    assert places(Zigzag(2, ((3, 6),)), 1, torch.device("cpu")) is made
    whole = torch.zeros(9, requires_grad=True)
    shard(whole, Zigzag(2, ((3, 6),)), 1, dim=0).sum().backward()
    assert whole.grad.sum() == 5 - 1


def test_equal_chunks_are_cut_as_well():
    layout = EqualChunks(2, 4)
    assert shard(torch.arange(8), layout, 0, dim=0).tolist() == [0, 1, 6, 7]
    assert positions(layout, 0).tolist() == [[0, 1, 6, 7]]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 8), {"dim": 1}, r"has 8 tokens along dim 1, and the documents have 9; give whole samples, and the dim of"),
        ((3, 9), {"dim": 1}, r"has 3 samples along dim 0, and the layout has documents for 2; give the batch"),
        ((9, 9), {"dim": 0}, r"a tensor of \(9, 9\) has 9 samples along dim 0, and"),
    ],
)
def test_a_tensor_of_other_samples_is_refused(shape, options, message):
    layout = Contiguous(2, ((4, 5), (9,)))
    for call in (
        lambda tensor: shard(tensor, layout, 0, **options),
        lambda tensor: restore(tensor, layout, **options),
    ):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))
