"""Time a training step of recomputed layers with and without --context-parallel-keep-outputs, on an emulated cluster.

    python scripts/bench_recomputation.py --shares 0.5 0.9        # as root

Kernel and everything else of a layer are waits, messages are real (mindspeed_cp/benchmark/recomputation.py). A share is
attention's part of a layer's forward time: attention is timed by itself first, and the rest made as long as that asks
for. Both ways of each row take turns within one run; a time is the median of the slowest rank's, the first left out.
How many times as fast is the median over the turns; in brackets, without the lowest and the highest quarter of them.
"""

import argparse
import statistics
import sys

from mindspeed_cp.benchmark import recomputation
from mindspeed_cp.benchmark.cases import algorithms_for
from mindspeed_cp.planner import AttentionShape
from mindspeed_cp.testing.emulated_cluster import Cluster, add_network_arguments, network_of, why_not_here

ALGORITHMS = ["Ulysses", "ring", "ring, overlap", "double ring 2, overlap", "hybrid 2x2, overlap"]


def main() -> int:
    """Read the command line, measure, print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--slow-mbit", type=float, default=200.0, help="rate between nodes")
    add_network_arguments(parser)
    parser.add_argument("--tokens", type=int, default=8192, help="of all ranks together")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=32)
    parser.add_argument("--gflops", type=float, default=80.0, help="of the emulated accelerator, 10^9 a second")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.9], help="attention's, of the forward time")
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS)
    parser.add_argument("--iterations", type=int, default=5, help="2 or more")
    args = parser.parse_args()
    if reason := why_not_here():
        parser.error(reason)
    network = network_of(args)
    shape = AttentionShape(
        num_tokens=args.tokens, num_heads=args.heads, num_kv_heads=args.heads, head_size=args.head_size
    )
    algorithms = [each for each in algorithms_for(shape, args.ranks) if each.name in args.algorithms]
    with Cluster(network, preload=["mindspeed_cp.benchmark.recomputation"]) as cluster:

        def slowest(function, *of_rank) -> list[float]:
            """Of each iteration; the first of all is not counted."""
            return [max(cluster.call(function, *of_rank)) for _ in range(args.iterations + 1)][1:]

        print("| | attention of the forward time | attention ms | again ms | kept ms | times as fast |")
        print("|---|---|---|---|---|---|")
        for algorithm in algorithms:
            cluster.call(recomputation.prepare, algorithm, args.gflops * 1e9)
            alone = statistics.median(slowest(recomputation.attention_seconds, algorithm.name, shape))
            for share in args.shares:
                step = algorithm.name, shape, alone * (1 / share - 1), args.layers
                taken: dict[bool, list[float]] = {False: [], True: []}
                for _ in range(args.iterations + 1):
                    for keep, times in taken.items():
                        times.append(max(cluster.call(recomputation.step_seconds, *step, keep)))
                again, kept = (times[1:] for times in taken.values())
                milliseconds = " | ".join(
                    f"{1e3 * each:.0f}" for each in (alone, statistics.median(again), statistics.median(kept))
                )
                gained = statistics.quantiles((a / b for a, b in zip(again, kept, strict=True)), method="inclusive")
                low, middle, high = (f"{each:.3f}" for each in gained)
                print(f"| {algorithm.name} | {share:g} | {milliseconds} | {middle} ({low} to {high}) |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
