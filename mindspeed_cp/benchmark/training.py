"""Speed and memory of Megatron training: what scripts/bench_training.py compares, reads off a run, prints and draws."""

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ELAPSED = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
RING = ("--context-parallel-algo", "megatron_cp_algo")


@dataclass(frozen=True)
class Configuration:
    """A way to train. flags: for so many ranks."""

    name: str
    ranks: int
    flags: tuple[str, ...]


def configurations(ranks: int) -> list[Configuration]:
    """All that are compared: CP 1, and each algorithm on `ranks` ranks, which are even."""
    half = str(ranks // 2)
    parallel = {
        "Ulysses": (),
        "ring": RING,
        "ring, overlap": (*RING, "--use-cp-send-recv-overlap"),
        "double ring": (*RING, "--cp-window-size", half),
        "hybrid": ("--context-parallel-algo", "hybrid_cp_algo", "--ulysses-degree-in-cp", half),
    }
    size = ("--context-parallel-size", str(ranks))
    return [
        Configuration("CP 1", 1, ()),
        Configuration("CP 1, full recomputation", 1, RECOMPUTE),
        *(Configuration(f"{name}, CP {ranks}", ranks, (*size, *flags)) for name, flags in parallel.items()),
    ]


@dataclass(frozen=True)
class Measurement:
    """One run. tokens: length of the sequence. peak_mib: resident size of the largest rank, all of it."""

    configuration: str
    tokens: int
    seconds_per_iteration: float
    peak_mib: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the sequence over the time of an iteration."""
        return self.tokens / self.seconds_per_iteration


def seconds_in(log: str) -> float:
    """Median time of an iteration in a log's text, the first left out. Raises ValueError where there is no other."""
    milliseconds = [float(match) for match in ELAPSED.findall(log)][1:]
    if not milliseconds:
        raise ValueError("the log has no second iteration")
    return statistics.median(milliseconds) / 1000


def longest_that_fit(measurements: Iterable[Measurement], baseline_mib: dict[str, float], mib: float) -> dict[str, int]:
    """The longest sequence of each configuration whose memory above the baseline is at most `mib`; 0 where none is."""
    longest: dict[str, int] = {}
    for one in measurements:
        fits = one.peak_mib - baseline_mib[one.configuration] <= mib
        longest[one.configuration] = max(longest.get(one.configuration, 0), one.tokens if fits else 0)
    return longest


def table(measurements: list[Measurement], baseline_mib: dict[str, float], mib: float) -> str:
    """The measurements in Markdown: a row for each configuration, a column for each length."""
    lengths = sorted({one.tokens for one in measurements})
    longest = longest_that_fit(measurements, baseline_mib, mib)
    rows = [
        ["", *(f"{length} tokens" for length in lengths), f"longest in {mib:.0f} MiB"],
        ["---"] * (len(lengths) + 2),
    ]
    for name in dict.fromkeys(one.configuration for one in measurements):
        found = {one.tokens: one for one in measurements if one.configuration == name}
        cells = [
            f"{found[length].tokens_per_second:.0f} tokens/s, {found[length].peak_mib - baseline_mib[name]:.0f} MiB"
            if length in found
            else "-"
            for length in lengths
        ]
        rows.append([name, *cells, str(longest[name])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(measurements: list[Measurement], baseline_mib: dict[str, float], mib: float, image: Path) -> None:
    """Draw memory and speed over the length of the sequence into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, speed) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for name in dict.fromkeys(one.configuration for one in measurements):
        found = [one for one in measurements if one.configuration == name]
        lengths = [one.tokens for one in found]
        memory.loglog(lengths, [max(one.peak_mib - baseline_mib[name], 1) for one in found], marker="o", label=name)
        speed.loglog(lengths, [one.tokens_per_second for one in found], marker="o", label=name)
    memory.axhline(mib, color="gray", linestyle="--", linewidth=1, label=f"limit of {mib:.0f} MiB")
    longest = longest_that_fit(measurements, baseline_mib, mib)
    most = max(longest.values())
    first = "; ".join(name for name, tokens in longest.items() if tokens == most)
    memory.set_title(f"longest within the limit: {most} tokens ({first})")
    speed.set_title("all ranks on this machine's cores")
    memory.set_ylabel("MiB of the largest rank above its start")
    speed.set_ylabel("tokens per second")
    for axes in (memory, speed):
        axes.set_xlabel("tokens of a sequence")
        axes.grid(alpha=0.3, which="both")
    memory.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(image, dpi=120)
