"""A layer's attention in Megatron's terms: shapes, the polarity of its mask, and what it refuses."""

from enum import Enum
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches.attention import _attention_alone, _forward, _window
from mindspeed_cp.patches.layer_attention import LayerAttention
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import around
from unit_tests.dense import causal_mask, dense_attention


class MaskType(Enum):
    """Names as in Megatron's AttnMaskType, which tests without Megatron cannot import."""

    causal = 1
    no_mask = 2


class Layer:
    """A layer with the signature of Megatron's, whose own attention answers by name."""

    training = True

    def __init__(self, attention: LayerAttention | None) -> None:
        self.context_parallel_attention = attention

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        return "Megatron's own"


Layer.forward = around(Layer.forward, _forward)


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [S, B, N, D], key and value [S, B, G, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 2, 4, 8), (6, 2, 2, 8), (6, 2, 2, 8))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def layer(*, uses_mask: bool = False) -> Layer:
    causal, general = (
        build_attention(ContextParallelConfig(attention_mask_type=kind)) for kind in ("causal", "general")
    )
    return Layer(LayerAttention(causal, general if uses_mask else None, mask_type="causal", scale=0.3))


@pytest.mark.parametrize("uses_mask", [False, True])
def test_layer_attends_as_dense_attention_with_megatrons_shapes_and_mask(uses_mask):
    q, k, v = tensors()
    # True is masked, as Megatron has it.
    masked = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    out = layer(uses_mask=uses_mask).forward(q, k, v, masked, attn_mask_type=MaskType.causal)
    dense = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    visible = ~masked if uses_mask else causal_mask(6)
    exact = dense_attention(*dense, torch.zeros_like(dense[0]), visible=visible, scale=0.3).out
    torch.testing.assert_close(out, exact.permute(2, 0, 1, 3).flatten(2), rtol=0, atol=1e-12)
    assert out.is_contiguous()


def test_layer_takes_expanded_keys_and_values_of_another_head_size():
    q, k, _ = tensors()
    one_head, values = k[:, :, :1], torch.randn(2, 6, 2, 5, generator=torch.Generator().manual_seed(2)).double()
    out = layer().forward(q, one_head.expand(-1, -1, 2, -1), values.transpose(0, 1), None)
    dense = [x.permute(1, 2, 0, 3) for x in (q, one_head.repeat(1, 1, 2, 1), values.transpose(0, 1).contiguous())]
    exact = dense_attention(*dense, torch.zeros(2, 4, 6, 5).double(), visible=causal_mask(6), scale=0.3).out
    torch.testing.assert_close(out, exact.permute(2, 0, 1, 3).flatten(2), rtol=0, atol=1e-12)


def test_layer_without_context_parallelism_is_megatrons_own():
    assert Layer(None).forward(*tensors(), None) == "Megatron's own"


def test_layer_without_context_parallelism_makes_an_attention_of_packed_streams_once():
    config = SimpleNamespace(apply_query_key_layer_scaling=False, attention_dropout=0.0)
    alone = SimpleNamespace(config=config, attn_mask_type=MaskType.causal, softmax_scale=0.3, layer_number=1)
    alone.attention_dropout = SimpleNamespace(p=0.0)
    first, again = _attention_alone(Plugin(), alone), _attention_alone(Plugin(), alone)
    assert again is first and (first.size, first.scale) == (1, 0.3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_bias": torch.zeros(1)}, "nothing of Megatron's says which of its rows"),
        ({"attn_mask_type": MaskType.no_mask}, "a layer with the mask type no_mask"),
    ],
)
def test_layer_refuses_what_it_cannot_honour(given, message):
    with pytest.raises(ValueError, match=message):
        layer().forward(*tensors(), None, **given)


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_window_is_megatrons_in_the_layers_that_have_one():
    config = SimpleNamespace(window_size=(8, 0), window_attn_skip_freq=2)
    assert [_window(config, {"layer_number": number}) for number in (1, 2, 3)] == [(8, 0), (-1, 0), (8, 0)]


def test_layer_refuses_inference():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="1 queries over 6 keys a rank: inference"):
        layer().forward(q[:1], k, v, None)
