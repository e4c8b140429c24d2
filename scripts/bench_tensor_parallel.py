"""Tensor parallelism on an emulated cluster: an MLP's two passes in each kind, beside what its messages predict.

    python scripts/bench_tensor_parallel.py --ranks 8 --ranks-per-node 4 --slow-mbit 20        # as root

Matrices are small and links slow, so that the network is what takes time. The prediction plays the messages that the
layers themselves send, recorded on virtual ranks, against the links (Note [Prediction] in mindspeed_cp/planner).
`--overlap` measures instead what panels hide behind products that take as long as their transfers: there a product is a
wait of a set rate, because ranks that outnumber the cores cannot compute side by side.
"""

import argparse
import sys

from mindspeed_cp.benchmark.tensor_parallel import OVERLAPPED, SETTINGS, Case, overlapped, report, report_hidden
from mindspeed_cp.planner import Network
from mindspeed_cp.testing.emulated_cluster import Cluster, add_network_arguments, why_not_here


def main() -> int:
    """Read the command line, measure, print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="8 or 16; with --overlap 4 or 8")
    parser.add_argument("--ranks-per-node", type=int, default=4)
    parser.add_argument("--slow-mbit", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--overlap", action="store_true", help="panels with overlap and without, a rank a node")
    for name, default in (("batch", 16), ("sequence", 128), ("hidden", 128), ("ffn", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gflops", type=float, default=1e4, help="of the emulated accelerator")
    add_network_arguments(parser)
    args = parser.parse_args()
    if reason := why_not_here():
        parser.error(reason)
    if args.ranks not in (OVERLAPPED if args.overlap else SETTINGS):
        parser.error(f"--ranks {args.ranks}: use {' or '.join(map(str, OVERLAPPED if args.overlap else SETTINGS))}.")
    settings = overlapped(args.ranks) if args.overlap else SETTINGS[args.ranks]
    case = Case(args.batch, args.sequence, args.hidden, args.ffn, args.gflops * 1e9)
    network = Network(
        num_ranks=args.ranks,
        ranks_per_node=1 if args.overlap else args.ranks_per_node,
        fast_mbit=args.fast_mbit,
        slow_mbit=args.slow_mbit,
        slow_link=args.slow_link,
    )
    with Cluster(network) as cluster:
        readings = report(cluster, settings, case, args.repeats)
    if args.overlap:
        report_hidden(readings, network, settings, case)
    return 0


if __name__ == "__main__":
    sys.exit(main())
