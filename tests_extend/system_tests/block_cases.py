"""Blocks of megatron.core's layers on many ranks: what they send in each pass, and their gradients beside CP = 1."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.comm import ProcessGroupCommunicator
from system_tests.training_cases import forget_run, launched

SEQUENCE, HIDDEN, HEADS = 16, 32, 4
LAYERS = 3
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LATENT = {
    "multi_latent_attention": True,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
}


class BlockRun(NamedTuple):
    """What a rank of a block has sent in its passes, agreements included, and what is kept after them.

    difference: of its output and its parameters' gradients from CP = 1, as a part of the largest value there.
    """

    forward: int
    backward: int
    left: int
    difference: float


def run_blocks(
    world_size: int,
    port: int,
    tensor_parallel: int,
    variants: list[tuple[dict[str, object], dict[str, object]]],
) -> list[BlockRun]:
    """A block of these ranks for each variant: what `configure` is told beside the size, and fields of the layers."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mindspeed_cp import megatron_adaptor

    size = world_size // tensor_parallel
    with launched(world_size, port):
        try:
            dist.init_process_group("gloo")
            found, started = [], False
            for flags, fields in variants:
                config = megatron_adaptor.configure(distributed_backend="gloo", context_parallel_size=size, **flags)
                if not started:
                    parallel_state.initialize_model_parallel(tensor_parallel, context_parallel_size=size)
                    model_parallel_cuda_manual_seed(1)
                    started = True
                parallel = {"tensor_model_parallel_size": tensor_parallel, **fields}
                block, alone = (_build(context_parallel_size=each, **parallel) for each in (size, 1))
                alone.load_state_dict(block.state_dict())
                whole = torch.randn(2, SEQUENCE, 1, HIDDEN, generator=torch.Generator().manual_seed(1)).double()
                mine = [config.layout.shard(x, parallel_state.get_context_parallel_rank(), dim=0) for x in whole]
                with sent() as forward:
                    out = block(mine[0].requires_grad_(), None)
                with sent() as backward:
                    out.backward(mine[1])
                exact = alone(whole[0], None)
                exact.backward(whole[1])
                own = config.layout.shard(exact.detach(), parallel_state.get_context_parallel_rank(), dim=0)
                differences = [_difference(out.detach(), own)]
                for each, reference in zip(block.parameters(), alone.parameters(), strict=True):
                    if reference.grad is not None and each.grad is not None:
                        dist.all_reduce(each.grad, group=parallel_state.get_context_parallel_group())
                        differences.append(_difference(each.grad, reference.grad))
                left = megatron_adaptor.plugin.recomputation.nbytes
                found.append(BlockRun(sum(forward), sum(backward), left, max(differences)))
            return found
        finally:
            forget_run()


def _build(**fields: Any) -> torch.nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    latent = fields.get("multi_latent_attention", False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if fields["context_parallel_size"] == 1:
        groups.cp, _ = dist.new_subgroups(1)  # By their size latent attention cuts its rotary embedding.
    config = (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        init_method_std=0.2,
        params_dtype=torch.float64,
        **fields,
    )
    spec = get_gpt_layer_local_spec(multi_latent_attention=latent)
    block: torch.nn.Module = TransformerBlock(config, spec, pg_collection=groups).to(torch.float64)
    return block


@contextmanager
def sent() -> Iterator[list[int]]:
    """Bytes of each message of ours that leaves this rank meanwhile."""
    post, found = ProcessGroupCommunicator._post, list[int]()

    def counted(communicator: Any, messages: Any) -> Any:
        found.extend(each.content.nbytes for each in messages if each.way is dist.isend)
        return post(communicator, messages)

    with mock.patch.object(ProcessGroupCommunicator, "_post", counted):
        yield found


def _difference(value: Tensor, exact: Tensor) -> float:
    return ((value - exact).abs().max() / exact.abs().max()).item()
