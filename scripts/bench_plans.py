"""Measure what plans are worth: windows against causal attention, and packed documents by each layout.

    python scripts/bench_plans.py --ranks 8 --tokens 32768
    python scripts/bench_plans.py --mix 1 2 3 --gflops 150    mixes of documents, by their seeds
    python scripts/bench_plans.py --host                        what making plans costs

Ranks are threads of one process, and messages between them cost nothing. The kernel is emulated: it waits for as long
as an accelerator of --gflops would compute what is seen, so that the slowest rank's work is measured, and what the host
does beside it. All cases take turns within one run; a time is the median over --iterations, of forward and backward.
"""

import argparse
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch

from mindspeed_cp.attention import RingCommunicators, compose_attention
from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.benchmark.documents import areas, lognormal_mix
from mindspeed_cp.benchmark.kernels import EmulatedKernel
from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.kernels import KernelRegistry
from mindspeed_cp.layouts import Balanced, Contiguous, DocumentZigzag, PackedLayout, Zigzag
from mindspeed_cp.plan import AttentionPlan, Tile

HEAD_SIZE = 64


def cases(tokens: int, ranks: int) -> dict[str, PackedBatch]:
    """What is measured, by name."""
    whole = [0, tokens]
    return {
        "causal, zigzag": PackedBatch.from_cu_seqlens(whole, ranks, layout="zigzag"),
        f"window of {tokens // 16}, contiguous": PackedBatch.from_cu_seqlens(
            whole, ranks, layout="contiguous", window_size=(tokens // 16 - 1, 0)
        ),
        f"window of {tokens // 16}, zigzag": PackedBatch.from_cu_seqlens(
            whole, ranks, layout="zigzag", window_size=(tokens // 16 - 1, 0)
        ),
        **mix(1, tokens, ranks),
    }


def mix(seed: int, tokens: int, ranks: int) -> dict[str, PackedBatch]:
    """Packed documents by each layout."""
    packed = [0, *accumulate(lognormal_mix(seed, tokens))]
    return {
        "documents, zigzag over the stream": PackedBatch.from_cu_seqlens(packed, ranks, layout="zigzag"),
        "documents, zigzag by document": PackedBatch.from_cu_seqlens(packed, ranks, layout="zigzag_by_document"),
        "documents, balanced": PackedBatch.from_cu_seqlens(packed, ranks, layout="balanced"),
        "documents, balanced, balance first": PackedBatch.from_cu_seqlens(
            packed, ranks, layout="balanced", prefer="balance"
        ),
    }


def seconds(batch: PackedBatch, ranks: int, heads: int, kernels: KernelRegistry) -> float:
    """Of a forward and a backward pass on all ranks, from a start that they agree on."""
    config = ContextParallelConfig(
        context_parallel_size=ranks, context_parallel_algo="megatron_cp_algo", use_cp_send_recv_overlap=True
    )
    world = VirtualWorld(ranks, 600)

    def on_rank(rank: int) -> tuple[float, float]:
        ring = RingCommunicators(*(VirtualCommunicator(world, range(ranks), rank, axis) for axis in "iog"))
        attention = compose_attention(config, rank=rank, ulysses=None, ring=ring, kernels=kernels)
        shape = (1, heads, batch.layout.num_tokens(rank), HEAD_SIZE)
        q, k, v = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        dout = torch.zeros(shape, dtype=torch.bfloat16)
        start = time.perf_counter()
        torch.autograd.grad(attention(q, k, v, plan=batch.plan), (q, k, v), dout)
        return start, time.perf_counter()

    spans = world.run(on_rank)
    return max(end for _, end in spans) - min(start for start, _ in spans)


def mixes_measured(args: argparse.Namespace) -> Iterator[str]:
    """A table of mixes: times as fast as a zigzag over the stream, and in brackets what areas promise."""
    base, *others = mix(1, args.tokens, args.ranks)
    others = [name for name in others if args.only in name]
    yield f"| seed | {base}, ms | {' | '.join(others)} |\n|{'---|' * (len(others) + 2)}"
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in others}

    def row(of: Callable[[Sequence[float]], float], number: int = 0) -> str:
        pairs = (tuple(map(of, zip(*each[number:], strict=True))) for each in ratios.values())
        return " | ".join("{:.2f} ({:.2f})".format(*pair) for pair in pairs)

    for seed in args.mix:
        made = mix(seed, args.tokens, args.ranks)
        most = {name: max(areas(made[name].plan)) for name in (base, *others)}
        took = medians({name: made[name] for name in most}, args)
        for name, each in ratios.items():
            each.append((took[base] / took[name], most[base] / most[name]))
        yield f"| {seed} | {took[base] * 1e3:.0f} | {row(statistics.mean, -1)} |"
    for summary in statistics.mean, statistics.median, min:
        yield f"| {summary.__name__} | | {row(summary)} |"


def medians(batches: dict[str, PackedBatch], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each case; they take turns."""
    measured: dict[str, list[float]] = {name: [] for name in batches}
    kernel = EmulatedKernel(math.inf)
    kernels = KernelRegistry((kernel,))  # What layers share is made for a registry.
    for _ in range(args.iterations + 1):
        for name, batch in batches.items():
            measured[name].append(seconds(batch, args.ranks, args.heads, kernels))
        # The first makes what the layers of a batch share, and is not counted: here one process makes it for all ranks.
        kernel.flops_per_s = args.gflops * 1e9
    return {name: statistics.median(each[1:]) for name, each in measured.items()}


def host_costs(documents: int = 1000) -> Iterator[str]:
    """A table of what plans of many documents cost on the host, thread CPU time."""
    rng = random.Random(1)
    lengths = tuple(max(1, round(rng.lognormvariate(4.4, 1))) for _ in range(documents))
    yield "| layout, ranks | own runs ms | runs of all ranks ms | a rank's tiles | ms | tiles of all ranks | us each |"
    yield "|---|---|---|---|---|---|---|"
    makers: dict[str, Callable[[int, tuple[tuple[int, ...], ...]], PackedLayout]] = {
        "contiguous": Contiguous,
        "zigzag over the stream": Zigzag,
        "zigzag by document": DocumentZigzag,
        "balanced": Balanced,
        "balanced, balance first": partial(Balanced, prefer="balance"),
    }
    for ranks in (8, 64):
        for name, make in makers.items():
            layout = make(ranks, (lengths,))

            def runs(of: Iterable[int], make=make, ranks=ranks) -> None:
                fresh = make(ranks, (lengths,))
                for rank in of:
                    fresh.runs(rank)

            def tiles(of: Iterable[int], layout=layout, ranks=ranks) -> int:
                plan = AttentionPlan(layout, layout)
                return sum(len(plan.tiles(mine, owner)) for mine in of for owner in range(ranks))

            runs_ms, all_ms = (best(lambda of=of, runs=runs: runs(of)) * 1e3 for of in ([3], range(ranks)))
            own, own_ms = tiles([3]), best(partial(tiles, [3]), 5) * 1e3
            every, each_us = "", ""
            if own < 10_000:  # Else there are millions.
                count = tiles(range(ranks))
                every, each_us = str(count), f"{best(partial(tiles, range(ranks)), 5) / count * 1e6:.1f}"
            yield (f"| {name}, {ranks} | {runs_ms:.2f} | {all_ms:.1f} | {own} | {own_ms:.2f} | {every} | {each_us} |")
    yield f"\nA tile alone, two slices and the tuple: {best(tiles_alone) * 1e6 / documents:.2f} us"


def tiles_alone(count: int = 1000) -> list[Tile]:
    """As many tiles as there are documents, made of nothing: what no plan can be made faster than."""
    return [
        tuple.__new__(Tile, (slice(start, start + 300), slice(start, start + 300), None, 0, 45150, None))
        for start in range(300, 300 + count)
    ]


def best(function: Callable[[], object], times: int = 10) -> float:
    """Seconds of CPU that this thread needs, the least of some times."""
    gc.disable()
    found = []
    for _ in range(times):
        start = time.thread_time()
        function()
        found.append(time.thread_time() - start)
    gc.enable()
    return min(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768, help="of the whole stream")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--gflops", type=float, default=150.0, help="of the emulated accelerator, 10^9 a second")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--mix", type=int, nargs="*", help="only mixes of documents, of these seeds")
    parser.add_argument("--host", action="store_true", help="only what 1,000 documents cost on the host")
    args = parser.parse_args(arguments)
    if args.host or args.mix:
        for line in host_costs() if args.host else mixes_measured(args):
            print(line, flush=True)
        return
    measured = {name: batch for name, batch in cases(args.tokens, args.ranks).items() if args.only in name}
    median = medians(measured, args)
    print(f"{args.ranks} ranks, {args.tokens} tokens, {args.heads} heads of {HEAD_SIZE}, {args.gflops:g} GFLOP/s")
    print("| | ms | times as fast as |\n|---|---|---|")
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
