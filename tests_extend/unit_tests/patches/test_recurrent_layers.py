"""Recurrent layers go over the tokens in order: they put together equal zigzag shards of a sample, and nothing else."""

import argparse

import pytest

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.any_length import refuse_length
from mindspeed_cp.patches.unsupported import refuse_unsupported

CONFIG = ContextParallelConfig(context_parallel_size=4)
HYBRID, ATTENTION = {"hybrid_layer_pattern": "M*-M*-"}, {"hybrid_layer_pattern": "*-*-"}


def test_packed_streams_are_refused_beside_recurrent_layers():
    with pytest.raises(ConfigurationError) as refusal:
        refuse_unsupported(argparse.Namespace(sft=True, **HYBRID), CONFIG)
    assert str(refusal.value) == (
        "--sft with --context-parallel-size 4 and --hybrid-layer-pattern M*-M*-: its recurrent layers take all "
        "documents to be cut in lengths that 2 x CP divides; leave out one of the two."
    )
    for taken in (HYBRID, {"sft": True, **ATTENTION}):
        refuse_unsupported(argparse.Namespace(**taken), CONFIG)


def test_unequal_chunks_are_refused_beside_recurrent_layers():
    sizes = dict(seq_length=60, encoder_seq_length=None, tensor_model_parallel_size=1, sequence_parallel=False)
    refuse_length(argparse.Namespace(**sizes, **ATTENTION, max_position_embeddings=64), CONFIG)
    with pytest.raises(ConfigurationError) as refusal:
        refuse_length(argparse.Namespace(**sizes, **HYBRID, max_position_embeddings=64), CONFIG)
    assert str(refusal.value) == (
        "--seq-length 60 is not a multiple of 2 * --context-parallel-size 4, which --hybrid-layer-pattern with "
        "recurrent layers needs: Megatron puts a sequence together of equal chunks; use 56, 64 or a pattern without M "
        "and G."
    )
