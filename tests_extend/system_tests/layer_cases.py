"""A transformer layer of megatron.core, as a program without an argument parser builds it, on many ranks and on few."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.sharding import SequenceLayout
from system_tests.training_cases import forget_run, launched, sabotaged

SEQUENCE, BATCH, HIDDEN, HEADS, QUERY_GROUPS = 32, 2, 64, 8, 4


class LayerDifference(NamedTuple):
    """Largest difference from the layer of CP = 1, as a part of the largest value there."""

    out: float
    input_gradient: float
    weight_gradient: float


def compare_layers(
    world_size: int,
    port: int,
    tensor_parallel: int,
    dtype: torch.dtype,
    flags: dict[str, object],
    sabotage: str | None,
) -> LayerDifference:
    """The local spec's layer on this rank's tokens, against the same weights on all tokens with CP = 1.

    flags: what `megatron_adaptor.configure` is told.
    sabotage: see training_cases.train.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mindspeed_cp import megatron_adaptor

    with launched(world_size, port), sabotaged(sabotage, world_size):
        try:
            dist.init_process_group("gloo")
            config = megatron_adaptor.configure(distributed_backend="gloo", **flags)
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tensor_parallel, context_parallel_size=config.context_parallel_size
            )
            model_parallel_cuda_manual_seed(1)
            layer = _build_layer(tensor_parallel, config.context_parallel_size, dtype)
            reference = _build_layer(tensor_parallel, 1, dtype)
            reference.load_state_dict(layer.state_dict())

            rank = parallel_state.get_context_parallel_rank()
            whole = _Tensors.random(dtype)
            exact_out, exact_gradient = _run(reference, whole)
            out, gradient = _run(layer, whole.shard(config.layout, rank))
            weights = []
            for (name, mine), exact in zip(layer.named_parameters(), reference.parameters(), strict=True):
                assert mine.grad is not None and exact.grad is not None, name
                dist.all_reduce(mine.grad, group=parallel_state.get_context_parallel_group())
                weights.append(_difference(mine.grad, exact.grad))
            return LayerDifference(
                _difference(out, config.layout.shard(exact_out, rank, dim=0)),
                _difference(gradient, config.layout.shard(exact_gradient, rank, dim=0)),
                max(weights),
            )
        finally:
            forget_run()


class _Tensors(NamedTuple):
    """A layer's input and its output's gradient, [S, B, H], and the angles of the rotary embedding, [S, 1, 1, D]."""

    hidden: Tensor
    dout: Tensor
    angles: Tensor

    @classmethod
    def random(cls, dtype: torch.dtype) -> "_Tensors":
        generator = torch.Generator().manual_seed(1)
        hidden, dout = torch.randn(2, SEQUENCE, BATCH, HIDDEN, generator=generator, dtype=dtype)
        half = HIDDEN // HEADS // 2
        angles = torch.outer(torch.arange(SEQUENCE), 10000.0 ** -(torch.arange(half) / half))
        return cls(hidden, dout, torch.cat((angles, angles), dim=1)[:, None, None, :])

    def shard(self, layout: SequenceLayout, rank: int) -> "_Tensors":
        return _Tensors(*(layout.shard(x, rank, dim=0) for x in self))


def _build_layer(tensor_parallel: int, context_parallel: int, dtype: torch.dtype) -> torch.nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=QUERY_GROUPS,
        tensor_model_parallel_size=tensor_parallel,
        context_parallel_size=context_parallel,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        # At the usual initialisation the layer is not sensitive to attention errors.
        init_method_std=0.2,
        params_dtype=dtype,
    )
    # The norms do not ask for params_dtype.
    layer: torch.nn.Module = build_module(get_gpt_layer_local_spec(), config=config, layer_number=1).to(dtype)
    return layer


def _run(layer: torch.nn.Module, tensors: _Tensors) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the input; those of the weights stay with them."""
    hidden = tensors.hidden.clone().requires_grad_()
    out, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=tensors.angles)
    out.backward(tensors.dout)
    assert hidden.grad is not None
    return out.detach(), hidden.grad


def _difference(value: Tensor, exact: Tensor) -> float:
    return ((value - exact).abs().max() / exact.abs().max()).item()
