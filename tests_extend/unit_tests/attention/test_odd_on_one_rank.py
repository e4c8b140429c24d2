"""One rank holds the sequence as it is: no chunks, and any number of tokens."""

import pytest
import torch
import torch.nn.functional as F

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.sharding import SequenceLayout


@pytest.mark.parametrize("layout", [None, SequenceLayout(size=1, kind="zigzag")])
@pytest.mark.parametrize("num_tokens", [1, 67])
def test_attention_takes_any_number_of_tokens(layout, num_tokens):
    attention = build_attention(ContextParallelConfig(), layout=layout)
    q, k, v = torch.randn(3, 1, 2, num_tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (attention(q, k, v) - exact).abs().max() <= 1e-12


def test_layout_gives_and_takes_any_number_of_tokens():
    layout, sequence = SequenceLayout(size=1), torch.arange(67)
    assert torch.equal(layout.shard(sequence, 0, 0), sequence)
    assert torch.equal(layout.restore(sequence, 0), sequence)
    with pytest.raises(ValueError, match="zigzag or contiguous"):
        SequenceLayout(size=1, kind="striped")  # type: ignore[arg-type]
