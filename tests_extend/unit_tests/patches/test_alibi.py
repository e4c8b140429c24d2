"""ALiBi through Megatron: the slopes of a layer's heads, and that its scores fall by them."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.kernels.bias import geometric_slopes
from mindspeed_cp.patches.attention import _slopes
from mindspeed_cp.patches.layer_attention import LayerAttention


@pytest.mark.parametrize(
    ("num_heads", "slopes"),
    [
        (1, [1 / 256]),
        (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
        (6, [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]),
    ],
)
def test_slopes_are_those_of_the_paper_for_any_number_of_heads(num_heads, slopes):
    assert geometric_slopes(num_heads) == pytest.approx(slopes, abs=1e-15)


def test_a_tensor_parallel_rank_has_the_slopes_of_its_own_heads():
    groups = SimpleNamespace(tp=SimpleNamespace(rank=lambda: 1, size=lambda: 2))
    assert _slopes(SimpleNamespace(num_attention_heads=6), groups) == tuple(geometric_slopes(6)[3:])


def test_scores_of_a_layer_fall_by_its_slopes():
    attention = build_attention(ContextParallelConfig(use_alibi=True))
    layer = LayerAttention(attention, None, "causal", 0.5, slopes=(0.5, 0.25))
    query, key, value = torch.randn(3, 8, 2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    places = torch.arange(8)
    distance = (places[:, None] - places[None, :]).double()
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * 0.5
    scores -= torch.tensor([0.5, 0.25], dtype=torch.float64)[:, None, None] * distance
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("bnst,tbnd->sbnd", weights, value).flatten(2)
    torch.testing.assert_close(layer(query, key, value, None), expected, rtol=0, atol=1e-12)
