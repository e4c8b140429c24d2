"""Measure what plans are worth: windows against causal attention, and packed documents by each layout.

    python scripts/bench_plans.py --ranks 8 --tokens 32768

Ranks are threads of one process, and messages between them cost nothing. The kernel is emulated: it waits for as long
as an accelerator of --gflops would compute what is seen, so that the slowest rank's work is measured, and what the host
does beside it. All cases take turns within one run; a time is the median over --iterations, of forward and backward.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from mindspeed_cp.attention import RingCommunicators, compose_attention
from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.benchmark.documents import lognormal_mix
from mindspeed_cp.benchmark.kernels import EmulatedKernel
from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.kernels import KernelRegistry

HEADS, HEAD_SIZE = 8, 64


def cases(tokens: int, ranks: int) -> dict[str, PackedBatch]:
    """What is measured, by name."""
    whole, packed = [0, tokens], [0, *accumulate(lognormal_mix(1, tokens))]
    return {
        "causal, zigzag": PackedBatch.from_cu_seqlens(whole, ranks, layout="zigzag"),
        f"window of {tokens // 16}, contiguous": PackedBatch.from_cu_seqlens(
            whole, ranks, layout="contiguous", window_size=(tokens // 16 - 1, 0)
        ),
        f"window of {tokens // 16}, zigzag": PackedBatch.from_cu_seqlens(
            whole, ranks, layout="zigzag", window_size=(tokens // 16 - 1, 0)
        ),
        "documents, zigzag over the stream": PackedBatch.from_cu_seqlens(packed, ranks, layout="zigzag"),
        "documents, zigzag by document": PackedBatch.from_cu_seqlens(packed, ranks, layout="zigzag_by_document"),
        "documents, balanced": PackedBatch.from_cu_seqlens(packed, ranks, layout="balanced"),
        "documents, balanced, balance first": PackedBatch.from_cu_seqlens(
            packed, ranks, layout="balanced", prefer="balance"
        ),
    }


def seconds(batch: PackedBatch, ranks: int, flops_per_s: float) -> float:
    """Of a forward and a backward pass on all ranks, from a start that they agree on."""
    config = ContextParallelConfig(
        context_parallel_size=ranks, context_parallel_algo="megatron_cp_algo", use_cp_send_recv_overlap=True
    )
    world, kernels = VirtualWorld(ranks, 600), KernelRegistry((EmulatedKernel(flops_per_s),))

    def on_rank(rank: int) -> tuple[float, float]:
        ring = RingCommunicators(*(VirtualCommunicator(world, range(ranks), rank, axis) for axis in "iog"))
        attention = compose_attention(config, rank=rank, ulysses=None, ring=ring, kernels=kernels)
        shape = (1, HEADS, batch.layout.num_tokens(rank), HEAD_SIZE)
        q, k, v = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        dout = torch.zeros(shape, dtype=torch.bfloat16)
        start = time.perf_counter()
        torch.autograd.grad(attention(q, k, v, plan=batch.plan), (q, k, v), dout)
        return start, time.perf_counter()

    spans = world.run(on_rank)
    return max(end for _, end in spans) - min(start for start, _ in spans)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768, help="of the whole stream")
    parser.add_argument("--gflops", type=float, default=150.0, help="of the emulated accelerator, 10^9 a second")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    args = parser.parse_args(arguments)
    measured: dict[str, list[float]] = {}
    for _ in range(args.iterations + 1):  # The first makes plans and calls, and is not counted.
        chosen = {name: batch for name, batch in cases(args.tokens, args.ranks).items() if args.only in name}
        for name, batch in chosen.items():
            measured.setdefault(name, []).append(seconds(batch, args.ranks, args.gflops * 1e9))
    print(f"{args.ranks} ranks, {args.tokens} tokens, {HEADS} heads of {HEAD_SIZE}, {args.gflops:g} GFLOP/s")
    print("| | ms | times as fast as |\n|---|---|---|")
    median = {name: statistics.median(each[1:]) for name, each in measured.items()}
    compared: dict[str, Callable[[str], bool]] = {
        "causal, zigzag": lambda name: name.startswith("window"),
        "documents, zigzag over the stream": lambda name: name.startswith("documents, "),
    }
    for name, time_s in median.items():
        base = next((base for base, of in compared.items() if of(name) and base != name and base in median), None)
        ratio = "" if base is None else f"{median[base] / time_s:.2f}, {base}"
        print(f"| {name} | {time_s * 1e3:.0f} | {ratio} |")


if __name__ == "__main__":
    main()
