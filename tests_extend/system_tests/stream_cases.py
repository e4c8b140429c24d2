"""A program on megatron.core that trains a small GPT on packed streams of its own, by PackedSeqParams."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from system_tests.training_cases import forget_run, launched, sabotaged

TOKENS, VOCABULARY, STEPS = 48, 61, 3
LENGTHS = ((17, 9, 6), (5, 11, 3, 7), (29,))
"""Of the documents of each stream, which padding brings to TOKENS."""


class Step(NamedTuple):
    """Of all ranks: the mean loss of the counted tokens, and the norm of its gradient."""

    loss: float
    gradient_norm: float


class Stream(NamedTuple):
    """Documents one after another: tokens, labels, loss_mask and position_ids [1, T]; cu_seqlens as PackedSeqParams
    has them. longest: what the program says of them."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    cu_seqlens_padded: Tensor | None
    longest: int


def train(world_size: int, port: int, kind: str, flags: dict[str, object], sabotage: str | None = None) -> list[Step]:
    """Some steps of plain gradient descent as one rank of `world_size`, all of which share each stream.

    kind: of streams, a key of STREAMS. flags: what `megatron_adaptor.configure` is told. sabotage: see
    training_cases.log_of_training.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mindspeed_cp import megatron_adaptor

    with launched(world_size, port), sabotaged(sabotage, world_size):
        try:
            dist.init_process_group("gloo")
            megatron_adaptor.configure(distributed_backend="gloo", context_parallel_size=world_size, **flags)
            parallel_state.initialize_model_parallel(context_parallel_size=world_size)
            model_parallel_cuda_manual_seed(1)
            model = _build_model(world_size)
            streams = STREAMS[kind]()
            return [_step(model, next(streams)) for _ in range(STEPS)]
        finally:
            forget_run()


def _step(model: torch.nn.Module, stream: Stream) -> Step:
    from megatron.core.packed_seq_params import PackedSeqParams

    from mindspeed_cp import megatron_adaptor

    ends, padded = stream.cu_seqlens, stream.cu_seqlens_padded
    packed = PackedSeqParams("thd", ends, ends, padded, padded, stream.longest, stream.longest)
    mine = megatron_adaptor.shard_batch(
        {name: getattr(stream, name) for name in ("tokens", "labels", "loss_mask", "position_ids")}
        | {"cu_seqlens": ends, "cu_seqlens_padded": padded}
    )
    losses = model(mine["tokens"], mine["position_ids"], None, labels=mine["labels"], packed_seq_params=packed)
    total, counted = (losses * mine["loss_mask"]).sum(), mine["loss_mask"].sum()
    dist.all_reduce(counted)
    model.zero_grad()
    (total / counted).backward()
    loss, squares = total.detach() / counted, torch.zeros(())
    dist.all_reduce(loss)
    with torch.no_grad():
        for weight in model.parameters():
            assert weight.grad is not None
            dist.all_reduce(weight.grad)
            squares += weight.grad.square().sum()
            weight -= 0.1 * weight.grad
    return Step(loss.item(), squares.sqrt().item())


def _build_model(context_parallel_size: int) -> torch.nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        context_parallel_size=context_parallel_size,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        # At the usual initialisation the model is not sensitive to attention errors.
        init_method_std=0.2,
    )
    torch.manual_seed(1)
    return GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, TOKENS, position_embedding_type="rope")


def _documents(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    lengths = LENGTHS[number % len(LENGTHS)]
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def _padded_streams() -> Iterator[Stream]:
    """Each document is padded to a multiple of 8, the last to the end; max_seqlen counts what is no padding alone."""
    for number in range(STEPS):
        documents, rows = _documents(number), []
        ends, padded = [0], [0]
        for document in documents:
            ends.append(ends[-1] + len(document))
            padded.append(padded[-1] + -(-len(document) // 8) * 8)
        padded[-1] = TOKENS
        for document, start, stop in zip(documents, padded, padded[1:], strict=False):
            rows.append(_row(document, stop - start))
        yield Stream(
            *(torch.cat(parts)[None] for parts in zip(*rows, strict=True)),
            torch.tensor(ends, dtype=torch.int32),
            torch.tensor(padded, dtype=torch.int32),
            max(map(len, documents)),
        )


def _row(document: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, their weights and positions of one document and what pads it."""
    tokens = torch.zeros(length, dtype=torch.int64)
    tokens[: len(document)] = document
    weights = torch.zeros(length)
    weights[: len(document) - 1] = 1.0
    return tokens, tokens.roll(-1), weights, torch.arange(length)


def _bins() -> Iterator[Stream]:
    """Bins of Megatron's loop of reinforcement learning, of its own packer: of one length, with documents of no tokens
    at the end, and a max_seqlen that is the bin's."""
    from megatron.rl.sequence_packing_utils import SequencePacker, create_packed_seq_params_for_bin

    pad, most = 0, 6
    documents = [document for number in range(STEPS) for document in _documents(number)]
    trajectories = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=pad)
    tokens, position_ids, loss_mask, info = SequencePacker(TOKENS, pad, most).pack_sequences(trajectories)
    for number in range(STEPS):
        params = create_packed_seq_params_for_bin(info, number % len(tokens), TOKENS, most, tokens.device)
        row = slice(number % len(tokens), number % len(tokens) + 1)
        weights = loss_mask[row].clone()
        # The last of a document has nothing to predict.
        weights[0, params.cu_seqlens_q[1:-1].clamp(max=TOKENS) - 1] = 0.0
        labels = tokens[row].roll(-1, dims=1)
        yield Stream(tokens[row], labels, weights, position_ids[row], params.cu_seqlens_q, None, params.max_seqlen_q)


STREAMS = {"padded": _padded_streams, "bins": _bins}
"""By name, a stream for each step."""
