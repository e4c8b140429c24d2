"""Measure attention, forward and backward, with every algorithm: time, bytes, memory, and what was expected of them.

    python scripts/bench_attention.py --ranks 4 --ranks-per-node 2 --seq-lengths 8192 16384 --slow-mbit 100 200

Ranks run in an emulated cluster (mindspeed_cp/testing/emulated_cluster.py; needs root) or, with --loopback, on plain
loopback. The kernel is emulated too: it waits for as long as an accelerator of --gflops would compute, so that links,
algorithms and overlap are measured and not this machine's few cores; its results are zeros. --kernel cpu runs a real
kernel, and checks the results.

All algorithms take turns within one run. A time is the median over --iterations of the slowest rank's, from a start
that all ranks agree on. Shown beside it: the kernel's part; how long the busiest link takes for all that goes over it,
and the time over the larger of the two, which it cannot be below; what is exposed, which is all but the kernel's part;
how much of that was waiting in communication calls, as opposed to packing, merging and adding. K/V held are those of
other ranks that the fullest rank has at hand or kept, as its program says; memory is the process's highest resident set
(VmHWM) above what it held when the inputs were there. Written to --output: results.jsonl, a line for each algorithm and
pass, and plots.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_cp.benchmark import ranks
from mindspeed_cp.benchmark.cases import Algorithm, algorithms_for
from mindspeed_cp.benchmark.expected import ExpectedPass
from mindspeed_cp.benchmark.ranks import PassOfRank, RunOfRank
from mindspeed_cp.config import CHOICES
from mindspeed_cp.planner import AttentionShape, Network, Sent, busiest_link_seconds, predicted_bytes, predicted_seconds
from mindspeed_cp.program import Phase
from mindspeed_cp.testing.emulated_cluster import Cluster, add_network_arguments, why_not_here


class Setting(NamedTuple):
    """What one table is about."""

    network: Network
    case: AttentionShape
    emulated_network: bool
    flops_per_s: float | None


def measure(
    cluster: Cluster, setting: Setting, algorithms: Sequence[Algorithm], iterations: int, check: bool
) -> dict[str, list[list[RunOfRank]]]:
    """For each algorithm and iteration, the run of every rank; the algorithms take turns.

    In the first, which is not timed, memory is looked at and results are checked.
    """
    runs: dict[str, list[list[RunOfRank]]] = {algorithm.name: [] for algorithm in algorithms}
    for iteration in range(iterations + 1):
        _progress(f"{_title(setting)}: iteration {iteration} of {iterations}")
        for algorithm in algorithms:
            first = iteration == 0
            runs[algorithm.name].append(cluster.call(ranks.run, algorithm.name, setting.case, first, first and check))
    return runs


def records(
    setting: Setting, algorithms: Sequence[Algorithm], runs: dict[str, list[list[RunOfRank]]]
) -> Iterator[dict[str, Any]]:
    """A line of results for each pass and algorithm, as in results.jsonl."""
    for phase in Phase:
        lines = [_record(setting, algorithm, phase, runs[algorithm.name]) for algorithm in algorithms]
        best = min(line["seconds"] for line in lines if line["kind"] != "single device")
        for line in lines:
            yield line | {"ratio_to_best": line["seconds"] / best}


def _record(setting: Setting, algorithm: Algorithm, phase: Phase, runs: list[list[RunOfRank]]) -> dict[str, Any]:
    network, case = setting.network, setting.case
    first, *timed = [[getattr(run, phase.value) for run in iteration] for iteration in runs]
    slowest = [max(iteration, key=lambda rank: rank.seconds) for iteration in timed]
    flops_per_s = setting.flops_per_s or _flops_per_s(timed)
    expected = ExpectedPass(algorithm, case, phase, flops_per_s)
    sent = [predicted_bytes(network, expected.events(rank), rank) for rank in range(network.num_ranks)]
    predicted = predicted_seconds(network, expected.events)
    seconds = statistics.median(rank.seconds for rank in slowest)
    return {
        "algorithm": algorithm.name,
        "kind": algorithm.kind,
        "pass": phase.value,
        **asdict(network),
        "emulated_network": setting.emulated_network,
        **asdict(case),
        "kernel": "cpu" if setting.flops_per_s is None else "emulated",
        "flops_per_s": flops_per_s,
        "iterations": len(slowest),
        "seconds": seconds,
        "all_seconds": [rank.seconds for rank in slowest],
        "kernel_seconds": statistics.median(rank.kernel_seconds for rank in slowest),
        "exposed_seconds": statistics.median(rank.seconds - rank.kernel_seconds for rank in slowest),
        "waiting_seconds": statistics.median(rank.waiting_seconds for rank in slowest),
        "link_seconds": busiest_link_seconds(network, expected.events),
        "predicted_seconds": predicted,
        "measured_over_predicted": seconds / predicted,
        "bytes_sent": sum(rank.counted for rank in first),
        "bytes_by_formula": expected.num_bytes(),
        "bytes_inside": sum(rank.inside for rank in first),
        "bytes_between": sum(rank.between for rank in first),
        "bytes_as_predicted": [Sent(rank.inside, rank.between) for rank in first] == sent,
        "card_bytes_inside": sum(rank.cards.inside for rank in first),
        "card_bytes_between": sum(rank.cards.between for rank in first),
        "most_bytes_between_of_a_rank": max(rank.between for rank in first),
        "held_bytes": expected.held_bytes(),
        "peak_bytes": max(run.peak_bytes or 0 for run in runs[0]),
        "errors": _worst_errors(runs[0]),
    }


def _flops_per_s(timed: list[list[PassOfRank]]) -> float:
    """What the real kernel did on a rank."""
    work = [rank for iteration in timed for rank in iteration if rank.kernel_seconds]
    return sum(rank.flops for rank in work) / sum(rank.kernel_seconds for rank in work)


def _worst_errors(runs: list[RunOfRank]) -> dict[str, float] | None:
    """The largest on any rank; None where the results mean nothing."""
    found = [run.errors for run in runs if run.errors]
    return {name: max(errors[name] for errors in found) for name in found[0]} if found else None


def _title(setting: Setting) -> str:
    network, case = setting.network, setting.case
    place = f"{network.num_ranks // network.ranks_per_node} nodes of {network.ranks_per_node}"
    links = f"{network.fast_mbit:g} and {network.slow_mbit:g} Mbit/s, slow link per {network.slow_link}"
    if not setting.emulated_network:
        links = "plain loopback, rates without effect"
    return f"{place} ({links}), {case.num_tokens} tokens, {case.num_heads}:{case.num_kv_heads} heads"


def table(setting: Setting, lines: Sequence[dict[str, Any]]) -> str:
    """The results of one setting, to be read."""
    text = [_title(setting)]
    mib = 2**20
    for phase in Phase:
        text.append(
            f"\n  {phase.value:29s}{'ms':>8s}{'/best':>7s}{'kernel':>8s}{'link':>8s}{'/larger':>8s}{'exposed':>8s}"
            f"{'waiting':>8s}{'predicted':>10s}{'meas/pred':>10s}{'MiB inside':>11s}{'between':>9s}{'formula':>9s}"
            f"{'cards':>9s}{'K/V held':>9s}{'peak MiB':>9s}  error"
        )
        for line in (line for line in lines if line["pass"] == phase.value):
            errors = line["errors"]
            cards = line["card_bytes_inside"] + line["card_bytes_between"]
            text.append(
                f"  {line['algorithm']:29s}{line['seconds'] * 1e3:8.0f}{line['ratio_to_best']:7.2f}"
                f"{line['kernel_seconds'] * 1e3:8.0f}{line['link_seconds'] * 1e3:8.0f}"
                f"{line['seconds'] / max(line['kernel_seconds'], line['link_seconds']):8.2f}"
                f"{line['exposed_seconds'] * 1e3:8.0f}"
                f"{line['waiting_seconds'] * 1e3:8.0f}"
                f"{line['predicted_seconds'] * 1e3:10.0f}{line['measured_over_predicted']:10.3f}"
                f"{line['bytes_inside'] / mib:11.2f}{line['bytes_between'] / mib:9.2f}"
                f"{line['bytes_by_formula'] / mib:9.2f}{cards / mib:9.2f}{line['held_bytes'] / mib:9.2f}"
                f"{line['peak_bytes'] / mib:9.1f}"
                f"  {'none' if errors is None else f'{max(errors.values()):.1e}'}"
            )
    return "\n".join(text)


def _progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--slow-mbit", type=float, nargs="+", default=[200.0], help="rates between nodes")
    add_network_arguments(parser)
    parser.add_argument("--loopback", action="store_true", help="no network namespaces, no rates")
    parser.add_argument(
        "--seq-lengths", type=int, nargs="+", default=[4096, 16384], help="tokens of all ranks together"
    )
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2], help="as many as heads is MHA, fewer GQA")
    parser.add_argument("--head-size", type=int, default=32)
    parser.add_argument(
        "--dtype-bytes", type=int, choices=sorted(ranks.DTYPES), default=2, help="2 bfloat16, 4 float32"
    )
    parser.add_argument("--kernel", choices=("emulated", "cpu"), default="emulated")
    parser.add_argument("--gflops", type=float, default=20.0, help="of the emulated accelerator, 10^9 a second")
    parser.add_argument(
        "--check-up-to", type=int, default=8192, help="tokens up to which a real kernel's results are checked"
    )
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--pieces", type=int, default=1, help="of the K/V heads, for rings with overlap")
    parser.add_argument(
        "--policies",
        choices=CHOICES["context_parallel_kv_cache_policy"],
        nargs="*",
        default=[],
        help="of kept K/V, for rings with overlap",
    )
    parser.add_argument("--deepspeed", action="store_true", help="its Ulysses as well, as far as it is installed")
    parser.add_argument("--algorithms", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_attention"))
    args = parser.parse_args(arguments)
    for num_ranks in args.ranks:
        for tokens in args.seq_lengths:
            if tokens % (2 * num_ranks):
                parser.error(f"--seq-lengths {tokens} is not a multiple of 2 * --ranks {num_ranks}")
        if num_ranks % args.ranks_per_node:
            parser.error(f"--ranks {num_ranks} do not fill nodes of --ranks-per-node {args.ranks_per_node}")
    if bad := [number for number in args.kv_heads if args.heads % number]:
        parser.error(f"--kv-heads {bad[0]} does not divide --heads {args.heads}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, measure, write and plot; the exit status."""
    args = _arguments(arguments)
    emulated = not args.loopback
    if emulated and (reason := why_not_here()):
        print(f"Plain loopback instead of a cluster: {reason} Rates, predictions and card bytes mean nothing.")
        emulated = False
    flops_per_s = args.gflops * 1e9 if args.kernel == "emulated" else None
    if flops_per_s:
        print(f"The kernel is emulated, {args.gflops:g} GFLOP/s: it waits, and its results mean nothing.")
    args.output.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    with (args.output / "results.jsonl").open("w") as file:
        for num_ranks in args.ranks:
            network = Network(
                num_ranks=num_ranks,
                ranks_per_node=args.ranks_per_node,
                fast_mbit=args.fast_mbit,
                slow_mbit=args.slow_mbit[0],
                slow_link=args.slow_link,
            )
            with Cluster(network, emulated=emulated, preload=["mindspeed_cp.benchmark.ranks"]) as cluster:
                for setting, algorithms in _settings(args, cluster, emulated, flops_per_s):
                    if all(algorithm.kind == "single device" for algorithm in algorithms):
                        print(f"{_title(setting)}: no algorithm of that name takes so many heads.", flush=True)
                        continue
                    check = flops_per_s is None and setting.case.num_tokens <= args.check_up_to
                    runs = measure(cluster, setting, algorithms, args.iterations, check)
                    new = list(records(setting, algorithms, runs))
                    file.writelines(json.dumps(line) + "\n" for line in new)
                    file.flush()
                    lines += new
                    print(table(setting, new), flush=True)
    _plot(lines, args.output)
    return 0


def _settings(
    args: argparse.Namespace, cluster: Cluster, emulated: bool, flops_per_s: float | None
) -> Iterator[tuple[Setting, list[Algorithm]]]:
    """Everything to be measured on a cluster, which is made ready for it."""
    prepared: set[str] = set()
    for num_kv_heads in args.kv_heads:
        for num_tokens in args.seq_lengths:
            case = AttentionShape(
                num_tokens=num_tokens,
                num_heads=args.heads,
                num_kv_heads=num_kv_heads,
                head_size=args.head_size,
                element_size=args.dtype_bytes,
            )
            algorithms = algorithms_for(
                case, cluster.network.num_ranks, args.pieces, args.policies, deepspeed=args.deepspeed
            )
            if args.algorithms:
                algorithms = [each for each in algorithms if any(part in each.name for part in args.algorithms)]
            for algorithm in algorithms:
                if algorithm.name not in prepared:
                    cluster.call(ranks.prepare, cluster.network, algorithm, case, flops_per_s)
                    prepared.add(algorithm.name)
            for slow_mbit in args.slow_mbit:
                cluster.set_slow_rate(slow_mbit)
                yield Setting(cluster.network, case, emulated, flops_per_s), algorithms


def _plot(lines: Sequence[dict[str, Any]], output: Path) -> None:
    try:
        from mindspeed_cp.benchmark.plots import plot_all
    except ImportError as error:
        print(f"no plots: {error}")
        return
    for path in plot_all(lines, output):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
