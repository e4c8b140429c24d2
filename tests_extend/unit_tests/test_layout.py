"""Which tokens each rank holds, over every group of up to 16 ranks."""

import dataclasses

import pytest
import torch

from mindspeed_cp.sharding import SequenceLayout

LAYOUTS = [SequenceLayout(size=size, kind=kind) for size in range(1, 17) for kind in ("zigzag", "contiguous")]


def all_shards(layout, sequence, dim):
    """The shards of all ranks, concatenated by rank."""
    return torch.cat([layout.shard(sequence, rank, dim) for rank in range(layout.size)], dim)


def test_zigzag_of_four_ranks_is_that_of_the_note():
    layout = SequenceLayout(size=4)
    assert layout.kind == "zigzag"
    assert (layout.chunks_per_rank, layout.num_chunks) == (2, 8)
    assert [layout.of(0).chunks(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]


def test_contiguous_rank_holds_the_chunk_of_its_number():
    layout = SequenceLayout(size=4, kind="contiguous")
    assert (layout.chunks_per_rank, layout.num_chunks) == (1, 4)
    assert [layout.of(0).chunks(rank) for rank in range(4)] == [(0,), (1,), (2,), (3,)]


def test_every_chunk_is_held_once():
    for layout in LAYOUTS:
        held = [chunk for rank in range(layout.size) for chunk in layout.of(0).chunks(rank)]
        assert sorted(held) == list(range(layout.num_chunks))
        assert {len(layout.of(0).chunks(rank)) for rank in range(layout.size)} == {layout.chunks_per_rank}


def test_zigzag_gives_every_rank_the_same_causal_work():
    for size in range(2, 17):
        layout = SequenceLayout(size=size)
        keys_seen = {sum(chunk + 0.5 for chunk in layout.of(0).chunks(rank)) for rank in range(size)}
        assert keys_seen == {float(2 * size)}


def test_shard_takes_the_rank_s_chunks_in_order():
    for layout in LAYOUTS:
        sequence = torch.arange(3 * layout.num_chunks)
        for rank in range(layout.size):
            expected = [3 * chunk + token for chunk in layout.of(0).chunks(rank) for token in range(3)]
            assert layout.shard(sequence, rank, 0).tolist() == expected


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_restore_inverts_shard_along_any_dim(dim):
    for layout in LAYOUTS:
        shape = [2, 3, 4]
        shape[dim] = 2 * layout.num_chunks
        sequence = torch.randn(shape)
        torch.testing.assert_close(layout.restore(all_shards(layout, sequence, dim), dim), sequence, rtol=0, atol=0)


@pytest.mark.parametrize("size", range(2, 17))
def test_zigzag_shards_in_rank_order_are_not_the_sequence(size):
    # So that a restore which does nothing cannot pass.
    layout = SequenceLayout(size=size)
    sequence = torch.arange(layout.num_chunks)
    assert not torch.equal(all_shards(layout, sequence, 0), sequence)


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize("permutation", [(0, 1, 2, 3), (0, 3, 1, 2), (3, 2, 1, 0)])
def test_shard_is_a_new_contiguous_tensor(kind, permutation):
    sequence = torch.zeros(8, 8, 8, 8).permute(permutation)
    shard = SequenceLayout(size=1 if kind == "contiguous" else 2, kind=kind).shard(sequence, 0, 2)
    shard.fill_(1)
    assert not sequence.any()
    assert shard.is_contiguous()


@pytest.mark.parametrize(
    ("layout", "length", "message"),
    [
        (
            SequenceLayout(size=4),
            12,
            "a sequence of 12 tokens cannot be cut into the 8 equal chunks that the zigzag layout of 4 ranks needs; "
            "pad it to a multiple of 8.",
        ),
        (
            SequenceLayout(size=3, kind="contiguous"),
            10,
            "a sequence of 10 tokens cannot be cut into the 3 equal chunks that the contiguous layout of 3 ranks "
            "needs; pad it to a multiple of 3.",
        ),
    ],
)
def test_length_that_the_chunks_do_not_divide_is_refused(layout, length, message):
    for call in (lambda: layout.shard(torch.zeros(length), 0, 0), lambda: layout.restore(torch.zeros(length), 0)):
        with pytest.raises(ValueError) as refusal:
            call()
        assert str(refusal.value) == message


def test_layout_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SequenceLayout(size=2).size = 4
    with pytest.raises(TypeError, match="positional"):
        SequenceLayout(2)
