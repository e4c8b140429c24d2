"""Training on packed documents and under windows, through megatron.core: tokens a second of each way of doing it.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 scripts/bench_packed_training.py documents
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 scripts/bench_packed_training.py windows --layers 6 --kernel cpu

documents: of the named mix (lengths lognormal, sigma 1, a sixteenth of the stream on the average), other ones in every
iteration, so that what is made of a plan is made anew as in training. Only tokens of documents count, not padding.
Ways are compared with each of those that do without: rows, the zigzag over the stream, documents with padding.
windows: a sixteenth of the sequence in five layers, the whole one in the sixth, against all layers causal.

The model is a GPT on a ring of all ranks: forward and backward pass, reduction of gradients, Adam. All ways take turns
in the same processes, --repeats times with each batch, of which the median counts. Attention waits for as long as an
accelerator of --gflops would compute what is seen, since ranks that share cores would hide what waits for the slowest;
everything else is computed. --kernel cpu computes that as well. "attention": the part of a step for which the rank that
computes most is in the kernel; a ratio of that time alone is what the areas of the batches allow, and steps fall
behind it by what all other layers take.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import accumulate, product
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from mindspeed_cp import megatron_adaptor
from mindspeed_cp.attention import build_attention
from mindspeed_cp.batch import LayoutName
from mindspeed_cp.benchmark.documents import lognormal_mix
from mindspeed_cp.benchmark.kernels import EmulatedKernel, TimedKernel
from mindspeed_cp.kernels import KERNELS, KernelRegistry
from mindspeed_cp.patches.packing import Packing

VOCABULARY = 128


class Batch(NamedTuple):
    """Whole tokens [B, S], where documents of a stream end [n + 1], and where with what pads them."""

    tokens: Tensor
    cu_seqlens: Tensor | None
    cu_seqlens_padded: Tensor | None


class Way(NamedTuple):
    """A way of training. batch: of an iteration. layout: of packed streams. window: (tokens before, after) or None.

    short: its name where others are compared with it.
    """

    batch: Callable[[int], Batch]
    layout: LayoutName = "zigzag_by_document"
    window: tuple[int, int] | None = None
    short: str = ""


class Measured(NamedTuple):
    """Of a step: seconds until the last rank is done, and those that the rank which computes most spends in kernels."""

    step: float
    attention: float


def ways_with_documents(tokens: int, ranks: int) -> dict[str, Way]:
    """By name."""

    def rows(iteration: int) -> Batch:
        lengths = lognormal_mix(iteration, tokens)
        return Batch(_tokens(len(lengths), _up_to(max(lengths), 2 * ranks)), None, None)

    def stream(iteration: int) -> Batch:
        ends = _ends(lognormal_mix(iteration, tokens))
        return Batch(_tokens(1, tokens), ends, None)

    def padded(iteration: int) -> Batch:
        lengths = lognormal_mix(iteration, tokens)
        with_padding = _ends([_up_to(length, 2 * ranks) for length in lengths])
        return Batch(_tokens(1, int(with_padding[-1])), _ends(lengths), with_padding)

    return {
        "a document a row, padded to the longest": Way(rows, short="rows"),
        "a stream, zigzag over it": Way(stream, "zigzag", short="zigzag"),
        f"a stream, documents padded to {2 * ranks}": Way(padded, short="padding"),
        "a stream, zigzag by document": Way(stream),
        "a stream, balanced": Way(stream, "balanced"),
    }


def ways_with_windows(tokens: int) -> dict[str, Way]:
    """By name."""

    def whole(iteration: int) -> Batch:
        return Batch(_tokens(1, tokens), None, None)

    window = tokens // 16
    return {
        "causal": Way(whole, short="causal"),
        f"windows of {window} in five layers of six": Way(whole, window=(window - 1, 0)),
    }


def _up_to(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _ends(lengths: "list[int] | tuple[int, ...]") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


class Trainer:
    """A model of one way, and its optimizer."""

    def __init__(self, way: Way, args: argparse.Namespace) -> None:
        self.way, plugin = way, megatron_adaptor.plugin
        self._packing = plugin.packing = Packing(way.layout)
        config = TransformerConfig(
            num_layers=args.layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.heads,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            context_parallel_size=dist.get_world_size(),
            calculate_per_token_loss=True,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=False,
            window_size=way.window,
            window_attn_skip_freq=None if way.window is None else 6,
        )
        model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, args.tokens, position_embedding_type="rope")
        self._model = DistributedDataParallel(config, DistributedDataParallelConfig(), model.cuda())
        adam = OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.0)
        self._optimizer: MegatronOptimizer = get_megatron_optimizer(adam, [self._model])

    def measured(self, iteration: int, kernels: list[TimedKernel]) -> Measured:
        """One step. kernels: all that compute attention."""
        batch = self.way.batch(iteration)
        megatron_adaptor.plugin.packing = self._packing
        before = sum(kernel.seconds for kernel in kernels)
        dist.barrier()
        start = time.perf_counter()
        self._step(batch)
        most = torch.tensor(sum(kernel.seconds for kernel in kernels) - before, dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return Measured(time.perf_counter() - start, most.item())

    def _step(self, batch: Batch) -> None:
        packed = None
        whole = {"tokens": batch.tokens, "labels": batch.tokens, "position_ids": torch.zeros_like(batch.tokens)}
        if batch.cu_seqlens is not None:
            padded = batch.cu_seqlens_padded
            longest = int((batch.cu_seqlens if padded is None else padded).diff().max())  # With what pads it.
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=batch.cu_seqlens,
                cu_seqlens_kv=batch.cu_seqlens,
                cu_seqlens_q_padded=padded,
                cu_seqlens_kv_padded=padded,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            whole |= {"cu_seqlens": batch.cu_seqlens, "cu_seqlens_padded": padded}
        shards = megatron_adaptor.shard_batch(whole)
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = self._model(
            shards["tokens"], shards["position_ids"], None, labels=shards["labels"], packed_seq_params=packed
        )
        losses.sum().backward()
        finalize_model_grads([self._model], torch.tensor(losses.numel()))
        self._optimizer.step()


def table(steps: dict[str, list[list[Measured]]], trainers: dict[str, Trainer], tokens: int) -> Iterator[str]:
    """A row for each way. steps: by way, for each iteration, its repeats."""
    # Over all of them as training goes through them: their mixes differ.
    seconds = {
        name: Measured(
            sum(statistics.median(each.step for each in batch) for batch in of),
            sum(statistics.median(each.attention for each in batch) for batch in of),
        )
        for name, of in steps.items()
    }
    compared = {trainer.way.short: seconds[name] for name, trainer in trainers.items() if trainer.way.short}
    yield f"| | tokens/s | {' | '.join(f'times {short} (in attention alone)' for short in compared)} | attention |"
    yield "|---" * (len(compared) + 3) + "|"
    for name, own in seconds.items():
        ratios = " | ".join(
            f"{other.step / own.step:.2f} ({other.attention / own.attention:.2f})" for other in compared.values()
        )
        yield f"| {name} | {tokens * len(steps[name]) / own.step:.0f} | {ratios} | {own.attention / own.step:.0%} |"


def main() -> None:
    """Read the command line, train, print on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["documents", "windows"])
    parser.add_argument("--tokens", type=int, default=16384, help="of a stream or a sequence (16384)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--gflops", type=float, default=5.0, help="of each emulated accelerator, 10^9 a second (5)")
    parser.add_argument("--kernel", choices=["emulated", "cpu"], default="emulated")
    parser.add_argument("--only", default="", help="ways whose names contain this")
    parser.add_argument("--iterations", type=int, default=6, help="the one before them is not counted (6)")
    parser.add_argument("--repeats", type=int, default=1, help="steps of a way with each batch (1)")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    megatron_adaptor.configure(
        distributed_backend="gloo",
        context_parallel_size=size,
        context_parallel_algo="megatron_cp_algo",
        use_cp_send_recv_overlap=True,
    )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    model_parallel_cuda_manual_seed(1)
    emulated = (EmulatedKernel(args.gflops * 1e9),)
    kernels = [TimedKernel(kernel) for kernel in (emulated if args.kernel == "emulated" else KERNELS.kernels)]
    timed = functools.partial(build_attention, kernels=KernelRegistry(tuple(kernels)))
    with mock.patch("mindspeed_cp.patches.attention.build_attention", timed):
        ways = ways_with_documents(args.tokens, size) if args.what == "documents" else ways_with_windows(args.tokens)
        trainers = {name: Trainer(way, args) for name, way in ways.items() if args.only in name}
    steps: dict[str, list[list[Measured]]] = {name: [[] for _ in range(args.iterations + 1)] for name in trainers}
    for iteration, _ in product(range(args.iterations + 1), range(args.repeats)):
        for name, trainer in trainers.items():
            steps[name][iteration].append(trainer.measured(iteration, kernels))
    if dist.get_rank() == 0:
        print(f"{size} ranks, {args.tokens} tokens, {args.layers} layers of {args.heads} heads, {args.kernel} kernel")
        for line in table({name: each[1:] for name, each in steps.items()}, trainers, args.tokens):
            print(line)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
