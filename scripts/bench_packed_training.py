"""Training on packed documents and under windows, through megatron.core: tokens a second of each way of doing it.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 scripts/bench_packed_training.py documents
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 scripts/bench_packed_training.py windows --layers 6 --kernel cpu

documents: of the named mix (lengths lognormal, sigma 1, a sixteenth of the stream on the average), other ones in every
iteration, so that what is made of a plan is made anew as in training. Only tokens of documents count, not padding.
windows: a sixteenth of the sequence in five layers, the whole one in the sixth, against all layers causal.

The model is a GPT on a ring of all ranks: forward and backward pass, reduction of gradients, Adam. All ways take turns
in the same processes. Attention waits for as long as an accelerator of --gflops would compute what is seen, since ranks
that share cores would hide what waits for the slowest; everything else is computed. --kernel cpu computes that as well.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
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
from mindspeed_cp.benchmark.kernels import EmulatedKernel
from mindspeed_cp.kernels import KERNELS, KernelRegistry
from mindspeed_cp.patches.packing import Packing

VOCABULARY = 128


class Batch(NamedTuple):
    """Whole tokens [B, S], where documents of a stream end [n + 1], or with padding, and how many tokens count."""

    tokens: Tensor
    cu_seqlens: Tensor | None
    cu_seqlens_padded: Tensor | None
    num_counted: int


class Way(NamedTuple):
    """A way of training. batch: of an iteration. layout: of packed streams. window: (tokens before, after) or None."""

    batch: Callable[[int], Batch]
    layout: LayoutName = "zigzag_by_document"
    window: tuple[int, int] | None = None


def ways_with_documents(tokens: int, ranks: int) -> dict[str, Way]:
    """By name; the first ones are what others are compared with."""

    def rows(iteration: int) -> Batch:
        lengths = lognormal_mix(iteration, tokens)
        return Batch(_tokens(len(lengths), _up_to(max(lengths), 2 * ranks)), None, None, tokens)

    def stream(iteration: int) -> Batch:
        ends = _ends(lognormal_mix(iteration, tokens))
        return Batch(_tokens(1, tokens), ends, None, tokens)

    def padded(iteration: int) -> Batch:
        lengths = lognormal_mix(iteration, tokens)
        with_padding = _ends([_up_to(length, 2 * ranks) for length in lengths])
        return Batch(_tokens(1, int(with_padding[-1])), _ends(lengths), with_padding, tokens)

    return {
        "a document a row, padded to the longest": Way(rows),
        "a stream, zigzag over it": Way(stream, "zigzag"),
        f"a stream, documents padded to {2 * ranks}": Way(padded),
        "a stream, zigzag by document": Way(stream),
        "a stream, balanced": Way(stream, "balanced"),
    }


def ways_with_windows(tokens: int) -> dict[str, Way]:
    """By name; the first one is what the other is compared with."""

    def whole(iteration: int) -> Batch:
        return Batch(_tokens(1, tokens), None, None, tokens)

    window = tokens // 16
    return {"causal": Way(whole), f"windows of {window} in five layers of six": Way(whole, window=(window - 1, 0))}


def _up_to(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _ends(lengths: "list[int] | tuple[int, ...]") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


class Trainer:
    """A model of one way, and its optimizer."""

    def __init__(self, way: Way, args: argparse.Namespace) -> None:
        self._way, plugin = way, megatron_adaptor.plugin
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

    def tokens_per_second(self, iteration: int) -> float:
        """Of one iteration, until the last rank is done."""
        batch = self._way.batch(iteration)
        megatron_adaptor.plugin.packing = self._packing
        dist.barrier()
        start = time.perf_counter()
        self._step(batch)
        dist.barrier()
        return batch.num_counted / (time.perf_counter() - start)

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
    kernels = KernelRegistry((EmulatedKernel(args.gflops * 1e9),)) if args.kernel == "emulated" else KERNELS
    emulated = functools.partial(build_attention, kernels=kernels)
    with mock.patch("mindspeed_cp.patches.attention.build_attention", emulated):
        ways = ways_with_documents(args.tokens, size) if args.what == "documents" else ways_with_windows(args.tokens)
        trainers = {name: Trainer(way, args) for name, way in ways.items() if args.only in name}
    measured: dict[str, list[float]] = {name: [] for name in trainers}
    for iteration in range(args.iterations + 1):
        for name, trainer in trainers.items():
            measured[name].append(trainer.tokens_per_second(iteration))
    if dist.get_rank() == 0:
        # Over all of them as training goes through them: their mixes differ.
        speed = {name: statistics.harmonic_mean(each[1:]) for name, each in measured.items()}
        first = next(iter(speed.values()))
        print(f"{size} ranks, {args.tokens} tokens, {args.layers} layers of {args.heads} heads, {args.kernel} kernel")
        print("| | tokens/s | times the first |\n|---|---|---|")
        for name, each in speed.items():
            print(f"| {name} | {each:.0f} | {each / first:.2f} |")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
