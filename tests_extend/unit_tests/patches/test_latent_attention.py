"""Multi-latent attention: the head sizes that its layers give to classes that know one, and what becomes of them."""

import copy
import functools
import math
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches import attention
from mindspeed_cp.patches.latent_attention import HeadSizes, take_head_sizes
from mindspeed_cp.patches.packing import Packing
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import around

CAUSAL = SimpleNamespace(name="causal")


class OneHeadSize:
    """A core attention as the local layer spec has it; it keeps what it was shown."""

    def __init__(
        self,
        config,
        softmax_scale=None,
        pg_collection=None,
        attn_mask_type=CAUSAL,
        attention_type="self",
        attention_dropout=0.0,
    ):
        self.config, self.shown = config, copy.copy(config)
        self.scale, self.pg_collection = softmax_scale, pg_collection


class TwoHeadSizes(OneHeadSize):
    """A core attention as TransformerEngine's layer spec has it."""

    def __init__(
        self,
        config,
        softmax_scale=None,
        k_channels=None,
        v_channels=None,
        pg_collection=None,
        attn_mask_type=CAUSAL,
        attention_type="self",
        attention_dropout=0.0,
    ):
        super().__init__(config, softmax_scale, pg_collection)
        self.head_sizes = k_channels, v_channels


def build(kind, **arguments):
    """A layer of the class `kind`, constructed through the wrapper, which leaves the configuration as it was."""
    config = SimpleNamespace(context_parallel_size=1, kv_channels=8)
    layer = kind.__new__(kind)
    around(kind.__init__, functools.partial(attention._init, Plugin()))(layer, config, **arguments)
    assert layer.config is config
    assert config == SimpleNamespace(context_parallel_size=1, kv_channels=8)
    return layer


@pytest.mark.parametrize(
    ("given", "width", "scale"),
    [
        ({"k_channels": 16, "v_channels": 12, "softmax_scale": 0.3}, 12, 0.3),
        ({"k_channels": 16, "v_channels": 12}, 12, 0.25),
        ({"k_channels": 16, "v_channels": None}, 8, 0.25),
        ({"v_channels": 12}, 12, 1 / math.sqrt(8)),
        ({}, 8, None),
    ],
)
def test_class_of_one_head_size_is_as_wide_as_the_values_and_scales_by_the_keys(given, width, scale):
    layer = build(OneHeadSize, pg_collection="groups", **given)
    assert (layer.shown.kv_channels, layer.scale, layer.pg_collection) == (width, scale, "groups")


def test_class_of_two_head_sizes_is_given_both():
    layer = build(TwoHeadSizes, k_channels=16, v_channels=12)
    assert (layer.head_sizes, layer.scale) == ((16, 12), None)


@pytest.mark.parametrize("kind", [OneHeadSize, TwoHeadSizes])
@pytest.mark.parametrize(("given", "scale"), [({"softmax_scale": 0.3}, 0.3), ({}, 0.25)])
def test_context_parallel_layer_scales_by_the_keys_too(monkeypatch, kind, given, scale):
    monkeypatch.setattr(attention, "build_attention", lambda config, groups, **options: groups)
    plugin = SimpleNamespace(
        packing=Packing(),
        apart_by=None,
        cuts_streams_alone=lambda: False,
        was_cut_as_samples=lambda: False,
        length=None,
        dynamic=None,
        config=ContextParallelConfig(context_parallel_size=2),
        groups_over=lambda group: f"attention over {group}",
    )
    config = SimpleNamespace(
        context_parallel_size=2,
        kv_channels=8,
        num_attention_heads=4,
        num_query_groups=4,
        tensor_model_parallel_size=1,
    )
    layer, groups = kind.__new__(kind), SimpleNamespace(cp="ranks")
    build_layer = around(kind.__init__, functools.partial(attention._init, plugin))
    build_layer(layer, config, pg_collection=groups, k_channels=16, v_channels=12, **given)
    expected = attention.LayerAttention(
        *("attention over ranks", None),
        mask_type="causal",
        scale=scale,
        cuts_streams_alone=plugin.cuts_streams_alone,
        was_cut_as_samples=plugin.was_cut_as_samples,
    )
    assert layer.context_parallel_attention == expected
    assert (layer.config, layer.shown.context_parallel_size, config.context_parallel_size) == (config, 1, 2)


def test_any_other_keyword_is_an_error_still():
    with pytest.raises(TypeError, match="q_channels"):
        build(OneHeadSize, k_channels=16, q_channels=16)


def test_head_sizes_are_taken_from_the_keywords_and_from_nothing_else():
    keywords = {"config": None, "k_channels": 16, "v_channels": 12}
    assert take_head_sizes(OneHeadSize.__init__, keywords) == HeadSizes(16, 12)
    assert keywords == {"config": None}
    assert take_head_sizes(OneHeadSize.__init__, keywords) is None


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatrons_class_is_as_wide_as_the_values_and_scales_by_the_keys(adaptor):
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, masked_softmax_fusion=False)
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 2))
    given = dict(config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    with adaptor.registry.applied():
        layer = DotProductAttention(**given, pg_collection=groups, k_channels=16, v_channels=12)
    assert (layer.hidden_size_per_partition, layer.softmax_scale) == (2 * 12, 0.25)
    assert (layer.config, config.kv_channels) == (config, 16)


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_layers_can_be_asked_whether_they_are_transformer_engines(adaptor):
    from megatron.core.transformer import multi_latent_attention

    with adaptor.registry.applied():
        # Megatron asks where it has the engine, and 0.16 thinks so in any case.
        assert not multi_latent_attention.HAVE_TE or not isinstance(object(), multi_latent_attention.TELinear)
