"""Where each form of --context-parallel-latent pays: bytes, operations and time of both passes, predicted and measured.

    python scripts/bench_latent.py                          # predicted for accelerators and links of real rates
    python scripts/bench_latent.py --measure --tokens 4096 8192 --gflops 200 --gbytes 0.025      # as root

Predictions are the planner's, of the programs that the ranks play. Measured is on an emulated cluster, where all
arithmetic waits for its operations (mindspeed_cp/benchmark/latent.py); each form's time is the slowest rank's, the
median over --iterations in which all take turns. Head sizes are DeepSeek's: latents of 512, rotated parts of 64, keys
of 128 + 64, values of 128.
"""

import argparse
import statistics
import sys
from typing import get_args

from mindspeed_cp.benchmark import latent
from mindspeed_cp.benchmark.cases import Algorithm
from mindspeed_cp.config import LatentForm
from mindspeed_cp.planner import LatentPass, LatentShape, Network, predicted_seconds
from mindspeed_cp.program import Phase
from mindspeed_cp.testing.emulated_cluster import Cluster, why_not_here
from mindspeed_cp.topology import CPTopology

FORMS: tuple[LatentForm, ...] = get_args(LatentForm)


def _algorithms(num_ranks: int) -> list[Algorithm]:
    return [
        Algorithm(name="ring", topology=CPTopology(inner=num_ranks), overlap=True),
        Algorithm(name="Ulysses", topology=CPTopology(ulysses=num_ranks)),
    ]


def _row(algorithm: Algorithm, shapes: list[LatentShape], args: argparse.Namespace, measured: list[float]) -> str:
    """Of each form bytes and operations of a rank, predicted and measured milliseconds, and times the first's."""
    num_ranks = algorithm.topology.size
    rate = args.gbytes * 8e3
    network = Network(num_ranks=num_ranks, ranks_per_node=num_ranks, fast_mbit=rate, slow_mbit=rate)
    cells, predicted = [], []
    for shape in shapes:
        passes = [LatentPass(shape, algorithm.topology, phase, args.gflops * 1e9) for phase in Phase]
        predicted.append(sum(predicted_seconds(network, each.events) for each in passes))
        sent = sum(each.attention.num_bytes() for each in passes) / num_ranks
        cells += [f"{sent / 1e6:.1f}", f"{1e3 * predicted[-1]:.2f}"]
    cells += [f"{predicted[0] / each:.2f}" for each in predicted[1:]]
    cells += [f"{1e3 * each:.0f}" for each in measured] + [f"{measured[0] / each:.2f}" for each in measured[1:]]
    return f"| {algorithm.name} | {num_ranks} | {shapes[0].num_tokens} | {' | '.join(cells)} |"


def _measured(cluster: Cluster, algorithm: Algorithm, shapes: list[LatentShape], iterations: int) -> list[float]:
    """Seconds of both passes in each form. Raises ValueError where other bytes were sent than are predicted."""
    taken: list[list[float]] = [[] for _ in shapes]
    for _ in range(iterations + 1):
        for shape, times in zip(shapes, taken, strict=True):
            ranks, sent = zip(*cluster.call(latent.run, algorithm.name, shape), strict=True)
            times.append(sum(max(each[phase] for each in ranks) for phase in Phase))
            predicted = sum(LatentPass(shape, algorithm.topology, each, 1.0).attention.num_bytes() for each in Phase)
            if sum(sent) != predicted:
                raise ValueError(f"{algorithm.name}, {shape.form}: {sum(sent)} bytes sent and {predicted} predicted")
    return [statistics.median(times[1:]) for times in taken]


def main() -> int:
    """Read the command line, predict or measure, print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 131072], help="of all ranks together")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--gflops", type=float, default=400e3, help="of each accelerator, 10^9 a second")
    parser.add_argument("--gbytes", type=float, default=50.0, help="of each rank's link, 10^9 a second")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--iterations", type=int, default=2)
    args = parser.parse_args()
    if args.measure and (reason := why_not_here()):
        parser.error(reason)
    times = [f"{form}/expanded" for form in FORMS if form != "expanded"]
    head = [each for form in FORMS for each in (f"{form}: MB", "ms predicted")] + [f"{each}, times" for each in times]
    head += [*(f"{form}: ms" for form in FORMS), *(f"{each}, times" for each in times)] * args.measure
    print(f"| | ranks | tokens | {' | '.join(head)} |\n{'|---' * (3 + len(head))}|")
    for num_ranks in args.ranks:
        algorithms, rate = _algorithms(num_ranks), args.gbytes * 8e3
        by_tokens = [
            [
                LatentShape(num_tokens=tokens, num_heads=args.heads, num_kv_heads=args.heads, head_size=192, form=form)
                for form in FORMS
            ]
            for tokens in args.tokens
        ]
        if not args.measure:
            for algorithm in algorithms:
                for shapes in by_tokens:
                    print(_row(algorithm, shapes, args, []), flush=True)
            continue
        network = Network(num_ranks=num_ranks, ranks_per_node=num_ranks, fast_mbit=rate, slow_mbit=rate)
        with Cluster(network, preload=["mindspeed_cp.benchmark.latent"]) as cluster:
            for algorithm in algorithms:
                cluster.call(latent.prepare, algorithm, args.gflops * 1e9)
                for shapes in by_tokens:
                    measured = _measured(cluster, algorithm, shapes, args.iterations)
                    print(_row(algorithm, shapes, args, measured), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
