"""Dropout and largest scores in Megatron's terms: what a layer draws and when, and what of its scores is kept."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.attention import _forward
from mindspeed_cp.patches.dropout import LayerDropout
from mindspeed_cp.patches.layer_attention import LayerAttention
from mindspeed_cp.patches.unsupported import refuse_unwatched_scores
from mindspeed_cp.patching import around

DROPOUT = LayerDropout(rate=0.5, seed=7, layer=1, data_parallel_rank=0, first_head=0)


@pytest.fixture
def tracker(adaptor):
    """Megatron's states of random generators, as they were afterwards."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    before = tracker.get_states()
    yield tracker
    tracker.set_states(before)


def test_a_layer_draws_anew_for_each_micro_batch_and_again_for_its_recomputation(tracker):
    at_first = tracker.get_states()
    first = DROPOUT.draw()
    between = tracker.get_states()
    second = DROPOUT.draw()
    afterwards = tracker.get_states()
    # As checkpoints do; the first one has taken them before the layer had ever drawn.
    for taken, drawn in ((at_first, first), (between, second)):
        tracker.set_states(taken)
        assert DROPOUT.draw() == drawn
    tracker.set_states(afterwards)
    keys = {first.key, second.key, DROPOUT.draw().key}
    # Layers draw apart from each other, and so do data-parallel ranks.
    keys |= {dataclasses.replace(DROPOUT, layer=2).draw().key}
    keys |= {dataclasses.replace(DROPOUT, layer=3, data_parallel_rank=rank).draw().key for rank in (0, 1)}
    assert len(keys) == 6


def test_heads_of_tensor_parallel_ranks_and_samples_of_data_parallel_ranks_are_told_apart(adaptor):
    groups = SimpleNamespace(dp=SimpleNamespace(rank=lambda: 3), tp=SimpleNamespace(rank=lambda: 1))
    made = LayerDropout.of_layer(0.1, 7, 5, 4, groups)
    assert made == LayerDropout(rate=0.1, seed=7, layer=5, data_parallel_rank=3, first_head=4)


def layer(is_training, **changes):
    """A layer of one rank, with Megatron's signature."""
    attention = LayerAttention(build_attention(ContextParallelConfig()), None, "causal", 0.5, **changes)
    return SimpleNamespace(training=is_training, context_parallel_attention=attention, current_max_attn_logits=None)


def forward(self, query, key, value, attention_mask, attention_bias=None, packed_seq_params=None):
    """Megatron's signature."""


attend = around(forward, _forward)


def test_only_training_drops(tracker):
    q, k, v = torch.randn(3, 8, 1, 2, 4, dtype=torch.float64)
    outs = [attend(layer(training, dropout=DROPOUT), q, k, v, None) for training in (True, False)]
    assert torch.equal(outs[1], attend(layer(True), q, k, v, None))
    assert not torch.allclose(outs[0], outs[1])


def test_the_largest_score_of_each_head_is_kept_over_micro_batches_until_it_is_read():
    watched = layer(True, watches_scores=True)
    batches = torch.randn(2, 3, 8, 1, 2, 4, dtype=torch.float64)
    for q, k, v in batches:
        attend(watched, q, k, v, None)
    scores = torch.einsum("nsbhd,ntbhd->nhst", batches[:, 0], batches[:, 1]) * 0.5
    expected = scores.masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(watched.current_max_attn_logits, expected)
    evaluated = layer(False, watches_scores=True)
    attend(evaluated, *batches[0], None)
    assert evaluated.current_max_attn_logits is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bf16": False}, "--qk-clip in fp32: Megatron looks for .*; use --bf16 or --fp16."),
        ({"qk_clip_alpha": 1.0}, "--qk-clip-alpha 1.0 is not between 0 and 1; use 0.5."),
        ({"qk_clip_threshold": 0}, "--qk-clip-threshold 0 is not above 0; use 100."),
    ],
)
def test_what_clip_qk_cannot_take_is_refused(options, message):
    args = {"qk_clip": True, "qk_clip_alpha": 0.5, "qk_clip_threshold": 100, "bf16": True, "fp16": False} | options
    args |= {"tensor_model_parallel_size": 1}
    with pytest.raises(ConfigurationError, match=message):
        refuse_unwatched_scores(SimpleNamespace(transformer_impl="local", **args), ContextParallelConfig())
