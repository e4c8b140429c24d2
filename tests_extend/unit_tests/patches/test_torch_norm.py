"""Torch's norms under sequence parallelism."""

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.fixture
def build_norm(adaptor):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    def build(**options: object) -> object:
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, **options)
        norm = WrappedTorchNorm(config=config, hidden_size=8, eps=1e-6)
        assert config.sequence_parallel == options.get("sequence_parallel", False)
        return norm

    return build


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_weights_are_marked_for_the_reduction_of_their_gradients(adaptor, build_norm, normalization):
    with adaptor.registry.applied():
        norm = build_norm(normalization=normalization, sequence_parallel=True, tensor_model_parallel_size=2)
        assert all(weight.sequence_parallel for weight in norm.parameters())
        assert (norm.eps, type(norm).__name__) == (1e-6, normalization)


def test_norms_without_sequence_parallelism_are_megatrons_own(adaptor, build_norm):
    with adaptor.registry.applied():
        assert not any(hasattr(weight, "sequence_parallel") for weight in build_norm().parameters())


def test_megatron_itself_still_refuses(adaptor, build_norm):
    with pytest.raises(AssertionError, match="sequence parallel not supported"):
        build_norm(sequence_parallel=True, tensor_model_parallel_size=2)
