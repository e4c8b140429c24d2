"""Train a GPT on megatron.core alone, without Megatron's argument parser: the pattern for frameworks built on it.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 scripts/train_with_megatron_core.py

Three things make it context parallel: `configure` before `initialize_model_parallel`, which is given the same size;
`context_parallel_size` in the TransformerConfig; and each rank's shard of every batch. The rest is as without it. CP,
ALGORITHM and ITERS come from the environment; whatever is left of the ranks is data parallel. Without an accelerator it
trains on the CPU, over gloo.
"""

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from mindspeed_cp import megatron_adaptor
from mindspeed_cp.device import accelerator

SEQ_LENGTH, BATCH, VOCABULARY = 64, 2, 128


def build_model(context_parallel_size: int) -> DistributedDataParallel:
    """A small GPT whose gradients are summed over the data- and context-parallel ranks."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=8,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.2,  # At the usual one so small a model is not sensitive to attention errors.
        context_parallel_size=context_parallel_size,
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQ_LENGTH, position_embedding_type="rope")
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model.cuda())


def main() -> None:
    """Train on random tokens and print the loss of each iteration."""
    backend = {"cuda": "nccl", "npu": "hccl", None: "gloo"}[accelerator()]
    dist.init_process_group(backend)
    size = int(os.environ.get("CP", dist.get_world_size()))
    cp_config = megatron_adaptor.configure(
        distributed_backend=backend,
        context_parallel_size=size,
        context_parallel_algo=os.environ.get("ALGORITHM", "megatron_cp_algo"),
    )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    model_parallel_cuda_manual_seed(1)
    model = build_model(size)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.0), [model])

    tokens_of = torch.Generator().manual_seed(1 + parallel_state.get_data_parallel_rank())
    rank = parallel_state.get_context_parallel_rank()
    everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for iteration in range(1, int(os.environ.get("ITERS", "10")) + 1):
        text = torch.randint(VOCABULARY, (BATCH, SEQ_LENGTH + 1), generator=tokens_of).cuda()
        positions = torch.arange(SEQ_LENGTH).expand(BATCH, -1).cuda()
        whole = (text[:, :-1], positions, text[:, 1:])
        inputs, positions, labels = (cp_config.layout.shard(x, rank, dim=1) for x in whole)

        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = model(inputs, positions, None, labels=labels)  # [B, S], one for each of this rank's tokens
        losses.sum().backward()
        finalize_model_grads([model], torch.tensor(losses.numel()).cuda())  # Divides by the tokens of all ranks.
        optimizer.step()

        total = torch.stack([losses.detach().sum(), torch.tensor(float(losses.numel())).cuda()])
        dist.all_reduce(total, group=everyone)
        if dist.get_rank() == 0:
            print(f"iteration {iteration:3d}  loss {total[0] / total[1]:.6f}", flush=True)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
