"""Core attentions of megatron.core that are given a mask or none, on many ranks and on one."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.sharding import SequenceLayout
from system_tests.training_cases import forget_run, launched

SEQUENCE, BATCH, HEADS, HEAD_SIZE = 16, 2, 4, 8


def compare_masks(world_size: int, port: int, flags: dict[str, object], mask_types: list[str]) -> dict[str, float]:
    """Largest difference of a layer's output from that of CP = 1, without a mask by mask type, and "given" one."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mindspeed_cp import megatron_adaptor

    with launched(world_size, port):
        try:
            dist.init_process_group("gloo")
            config = megatron_adaptor.configure(
                distributed_backend="gloo", attention_mask_type="general", context_parallel_size=world_size, **flags
            )
            parallel_state.initialize_model_parallel(context_parallel_size=world_size)
            model_parallel_cuda_manual_seed(1)
            generator = torch.Generator().manual_seed(1)
            whole = list(torch.randn(3, SEQUENCE, BATCH, HEADS, HEAD_SIZE, generator=generator).unbind())
            masked = torch.rand(BATCH, 1, SEQUENCE, SEQUENCE, generator=generator) < 0.3
            differences = {kind: _difference(kind, whole, None, config.layout) for kind in mask_types}
            return differences | {"given": _difference("causal", whole, masked, config.layout)}
        finally:
            forget_run()


def _difference(mask_type: str, whole: list[Tensor], masked: Tensor | None, layout: SequenceLayout) -> float:
    rank = dist.get_rank()
    exact = layout.shard(_attention(mask_type, 1)(*whole, masked), rank, dim=0)
    mine = None if masked is None else layout.shard(masked, rank, dim=2)
    out = _attention(mask_type, layout.size)(*(layout.shard(x, rank, dim=0) for x in whole), mine)
    return (out - exact).abs().max().item()


def _attention(mask_type: str, context_parallel_size: int) -> Any:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        context_parallel_size=context_parallel_size,
    )
    return DotProductAttention(config, 1, AttnMaskType[mask_type], "self")
