"""Lengths that 2 x CP does not divide: what is refused, and what Megatron's own rules are shown."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.layouts import Zigzag
from mindspeed_cp.patches.any_length import any_length_patches, cut_unequal, equal_lengths, refuse_length
from mindspeed_cp.patches.packing import PaddingCount
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.sharding import shard

CONFIG = ContextParallelConfig(context_parallel_size=4)


def arguments(**options: object) -> argparse.Namespace:
    given = dict(
        seq_length=61,
        encoder_seq_length=None,
        tensor_model_parallel_size=1,
        sequence_parallel=False,
        max_position_embeddings=64,
    )
    return argparse.Namespace(**{**given, **options})


@pytest.mark.parametrize(
    "options",
    [{}, dict(seq_length=64, sft=True), dict(seq_length=60, tensor_model_parallel_size=3, sequence_parallel=True)],
)
def test_lengths_that_the_ranks_can_share_are_taken(options):
    refuse_length(arguments(**options), CONFIG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seq_length=3), "--seq-length 3 is below --context-parallel-size 4; use 4 or more."),
        (
            dict(tensor_model_parallel_size=3, sequence_parallel=True),
            "--seq-length 61 is not a multiple of --context-parallel-size 4 * --tensor-model-parallel-size 3 = 12, "
            "which --sequence-parallel needs; use 60 or 72.",
        ),
        (
            dict(max_position_embeddings=60),
            "--max-position-embeddings 60 is below --seq-length 61; use 61 or more.",
        ),
    ],
)
def test_others_are_refused(options, message):
    with pytest.raises(ConfigurationError) as refusal:
        refuse_length(arguments(**options), CONFIG)
    assert str(refusal.value) == message


def test_megatrons_rules_see_a_length_that_they_take_and_the_job_the_one_that_was_given():
    args = arguments()
    with equal_lengths(args, CONFIG):
        assert args.seq_length == 56
        args.encoder_seq_length = args.seq_length
    assert (args.seq_length, args.encoder_seq_length) == (61, 61)


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr(Plugin, "place", (1, 4))
    return Plugin(length=61)


def test_batches_are_cut_as_a_zigzag_of_chunks_that_differ_by_a_token(plugin):
    tokens = torch.arange(61).expand(2, -1)
    batch = {"tokens": tokens, "labels": None, "attention_mask": torch.zeros(1, 1, 61, 61)}
    assert cut_unequal(plugin, batch)
    assert torch.equal(batch["tokens"], shard(tokens, Zigzag(4, ((61,),)), 1, 1))
    assert (batch["tokens"].size(1), batch["attention_mask"].shape) == (15, (1, 1, 15, 61))
    assert not cut_unequal(Plugin(), {"tokens": tokens})


def test_embeddings_and_stages_are_those_of_this_ranks_tokens(plugin):
    patches = {patch.target.rpartition(".")[2].rpartition(":")[2]: patch for patch in any_length_patches(plugin)}
    embeddings = torch.arange(61.0)[:, None]

    def cut(pos_emb, seq_dim, cp_group):
        raise AssertionError("cut by equal views")

    group = SimpleNamespace(rank=lambda: 1, size=lambda: 4)
    found = patches["get_pos_emb_on_this_cp_rank"].in_place_of(cut)(embeddings, 0, group)
    assert torch.equal(found, shard(embeddings, Zigzag(4, ((61,),)), 1, 0))

    def schedule(seq_length):
        return seq_length // 4

    assert patches["forward_backward_pipelining_without_interleaving"].in_place_of(schedule)(61) == 15
    assert patches["forward_backward_pipelining_with_interleaving"].in_place_of(schedule)(64) == 16


@pytest.mark.parametrize(("length", "shape"), [(64, (32, 1)), (61, (31, 1))])
def test_stages_exchange_the_samples_of_packed_data_as_the_one_stream_that_they_are(monkeypatch, length, shape):
    monkeypatch.setattr(Plugin, "place", (1, 4))
    patches = any_length_patches(Plugin(padding=PaddingCount(1)))

    def schedule(seq_length, micro_batch_size):
        return seq_length // 4, micro_batch_size

    for patch in patches:
        if "forward_backward" in patch.target:
            assert patch.in_place_of(schedule)(length, 2) == shape
