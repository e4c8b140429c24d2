"""Attention within one rank: what it refuses."""

import pytest
import torch

from mindspeed_cp.attention import local_attention


def test_a_causal_local_attention_refuses_a_mask_and_a_full_one_takes_it():
    q, visible = torch.randn(1, 2, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="a causal attention takes no mask tensor"):
        local_attention(causal=True)(q, q, q, visible=visible)
    out = local_attention(causal=False)(q, q, q, visible=visible)
    torch.testing.assert_close(out, local_attention(causal=True)(q, q, q))
