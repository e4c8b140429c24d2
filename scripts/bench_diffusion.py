"""Parallel diffusion on an emulated cluster: a guided step on meshes of 1 to 4 ranks, and a ring of 8 against its link.

    python scripts/bench_diffusion.py        # as root

A block of the transformer is a wait for its floating-point operations, because ranks that outnumber the cores cannot
compute side by side; messages are real (mindspeed_cp/benchmark/diffusion.py).
"""

import argparse
import sys
from pathlib import Path

from mindspeed_cp.benchmark.diffusion import Case, name_of, rings, steps
from mindspeed_cp.planner import Network
from mindspeed_cp.testing.emulated_cluster import Cluster, why_not_here

MESHES = [{}, {"cfg": 2}, {"ulysses": 2}, {"ring": 2}, {"cfg": 2, "ulysses": 2}, {"cfg": 2, "ring": 2}, {"ulysses": 4}]
RATIOS = [0.5, 1.0, 2.0]


def draw(speeds: dict[str, float], ratios: dict[float, float], path: Path) -> None:
    """Both tables as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.barh(list(speeds), list(speeds.values()))
    left.invert_yaxis()
    left.set(xlabel="times as fast as one rank", title="a guided step")
    right.plot(list(ratios), list(ratios.values()), marker="o")
    right.set(xlabel="link / kernel", ylabel="ring / the larger of both", title="a ring of 8", ylim=(0.98, 1.3))
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Read the command line, measure, print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fast-mbit", type=float, default=4000.0, help="of each rank's link, for the steps")
    parser.add_argument("--ring-mbit", type=float, default=12.5, help="of each rank's link, for the ring")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--gflops", type=float, default=2.5, help="of the emulated accelerator")
    parser.add_argument("--picture", type=Path, help="where to draw the results")
    args = parser.parse_args()
    if reason := why_not_here():
        parser.error(reason)
    case = Case(tokens=args.tokens, flops_per_s=args.gflops * 1e9)
    fast = {"fast_mbit": args.fast_mbit, "slow_mbit": args.fast_mbit}
    with Cluster(Network(num_ranks=4, ranks_per_node=4, **fast)) as cluster:
        seconds = steps(cluster, MESHES, case, args.repeats)
    alone = seconds[name_of({})]
    print("| mesh | ms a step | times as fast |\n|---|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {1e3 * each:.0f} | {alone / each:.2f} |", flush=True)
    slow = {"fast_mbit": args.ring_mbit, "slow_mbit": args.ring_mbit}
    with Cluster(Network(num_ranks=8, ranks_per_node=8, **slow)) as cluster:
        found = rings(cluster, case, RATIOS, args.repeats)
    print("\n| link / kernel | kernel ms | link ms | ring ms | ring / the larger |\n|---|---|---|---|---|")
    ratios = {}
    for ratio, (ring, link, kernel) in found.items():
        ratios[ratio] = ring / max(link, kernel)
        print(f"| {ratio:g} | {1e3 * kernel:.0f} | {1e3 * link:.0f} | {1e3 * ring:.0f} | {ratios[ratio]:.2f} |")
    if args.picture:
        draw({name: alone / each for name, each in seconds.items()}, ratios, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
