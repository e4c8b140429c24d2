"""Sequence-parallel inference on an emulated cluster: both ways of a prefill, a prefill against its link, and decode.

    python scripts/bench_inference.py                        # as root
    python scripts/bench_inference.py --parts link           # a prefill against its link alone

A kernel is a wait for its floating-point operations, because ranks that outnumber the cores cannot compute side by
side; messages are real (mindspeed_cp/benchmark/inference.py).
"""

import argparse
import sys
from pathlib import Path

from mindspeed_cp.benchmark.inference import (
    WAYS,
    Decode,
    Heads,
    Measured,
    Prefill,
    Way,
    decodes,
    measure_alone,
    prefills,
    ratios,
)
from mindspeed_cp.inference import Rates
from mindspeed_cp.planner import Network
from mindspeed_cp.testing.emulated_cluster import Cluster, why_not_here

RATIOS = [0.5, 1.0, 2.0]
DECODES = [
    Decode("tree", "replicated", "a2a"),
    Decode("tree", "replicated", "all_reduce"),
    Decode("allgather_q", "heads", "a2a"),
    Decode("allgather_q", "heads", "ag_rs"),
    Decode("ring_q", "batch", "a2a"),
]
RANKS = 4


def draw(prefill_s: dict, decode_s: dict, path: Path) -> None:  # type: ignore[type-arg]
    """Prefill time of a question behind a context, and time of a decoded token, over the length of the context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for panel, lines, title in (
        (axes[0], prefill_s, "prefill of new tokens behind a context"),
        (axes[1], decode_s, "a decoded token"),
    ):
        for name, points in lines.items():
            style = "--" if name == "one rank" else "-"
            panel.plot(list(points), [1e3 * each for each in points.values()], marker="o", linestyle=style, label=name)
        panel.set(xlabel="tokens of context", ylabel="ms a layer", title=title)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    axes[1].set_yscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def print_prefills(found: dict[tuple[Prefill, Way], Measured], heads: Heads, rates: Rates) -> None:
    """Each way, the faster of both in one piece, and what the rule says."""
    print("| new | cached | pass-KV ms | KiB | pass-Q ms | in two pieces ms | KiB | faster | the rule |")
    print("|---" * 9 + "|")
    for case in dict.fromkeys(case for case, _ in found):
        kv, q, in_pieces = (found[case, way] for way in WAYS)
        assert q.bytes == in_pieces.bytes, "pieces change what is sent"
        times = [f"{1e3 * each.seconds:.0f}" for each in (kv, q, in_pieces)]
        faster = "pass_kv" if kv.seconds < q.seconds else "pass_q"
        sent = [f"{each.bytes / 1024:.0f}" for each in (kv, q)]
        chosen = case.chosen(RANKS, heads, rates)
        row = case.new, case.cached, times[0], sent[0], *times[1:], sent[1], faster, chosen
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def print_decodes(steps: dict[tuple[Decode, int], Measured], alone: dict[int, float]) -> None:
    """Bytes and operations of each way, which do not depend on the context, and time, which does."""
    contexts = list(alone)
    print(f"\n| decode | bytes | operations | {' | '.join(f'ms at {context}' for context in contexts)} |")
    print("|---" * (3 + len(contexts)) + "|")
    for way in DECODES:
        found = [steps[way, context] for context in contexts]
        assert len({(each.bytes, each.operations) for each in found}) == 1, "what is sent depends on the context"
        times = " | ".join(f"{1e3 * each.seconds:.1f}" for each in found)
        print(f"| {way} | {found[0].bytes} | {found[0].operations} | {times} |")
    print(f"| one rank | 0 | 0 | {' | '.join(f'{1e3 * seconds:.1f}' for seconds in alone.values())} |")


def main() -> int:
    """Read the command line, measure, print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("context", "link"),
        default=["context", "link"],
        help="prefill and decode over the context; a prefill against its link",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mbit", type=float, default=50.0, help="of each rank's link")
    parser.add_argument("--gflops", type=float, default=20.0, help="of the emulated accelerator")
    parser.add_argument("--new", type=int, default=256, help="tokens of a question behind a context")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768], help="of a prefill"
    )
    parser.add_argument("--decode-contexts", type=int, nargs="+", default=[4096, 16384, 65536, 262144, 1048576])
    parser.add_argument("--ratio-mbit", type=float, default=12.5, help="of each link, in the prefill against its link")
    parser.add_argument("--full", type=int, default=4096, help="tokens of a prefill with nothing cached")
    parser.add_argument("--pieces", type=int, default=2, help="of the K/V heads, in the prefill against its link")
    parser.add_argument("--batch", type=int, default=4, help="sequences that are decoded")
    parser.add_argument("--picture", type=Path, help="where to draw the results")
    args = parser.parse_args()
    if reason := why_not_here():
        parser.error(reason)
    heads, flops = Heads(), 1e9 * args.gflops
    rates = Rates(flops, args.mbit * 1e6 / 8)
    if "context" in args.parts:
        cases = [Prefill(args.new, context) for context in args.contexts] + [Prefill(args.full, args.full)]
        contexts = args.decode_contexts
        network = {"fast_mbit": args.mbit, "slow_mbit": args.mbit}
        with Cluster(Network(num_ranks=RANKS, ranks_per_node=RANKS, **network)) as cluster:
            found = prefills(cluster, cases, heads, flops, args.repeats)
            print_prefills(found, heads, rates)
            steps = decodes(cluster, DECODES, heads, contexts, args.batch, flops, 5 * args.repeats)
            alone = {each: max(cluster.call(measure_alone, heads, each, args.batch, flops)) for each in contexts}
        print_decodes(steps, alone)
        if args.picture:
            prefill_s = {
                name: {context: found[Prefill(args.new, context), way].seconds for context in args.contexts}
                for name, way in zip(("pass-KV", "pass-Q", "pass-Q in two pieces"), WAYS, strict=True)
            }
            decode_s = {str(way): {context: steps[way, context].seconds for context in contexts} for way in DECODES}
            draw(prefill_s, decode_s | {"one rank": alone}, args.picture)
    if "link" in args.parts:
        network = {"fast_mbit": args.ratio_mbit, "slow_mbit": args.ratio_mbit}
        with Cluster(Network(num_ranks=RANKS, ranks_per_node=RANKS, **network)) as cluster:
            print("\n| link / kernel | kernel ms | link ms | prefill ms | over the larger |\n|---|---|---|---|---|")
            for ratio, each in ratios(cluster, Prefill(args.full, 0), heads, RATIOS, args.repeats, args.pieces).items():
                times = " | ".join(f"{1e3 * seconds:.0f}" for seconds in (each.kernel, each.link, each.prefill))
                print(f"| {ratio:g} | {times} | {each.over_larger:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
