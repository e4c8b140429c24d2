"""Pictures of the results: time over sequence length and over the slow link's rate, bytes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

Line = dict[str, Any]
Times = dict[str, dict[float, float]]
"""Seconds of an algorithm, by its name, at each place of an axis."""

BASELINES = ("single device", "all-gather K/V")


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
    """Forward and backward time together."""
    places = sorted({line[key] for line in lines})
    seconds: Times = {}
    for line in lines:
        seconds.setdefault(line["algorithm"], dict.fromkeys(places, 0.0))[line[key]] += line["seconds"]
    return plot_times(seconds, label, title, path)


def plot_times(seconds: Times, label: str, title: str, path: Path) -> Path:
    """Draw how many times as long as the fastest each algorithm takes, at each place; which those are is the title.

    label: of the places. An algorithm that was measured with overlap is left out without it.
    """
    shown = {name: times for name, times in seconds.items() if f"{name}, overlap" not in seconds}
    parallel = {name: times for name, times in shown.items() if name not in BASELINES}
    places = sorted(next(iter(seconds.values())))
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    best = [min(times[place] for times in parallel.values()) for place in places]
    for number, (name, times) in enumerate(shown.items()):
        ratios = [times[place] / least for place, least in zip(places, best, strict=True)]
        color, linestyle = ("grey", "--") if name in BASELINES else (f"C{number}", "-")
        axes.plot(places, ratios, color=color, linestyle=linestyle, marker="os^vDP*X"[number % 8], label=name)
    fastest = [min(parallel, key=lambda name: parallel[name][place]) for place in places]
    axes.set(xlabel=label, ylabel="times the fastest (1)", title=f"{_winners(places, fastest)}\n{title}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_ylim(0.9, 4.0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _save(figure, path)


def _winners(places: Sequence[float], fastest: Sequence[str]) -> str:
    """Who is fastest where, in a sentence."""
    runs: list[tuple[str, list[float]]] = []
    for place, name in zip(places, fastest, strict=True):
        if runs and runs[-1][0] == name:
            runs[-1][1].append(place)
        else:
            runs.append((name, [place]))
    parts = [f"{name} at {held[0]:g}{f' to {held[-1]:g}' if len(held) > 1 else ''}" for name, held in runs]
    return f"Fastest: {'; '.join(parts)}"


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
