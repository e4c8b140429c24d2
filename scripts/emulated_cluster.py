"""Build a cluster on this machine, measure what two ranks get inside a node and between nodes, and take it down again.

    python scripts/emulated_cluster.py --ranks 4 --ranks-per-node 2 --fast-mbit 2000 --slow-mbit 200

Needs root; how it is wired is said in mindspeed_cp/testing/emulated_cluster.py.
"""

import argparse
import sys

from mindspeed_cp.testing.emulated_cluster import (
    Cluster,
    add_network_arguments,
    measure_link,
    network_of,
    why_not_here,
)


def main() -> int:
    """Read the command line and measure; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--slow-mbit", type=float, default=400.0, help="rate between nodes, each direction")
    add_network_arguments(parser)
    args = parser.parse_args()
    if reason := why_not_here():
        parser.error(reason)
    network = network_of(args)
    with Cluster(network) as cluster:
        # The first rank's neighbour, and the last rank: in one node, and between nodes, where there are both.
        for to in sorted({1, args.ranks - 1} & set(range(1, args.ranks))):
            inside = network.node(to) == 0
            expected = network.fast_mbit if inside else network.slow_mbit
            rate = measure_link(cluster, 0, to)
            place = "inside a node" if inside else "between nodes"
            print(f"{place}, rank 0 to {to}: {rate:8.1f} Mbit/s of {expected:g} set ({rate / expected:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
