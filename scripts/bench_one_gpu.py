"""How near one rank of a ring comes to its attention kernel, measured on a single GPU.

    python scripts/bench_one_gpu.py --json runs/bench.jsonl --plot runs/bench.png   # all of it, on the GPU that is here
    python scripts/bench_one_gpu.py --kernels all --tokens 8192 --ranks 8           # every kernel that can compute it
    python scripts/bench_one_gpu.py --merge torch                                   # without the fused merge
    python scripts/bench_one_gpu.py --device cpu                                    # small sizes: a smoke test

with mindspeed_cp installed, or PYTHONPATH=. in a checkout; pictures need matplotlib.

One rank of a causal zigzag ring is run by the library's own code, forward and backward, with a communicator that moves
nothing: the time is that of kernels, merges, accumulation, packing and Python, as if every message arrived in time. It
is held against the same kernel on the whole sequence in one call, divided by the number of ranks: what attention
without any context parallelism would take for the rank's share. Where the whole sequence does not fit into memory, the
dense call is of about the rank's own FLOPs, and the table marks it.

Ranks differ in the shape of their work, not in its amount: the first one has half its queries over whole blocks, the
last one all its queries over half blocks, those between have some of each. The first and the last are measured, and the
slower one counts. Times are medians after a warm-up; Python counts as far as the GPU waits for it.
"""

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmark.kernel import block_flops
from mindspeed_cp.attention import Attention, RingCommunicators, compose_attention, local_attention
from mindspeed_cp.attention.exchange import BlockFormat
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.device import accelerator
from mindspeed_cp.kernels import KERNELS, MERGE_KERNELS, BlockCase, KernelRegistry, Window, choose_merge_kernel
from mindspeed_cp.kernels.protocol import TRIANGLE
from mindspeed_cp.plan import AttentionPlan

ON_GPU = {"tokens": [4096, 8192, 16384, 32768], "ranks": [2, 4, 8], "heads": ["32:32", "64:8"], "head_size": 128}
ON_CPU = {"tokens": [128, 256], "ranks": [2, 4], "heads": ["4:4", "8:2"], "head_size": 64}
"""Sizes that are measured by default."""


@dataclass(frozen=True)
class RingCase:
    """What is measured: a rank of a causal ring. tokens: of one rank."""

    num_ranks: int
    tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        """In words, for the progress."""
        return f"{self.num_ranks} ranks, {self.tokens} tokens a rank, {self.heads} heads of {self.head_size}"

    @property
    def heads(self) -> str:
        """Query and key/value heads, 32:8."""
        return f"{self.num_heads}:{self.num_kv_heads}"

    @property
    def config(self) -> ContextParallelConfig:
        """The plain ring, with overlap: what moves nothing takes no time either."""
        return ContextParallelConfig(
            context_parallel_size=self.num_ranks,
            context_parallel_algo="megatron_cp_algo",
            use_cp_send_recv_overlap=True,
        )

    def blocks(self, rank: int) -> list[BlockCase]:
        """What the rank's kernel computes, by owner of the keys."""
        shards = self.config.layout.of(self.tokens)
        plan = AttentionPlan(shards, shards)
        tiles = (tile for owner in range(self.num_ranks) for tile in plan.tiles(rank, owner))
        return [self._block(tile.num_queries, tile.num_keys, Window(tile.left, tile.right)) for tile in tiles]

    def dense(self, tokens: int) -> BlockCase:
        """Causal attention of so many tokens in one call."""
        return self._block(tokens, tokens, TRIANGLE)

    def inputs(self, tokens: int) -> list[Tensor]:
        """Random q, k, v and dout in the order of dimensions that kernels index, and in memory as Megatron has them."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        *qkv, dout = (
            torch.randn(tokens, 1, each, self.head_size, dtype=self.dtype, device=self.device).permute(1, 2, 0, 3)
            for each in heads
        )
        return [*(x.requires_grad_() for x in qkv), dout]

    def _block(self, num_queries: int, num_keys: int, window: Window) -> BlockCase:
        return BlockCase(
            device_type=self.device,
            dtype=self.dtype,
            window=window,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            num_queries=num_queries,
            num_keys=num_keys,
            head_size=self.head_size,
            value_head_size=self.head_size,
            compute_capability=torch.cuda.get_device_capability() if self.device == "cuda" else None,
        )


class ImmediateCommunicator:
    """The Communicator of a ring of which one rank is run: what is exchanged has arrived at once, and no byte moves.

    stand_in: what is received, [as many numbers as the longest message or more]. It takes the place of the buffer's own
    memory, which is given back; None leaves the buffer as it was allocated, so that peak memory is the real one.
    """

    def __init__(self, rank: int, size: int, stand_in: Tensor | None) -> None:
        self.rank, self.size, self.stand_in = rank, size, stand_in

    def exchange(self, send: Tensor | None, to: int, receive: Tensor | None, source: int) -> "ImmediateCommunicator":
        """See Communicator.exchange; the transfer that is returned is over."""
        if receive is not None and self.stand_in is not None:
            receive.set_(self.stand_in[: receive.numel()])
        return self

    def wait(self) -> None:
        """See Transfer.wait."""


@dataclass(frozen=True)
class Kernels:
    """What a ring is made of. merge: name of the kernel that merges its blocks."""

    blocks: KernelRegistry
    merge: str


def ring_attention(case: RingCase, rank: int, kernels: Kernels, stand_in: Tensor | None) -> Attention:
    """The rank's attention, composed as a training layer composes it: here is said what it is made of."""
    communicator = ImmediateCommunicator(rank, case.num_ranks, stand_in)
    ring = RingCommunicators(inner=communicator, outer=communicator, gradients=communicator)
    merge_kernels = [kernel for kernel in MERGE_KERNELS if kernel.name == kernels.merge]
    return compose_attention(
        case.config, rank=rank, ulysses=None, ring=ring, kernels=kernels.blocks, merge_kernels=merge_kernels
    )


class Measured(NamedTuple):
    """What one attention takes.

    forward_s, both_s: median seconds of the forward pass, and of forward and backward. spread: the larger one's
    interquartile range over its median. peak_bytes: the most memory held above the inputs; None on a CPU.
    """

    forward_s: float
    both_s: float
    spread: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """Times of one phase, in seconds, for the FLOPs of one rank. ring_s: by rank."""

    flops: float
    ring_s: dict[int, float]
    dense_s: float

    @property
    def ring_tflops(self) -> float:
        """TFLOP/s of the slowest rank."""
        return self.flops / max(self.ring_s.values()) / 1e12

    @property
    def dense_tflops(self) -> float:
        """TFLOP/s of the dense call."""
        return self.flops / self.dense_s / 1e12

    @property
    def percent_of_dense(self) -> float:
        """Speed of the slowest rank, the dense call being 100."""
        return 100 * self.dense_s / max(self.ring_s.values())

    def record(self) -> dict[str, object]:
        """Everything as JSON has it."""
        derived = ("ring_tflops", "dense_tflops", "percent_of_dense")
        return {**vars(self), **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True)
class Row:
    """What was measured of one case.

    kernels: names of those that computed the blocks. merge: of that which merged them. dense_kernel, dense_tokens: the
    call that it is held against.
    spread: the largest interquartile range of all its times, over the median.
    """

    case: RingCase
    kernels: tuple[str, ...]
    merge: str
    dense_kernel: str
    dense_tokens: int
    forward: Comparison
    forward_and_backward: Comparison
    spread: float
    ring_peak_bytes: int | None
    dense_peak_bytes: int | None

    @property
    def dense_is_whole_sequence(self) -> bool:
        """Whether the dense call was of the tokens of all ranks."""
        return self.dense_tokens == self.case.tokens * self.case.num_ranks

    def record(self) -> dict[str, object]:
        """Everything as JSON has it."""
        return {
            **vars(self.case),
            **vars(self),
            "case": str(self.case),
            "dtype": _name(self.case.dtype),
            "dense_is_whole_sequence": self.dense_is_whole_sequence,
            "forward": self.forward.record(),
            "forward_and_backward": self.forward_and_backward.record(),
        }


def measure(case: RingCase, kernels: Kernels, least_s: float) -> Row:
    """Time the case's first and last rank and the dense call, each for `least_s` seconds at least.

    Raises NotImplementedError where no kernel can compute it, torch.OutOfMemoryError where it does not fit.
    """
    ranks = (0, case.num_ranks - 1)
    names = dict.fromkeys(kernels.blocks.choose(block).name for rank in ranks for block in case.blocks(rank))
    ring = {rank: _measure_rank(case, rank, kernels, least_s) for rank in ranks}
    # The very kernel of the ring's triangles, whatever is preferred for longer sequences.
    dense_kernel = kernels.blocks.choose(case.dense(case.tokens)).name
    dense_tokens, dense = _measure_dense(case, kernels.blocks.only([dense_kernel]), least_s)
    flops = sum(block_flops(block, batch=1) for block in case.blocks(0))
    both_flops = flops + sum(block_flops(block, batch=1, backward=True) for block in case.blocks(0))
    share = flops / block_flops(case.dense(dense_tokens), batch=1)
    return Row(
        case,
        tuple(names),
        kernels.merge,
        dense_kernel,
        dense_tokens,
        Comparison(flops, {rank: each.forward_s for rank, each in ring.items()}, dense.forward_s * share),
        Comparison(both_flops, {rank: each.both_s for rank, each in ring.items()}, dense.both_s * share),
        spread=max(each.spread for each in (dense, *ring.values())),
        ring_peak_bytes=max((each.peak_bytes for each in ring.values() if each.peak_bytes is not None), default=None),
        dense_peak_bytes=dense.peak_bytes,
    )


def _measure_rank(case: RingCase, rank: int, kernels: Kernels, least_s: float) -> Measured:
    q, k, v, dout = case.inputs(case.tokens)
    peak_bytes = _peak_bytes(_passes(ring_attention(case, rank, kernels, None), q, k, v, dout)[1], case.device)
    stand_in = torch.randn(BlockFormat.of(k, v).numel(case.tokens), dtype=case.dtype, device=case.device)
    attention = ring_attention(case, rank, kernels, stand_in)
    return _timed(_passes(attention, q, k, v, dout), peak_bytes, case.device, least_s)


def _measure_dense(case: RingCase, kernels: KernelRegistry, least_s: float) -> tuple[int, Measured]:
    """The dense call's tokens and what it takes: of all ranks' tokens, or of about one rank's FLOPs."""
    attention = local_attention(causal=True, kernels=kernels)

    def call_of(tokens: int) -> tuple[int, Measured]:
        passes = _passes(attention, *case.inputs(tokens))
        return tokens, _timed(passes, _peak_bytes(passes[1], case.device), case.device, least_s)

    try:
        return call_of(case.tokens * case.num_ranks)
    except torch.OutOfMemoryError:
        pass  # What the failed call holds is free only after this clause.
    _empty_cache(case.device)
    # FLOPs grow with the square of the tokens; a kernel's tiles are whole.
    return call_of(math.ceil(case.tokens * math.sqrt(case.num_ranks) / 128) * 128)


def _passes(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass, and both passes."""
    return lambda: attention(q, k, v), lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), dout)


def _timed(passes: Sequence[Callable[[], object]], peak_bytes: int | None, device: str, least_s: float) -> Measured:
    """The times of the forward pass and of both, beside the memory that was found."""

    def clock() -> float:
        # Torch's own clock waits for NPUs only in newer releases.
        if device != "cpu":
            getattr(torch, device).synchronize()
        return time.perf_counter()

    forward, both = (
        Timer("run()", globals={"run": run}, timer=clock, num_threads=torch.get_num_threads()).adaptive_autorange(
            min_run_time=least_s, max_run_time=10 * least_s
        )
        for run in passes
    )
    spread = max(each.iqr / each.median for each in (forward, both))
    return Measured(forward.median, both.median, spread, peak_bytes)


def _peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """The most memory that `run` holds above what is there before it; None on a CPU, where torch does not count it."""
    if device == "cpu":
        return None
    backend = getattr(torch, device)
    backend.reset_peak_memory_stats()
    before: int = backend.memory_allocated()
    run()
    peak: int = backend.max_memory_allocated()
    return peak - before


def _empty_cache(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).empty_cache()


# What is printed and drawn.


def environment(device: str) -> dict[str, str]:
    """Date, device and versions."""
    on_cpu = device == "cpu"
    name = f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}"
    return {
        "date": date.today().isoformat(),
        "device_name": name if on_cpu else getattr(torch, device).get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none"),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(rows: Sequence[Row]) -> str:
    """The rows, one or more, as Markdown, with what their marks mean."""
    head = (
        "| ranks | tokens a rank | heads | kernel | forward TFLOP/s | dense | % of dense "
        "| forward + backward TFLOP/s | dense | % of dense | peak memory |"
    )
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        mark = "" if row.dense_is_whole_sequence else "*"
        phases = [
            f"{phase.ring_tflops:.3g} | {phase.dense_tflops:.3g}{mark} | {phase.percent_of_dense:.1f}"
            for phase in (row.forward, row.forward_and_backward)
        ]
        memory = "-" if row.ring_peak_bytes is None else f"{row.ring_peak_bytes / 2**30:.2f} GiB"
        kernel = ", ".join(row.kernels)
        case = f"{row.case.num_ranks} | {row.case.tokens} | {row.case.heads} | {kernel}"
        lines.append(f"| {case} | {phases[0]} | {phases[1]} | {memory} |")
    sizes = f"head size {rows[0].case.head_size}, {_name(rows[0].case.dtype)}, batch 1, causal"
    lines += ["", f"The slower of the first and the last rank of a zigzag ring; no communication. {sizes}."]
    lines.append(f"Blocks are merged by {rows[0].merge}.")
    lines.append(f"Interquartile range of the times over their median: {max(row.spread for row in rows):.1%} at most.")
    if any(row.dense_is_whole_sequence for row in rows):
        lines.append("dense: the same kernel on the tokens of all ranks in one call, divided by the ranks.")
    if not all(row.dense_is_whole_sequence for row in rows):
        lines.append("*: that did not fit into memory; one call of about the FLOPs of one rank, scaled to them.")
    if any(row.ring_peak_bytes is None for row in rows):
        lines.append("Peak memory is not measured on a CPU.")
    else:
        lines.append("Peak memory: of one rank's forward and backward pass, above its q, k, v and dout.")
    return "\n".join(lines)


def draw(rows: Sequence[Row], title: str, image: Path) -> None:
    """Percent of the dense kernel over tokens a rank, a line for each number of ranks, heads and kernel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def name(row: Row) -> str:
        return f"{row.case.num_ranks} ranks, {row.case.heads}, {', '.join(row.kernels)}"

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for panel, phase in zip(panels, ("forward", "forward_and_backward"), strict=True):
        for label in dict.fromkeys(map(name, rows)):
            line = sorted((row.case.tokens, getattr(row, phase).percent_of_dense) for row in rows if name(row) == label)
            panel.plot(*zip(*line, strict=True), marker="o", label=label)
        panel.axhline(100, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        sizes = sorted({row.case.tokens for row in rows})
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.set_title(phase.replace("_", " "))
        panel.set_xlabel("tokens a rank")
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)  # Of both, after the last line: it ends the scaling to what is drawn.
    panels[0].set_ylabel("percent of one dense call")
    panels[1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title)
    figure.tight_layout()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=120)
    pyplot.close(figure)


# The command.


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked, sizes filled in; cases and registries of kernels as `cases` and `registries`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "npu", "cpu"), default=accelerator() or "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of each rank")
    parser.add_argument("--ranks", type=int, nargs="+", help="sizes of the ring")
    parser.add_argument("--heads", nargs="+", metavar="N:G", help="query heads, and key/value heads")
    parser.add_argument("--head-size", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--kernels",
        nargs="+",
        metavar="NAME",
        help="measure each of these by itself, or `all`; else those that are chosen",
    )
    parser.add_argument(
        "--merge", choices=[kernel.name for kernel in MERGE_KERNELS], help="what merges blocks; else what is chosen"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each time is measured, at least")
    parser.add_argument("--json", type=Path, help="file to write a line for each case to")
    parser.add_argument("--plot", type=Path, help="PNG to draw percent of dense into")
    args = parser.parse_args(argv)

    here = accelerator() or "cpu"
    if args.device not in (here, "cpu"):
        parser.error(f"--device {args.device} is not on this machine; use {here}.")
    for name, default in (ON_CPU if args.device == "cpu" else ON_GPU).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if odd := [tokens for tokens in args.tokens if tokens < 2 or tokens % 2]:
        parser.error(
            f"--tokens {odd[0]} is not a multiple of the 2 chunks that a rank holds; use {max(2, odd[0] + 1)}."
        )
    if alone := [size for size in args.ranks if size < 2]:
        parser.error(f"--ranks {alone[0]}: a ring has 2 ranks or more.")
    try:
        heads = [(num_heads, num_kv_heads) for num_heads, num_kv_heads in (map(int, x.split(":")) for x in args.heads)]
        fitting = all(num_kv_heads > 0 and num_heads % num_kv_heads == 0 for num_heads, num_kv_heads in heads)
    except ValueError:
        fitting = False
    if not fitting:
        parser.error(f"--heads {' '.join(args.heads)}: query heads, a multiple of the key/value heads, like 32:8.")
    try:
        args.registries = _registries(args.kernels)
    except ValueError as error:
        parser.error(f"--kernels: {error}")
    dtype = getattr(torch, args.dtype)
    merge_kernels = [kernel for kernel in MERGE_KERNELS if args.merge in (None, kernel.name)]
    try:
        args.merge = choose_merge_kernel(args.device, dtype, merge_kernels).name
    except NotImplementedError as error:
        parser.error(f"--merge {args.merge}: {error}")
    args.cases = [
        RingCase(num_ranks, tokens, *each, args.head_size, dtype, args.device)
        for each, num_ranks, tokens in itertools.product(heads, args.ranks, args.tokens)
    ]
    return args


def _registries(names: Sequence[str] | None) -> dict[str, KernelRegistry]:
    if names is None:
        return {"chosen kernels": KERNELS}
    return {name: KERNELS.only([name]) for name in (KERNELS.names if names == ["all"] else names)}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, measure, print and draw; the exit status, 1 where nothing could be measured."""
    args = parse_arguments(argv)
    machine = environment(args.device)
    title = ", ".join(
        [machine["date"], machine["device_name"], *(f"{name} {machine[name]}" for name in ("torch", "cuda", "cudnn"))]
    )
    if args.device == "cpu":
        title += "\nCPU: a smoke test at small sizes, no statement about a GPU"
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("")
    rows: list[Row] = []
    left_out: list[str] = []
    choices: dict[tuple[str, ...], str] = {}
    runs = list(itertools.product(args.cases, args.registries.items()))
    for number, (case, (name, kernels)) in enumerate(runs, start=1):
        print(f"{number}/{len(runs)}  {case}, {name}", end="  ", file=sys.stderr, flush=True)
        try:
            row = measure(case, Kernels(kernels, args.merge), args.seconds)
        except RuntimeError as error:  # No kernel for it, no memory, a kernel that fails: the others are worth having.
            left_out.append(f"{case}, {name}: {type(error).__name__}: {error}")
            print(f"left out: {type(error).__name__}", file=sys.stderr)
            continue
        finally:
            _empty_cache(args.device)
        rows.append(row)
        for block in (*case.blocks(0), *case.blocks(case.num_ranks - 1)):
            choices.setdefault((name, case.heads, kernels.choose(block).name), kernels.explain(block))
        print(f"{row.forward_and_backward.percent_of_dense:.1f} % of dense", file=sys.stderr)
        if args.json:
            with args.json.open("a") as file:
                print(json.dumps({**machine, **row.record()}), file=file)

    if rows:
        print(title, table(rows), *choices.values(), sep="\n\n")
    if left_out:
        print("", "Left out:", *left_out, sep="\n")
    if rows and args.plot:
        draw(rows, title, args.plot)
        print(f"\ndrawn into {args.plot}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
