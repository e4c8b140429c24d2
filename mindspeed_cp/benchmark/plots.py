"""Pictures of the results: time over sequence length, time over the slow link's rate, bytes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

Line = dict[str, Any]


def plot_all(lines: Sequence[Line], output: Path) -> Iterator[Path]:
    """Draw what varies in the results; the files written."""
    shapes = sorted({(line["num_ranks"], line["num_kv_heads"]) for line in lines})
    for num_ranks, num_kv_heads in shapes:
        chosen = [line for line in lines if (line["num_ranks"], line["num_kv_heads"]) == (num_ranks, num_kv_heads)]
        name = f"{num_ranks} ranks, {chosen[0]['num_heads']}:{num_kv_heads} heads"
        stem = f"{num_ranks}_ranks_{num_kv_heads}_kv_heads"
        longest = max(line["num_tokens"] for line in chosen)
        slowest = min(line["slow_mbit"] for line in chosen)
        of_slowest = [line for line in chosen if line["slow_mbit"] == slowest]
        of_longest = [line for line in chosen if line["num_tokens"] == longest]
        if len({line["num_tokens"] for line in chosen}) > 1:
            title = f"{name}, {slowest:g} Mbit/s between nodes"
            yield _plot_times(
                of_slowest, "num_tokens", "tokens of the sequence", title, output / f"time_tokens_{stem}.png"
            )
        if len({line["slow_mbit"] for line in chosen}) > 1:
            title, path = f"{name}, {longest} tokens", output / f"time_rate_{stem}.png"
            yield _plot_times(of_longest, "slow_mbit", "Mbit/s between nodes", title, path)
        at_one_point = [line for line in of_longest if line["slow_mbit"] == slowest]
        yield _plot_bytes(at_one_point, f"{name}, {longest} tokens", output / f"bytes_{stem}.png")


def _plot_times(lines: Sequence[Line], key: str, label: str, title: str, path: Path) -> Path:
    """Forward and backward time together, with the prediction as a thin line."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for number, algorithm in enumerate(dict.fromkeys(line["algorithm"] for line in lines)):
        own = [line for line in lines if line["algorithm"] == algorithm]
        places = sorted({line[key] for line in own})

        def total(what: str, own: list[Line] = own, places: list[float] = places) -> list[float]:
            return [sum(line[what] for line in own if line[key] == place) for place in places]

        color, marker = f"C{number % 10}", "os^vDP*X"[number // 2 % 8]
        axes.plot(places, total("predicted_seconds"), color=color, linewidth=0.8, linestyle=":")
        axes.plot(places, total("seconds"), color=color, marker=marker, label=algorithm)
    axes.set(xlabel=label, ylabel="forward and backward, seconds", title=f"{title} (dotted: predicted)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    return _save(figure, path)


def _plot_bytes(lines: Sequence[Line], title: str, path: Path) -> Path:
    """What all ranks send, forward and backward together."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    algorithms = list(dict.fromkeys(line["algorithm"] for line in lines))
    left = [0.0] * len(algorithms)
    for what in ("bytes_inside", "bytes_between"):
        mib = [sum(line[what] for line in lines if line["algorithm"] == name) / 2**20 for name in algorithms]
        axes.barh(algorithms, mib, left=left, label=f"{what.removeprefix('bytes_')} nodes")
        left = [before + more for before, more in zip(left, mib, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="MiB sent by all ranks, forward and backward", title=title)
    axes.legend()
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
