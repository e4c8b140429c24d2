"""A job that cuts nothing but packed streams: a layer that is not told their documents does not take them for one."""

import pytest
import torch

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches.batches import shard_batch
from mindspeed_cp.patches.layer_attention import LayerAttention
from mindspeed_cp.patches.plugin import Plugin

SAMPLE = {"tokens": torch.arange(8)[None]}
STREAM = SAMPLE | {"cu_seqlens": torch.tensor([0, 5, 8])}


def layer(plugin):
    attention = build_attention(ContextParallelConfig())
    return LayerAttention(attention, None, "causal", 0.5, cuts_streams_alone=plugin.cuts_streams_alone)


def test_a_layer_that_is_not_told_the_documents_of_a_stream_refuses(monkeypatch):
    monkeypatch.setattr(Plugin, "place", (0, 2))
    plugin, q = Plugin(), torch.randn(4, 1, 2, 4)
    shard_batch(plugin, STREAM)
    with pytest.raises(ValueError, match=r"^a packed stream was cut, and this layer was not told where documents end"):
        layer(plugin)(q, q, q, None)
    # A job that has samples too may mean one of these.
    shard_batch(plugin, SAMPLE)
    assert layer(plugin)(q, q, q, None).shape == (4, 1, 8)
