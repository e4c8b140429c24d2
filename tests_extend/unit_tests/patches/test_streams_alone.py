"""How a batch was cut, and what comes with it: no layer takes a stream for a document, nor samples for a stream."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches.batches import shard_batch
from mindspeed_cp.patches.layer_attention import LayerAttention
from mindspeed_cp.patches.packing import Packing
from mindspeed_cp.patches.plugin import Plugin
from unit_tests.patches.test_packing import packed

SAMPLE = {"tokens": torch.arange(8)[None]}
STREAM = SAMPLE | {"cu_seqlens": torch.tensor([0, 5, 8])}


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr(Plugin, "place", (0, 2))
    return Plugin()


def layer(plugin):
    attention = build_attention(ContextParallelConfig())
    watched = {name: getattr(plugin, name) for name in ("cuts_streams_alone", "was_cut_as_samples")}
    return LayerAttention(attention, None, "causal", 0.5, **watched)


def test_a_layer_that_is_not_told_the_documents_of_a_stream_refuses(plugin):
    q = torch.randn(4, 1, 2, 4)
    shard_batch(plugin, STREAM)
    with pytest.raises(ValueError, match=r"^a packed stream was cut, and this layer was not told where documents end"):
        layer(plugin)(q, q, q, None)
    # A job that has samples too may mean one of these.
    shard_batch(plugin, SAMPLE)
    assert layer(plugin)(q, q, q, None).shape == (4, 1, 8)


def plan(plugin, cu_seqlens, layout="zigzag_by_document"):
    """What the first of two ranks computes by."""
    first = replace(layer(plugin), packing=Packing(layout))
    with mock.patch.object(LayerAttention, "size", 2):
        return first._plan_of_stream(torch.empty(4, 2, 4), packed(cu_seqlens), (-1, 0))


def test_documents_that_come_with_a_batch_that_was_cut_as_samples_are_refused(plugin):
    shard_batch(plugin, SAMPLE)
    with pytest.raises(ValueError, match=r"^PackedSeqParams of a batch that was cut as samples: .*shard_batch"):
        plan(plugin, [0, 5, 8])
    # One document, with what fills it up, is cut as a sample is, but for one of the layouts.
    plan(plugin, [0, 8, 8])
    with pytest.raises(ValueError, match="cut as samples"):
        plan(plugin, [0, 8], layout="balanced")
    shard_batch(plugin, STREAM)
    plan(plugin, [0, 5, 8])


def test_how_the_batch_of_another_micro_batch_was_cut_says_nothing(plugin):
    shard_batch(plugin, SAMPLE)
    with plugin.one_micro_batch():
        plan(plugin, [0, 5, 8])
