"""Bins of Megatron's reinforcement learning, attended to over context-parallel ranks; and its sequences one by one.

The bins are made by megatron.rl.sequence_packing_utils itself, which is in a checkout alone.
"""

import json
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

LENGTHS = (5, 17, 9, 30, 12, 3, 22, 8, 1)
BIN_SIZE, MOST_IN_A_BIN, PAD, VOCABULARY = 48, 4, 0, 64


class Learned(NamedTuple):
    """Sum of the losses of what was generated, and the norm of its gradient."""

    loss: float
    gradient_norm: float


def print_learned(flags: dict[str, Any], planted: bool = False) -> None:
    """Print what this rank has Learned, a line of JSON. flags: of this plugin; with CP = 1 it leaves attention alone.

    planted: whether the first boundary of every bin is a token late.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from mindspeed_cp import megatron_adaptor

    dist.init_process_group("gloo")
    size = megatron_adaptor.configure(distributed_backend="gloo", **flags).context_parallel_size
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        context_parallel_size=size,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        init_method_std=0.2,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, BIN_SIZE, position_embedding_type="rope")
    sequences, generated = _trajectories()
    total = torch.zeros(())
    if size == 1:
        for tokens, mask, length in zip(sequences, generated, LENGTHS, strict=True):
            total = total + _loss(model, _batch(tokens[None, :length], mask[None, :length].float()), None)
    else:
        for batch, packed in _bins(sequences, generated, planted):
            total = total + _loss(model, megatron_adaptor.shard_batch(batch), packed)
    total.backward()
    loss = total.detach()
    for each in (loss, *(x.grad for x in model.parameters() if x.grad is not None)):
        dist.all_reduce(each)
    squares = sum(float(x.grad.double().square().sum()) for x in model.parameters() if x.grad is not None)
    print(json.dumps(Learned(loss.item(), squares**0.5)))


def _trajectories() -> tuple[Tensor, Tensor]:
    """Sequences [n, S] that pads fill up, and which of their tokens were generated: what a rollout gives."""
    places = torch.arange(max(LENGTHS))
    lengths = torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(1, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(2))
    return tokens.where(places < lengths, PAD), (places >= (lengths // 3).clamp(min=1)) & (places < lengths)


def _bins(sequences: Tensor, generated: Tensor, planted: bool) -> list[tuple[dict[str, Tensor], Any]]:
    """Megatron's bins: each a batch [1, BIN_SIZE], and where its sequences end."""
    from megatron.rl.sequence_packing_utils import SequencePacker, create_packed_seq_params_for_bin

    packer = SequencePacker(BIN_SIZE, PAD, MOST_IN_A_BIN)
    tokens, position_ids, loss_mask, info = packer.pack_sequences(sequences, generated)
    bins = []
    for number in range(len(tokens)):
        packed = create_packed_seq_params_for_bin(info, number, BIN_SIZE, MOST_IN_A_BIN, tokens.device)
        if planted:
            packed.cu_seqlens_q[1] += 1  # The keys' is the same tensor.
        batch = _batch(tokens[number : number + 1], loss_mask[number : number + 1])
        batch |= {"position_ids": position_ids[number : number + 1], "cu_seqlens": packed.cu_seqlens_q}
        bins.append((batch, packed))
    assert len(bins) > 1
    return bins


def _batch(tokens: Tensor, generated: Tensor) -> dict[str, Tensor]:
    """As the loop takes it: a token is learned where the one after it was generated.

    The first token of a sequence is given, not generated, so that none is learned across a boundary.
    """
    after = torch.cat([generated[:, 1:], torch.zeros_like(generated[:, :1])], dim=1)
    labels = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": after,
        "position_ids": torch.arange(tokens.size(1))[None],
    }


def _loss(model: torch.nn.Module, batch: dict[str, Tensor], packed: Any) -> Tensor:
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
    return (losses * batch["loss_mask"]).sum()
