"""One rank of a ring beside its attention kernel: what scripts/bench_one_gpu.py measures, prints and draws."""

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from mindspeed_cp.attention import Attention, RingCommunicators, compose_attention, local_attention
from mindspeed_cp.attention.blocks import BlockFormat
from mindspeed_cp.benchmark.kernels import block_flops
from mindspeed_cp.comm import Addressed, Sizes
from mindspeed_cp.comm.communicator import one_each_way
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.kernels import MERGE_KERNELS, KernelRegistry, TileCase, Window
from mindspeed_cp.kernels.protocol import TRIANGLE
from mindspeed_cp.plan import AttentionPlan


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

    def blocks(self, rank: int) -> list[TileCase]:
        """What the rank's kernel computes, by owner of the keys."""
        shards = self.config.layout.of(self.tokens)
        plan = AttentionPlan(shards, shards)
        tiles = (tile for owner in range(self.num_ranks) for tile in plan.tiles(rank, owner))
        return [self._block(tile.num_queries, tile.num_keys, Window(tile.left, tile.right)) for tile in tiles]

    def dense(self, tokens: int) -> TileCase:
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

    def _block(self, num_queries: int, num_keys: int, window: Window) -> TileCase:
        return TileCase(
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
        """Nothing leaves, and what is received has arrived; so the transfer that is returned is over."""
        return self.exchange_all(*one_each_way(send, to, receive, source))

    def exchange_all(self, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> "ImmediateCommunicator":
        """The same of several messages."""
        if self.stand_in is None:
            return self
        for _, content in receives:
            receive = content if content._base is None else content._base  # Of a message that comes in two.
            part = self.stand_in[: receive.numel()]
            receive.set_(part.untyped_storage(), part.storage_offset(), part.size(), part.stride())
        return self

    def all_to_all(self, send: Tensor, sizes: Sizes | None = None) -> Tensor:
        """No ring asks for it."""
        raise NotImplementedError("a ring exchanges, and this is one rank of a ring.")

    def all_to_all_of_parts(self, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Tensor]]) -> None:
        """No ring asks for it."""
        raise NotImplementedError("a ring exchanges, and this is one rank of a ring.")

    def all_gather(self, send: Tensor) -> Tensor:
        """No ring asks for it."""
        raise NotImplementedError("a ring exchanges, and this is one rank of a ring.")

    def wait(self) -> None:
        """Return at once: the transfer is over."""


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
    empty_cache(case.device)
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


def empty_cache(device: str) -> None:
    """Give memory that is free back to the device."""
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
