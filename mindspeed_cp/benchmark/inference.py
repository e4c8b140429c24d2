"""Prefill and decode over ranks with emulated kernels and real messages: what scripts/bench_inference.py measures.

Ranks that outnumber the cores cannot compute side by side, so a kernel is a wait for its floating-point operations
(EmulatedKernel). Keys and values are one number that is seen everywhere, unless they travel.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.benchmark.kernels import EmulatedKernel, wait_until
from mindspeed_cp.comm import ProcessGroupCommunicator
from mindspeed_cp.inference import (
    PrefixCase,
    Rates,
    Spans,
    State,
    attention_state,
    choose_pass,
    decode_attention,
    prefill_plan,
    ring_pass_kv_attention,
    ring_pass_q_attention,
)
from mindspeed_cp.inference.costs import Pass
from mindspeed_cp.inference.decode import Backend, Method, QueryLayout
from mindspeed_cp.kernels import KernelRegistry
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.testing.emulated_cluster import Cluster

_START_IN_S = 0.03


class Heads(NamedTuple):
    """Of the model. dtype: of its tensors."""

    query: int = 16
    kv: int = 2
    size: int = 32
    dtype: torch.dtype = torch.bfloat16


class Prefill(NamedTuple):
    """New tokens behind cached ones, which lie evenly on the ranks."""

    new: int
    cached: int

    def plan(self, num_ranks: int) -> AttentionPlan:
        """See prefill_plan."""
        edges = [self.cached * rank // num_ranks for rank in range(num_ranks + 1)]
        held = tuple((((first, stop),) if first < stop else (),) for first, stop in pairwise(edges))
        return prefill_plan([self.new], num_ranks, cached=Spans(held))

    def flops(self, num_ranks: int, heads: Heads) -> float:
        """Of the busiest rank: two products of what is seen."""
        plan, ranks = self.plan(num_ranks), range(num_ranks)
        return 4 * heads.query * heads.size * max(sum(plan.area(rank, other) for other in ranks) for rank in ranks)

    def chosen(self, num_ranks: int, heads: Heads, rates: Rates) -> Pass:
        """By the rule."""
        sizes = heads.query, heads.kv, heads.dtype.itemsize
        return choose_pass(PrefixCase(self.new, self.cached, num_ranks, *sizes), rates)


class Way(NamedTuple):
    """What travels in a prefill, in how many pieces of the heads."""

    travels: Pass
    pieces: int = 1


WAYS = (Way("pass_kv"), Way("pass_q"), Way("pass_q", 2))
"""Those that are measured side by side."""


class Decode(NamedTuple):
    """One way of decode_attention."""

    method: Method
    q_layout: QueryLayout
    backend: Backend

    def __str__(self) -> str:
        return f"{self.method}, {self.q_layout}, {self.backend}"


class Measured(NamedTuple):
    """Median seconds, of the slowest rank each time, and the bytes and operations of the busiest one."""

    seconds: float
    bytes: int
    operations: int


class Runs(NamedTuple):
    """What one rank has measured: seconds of each run, and what it sends in one."""

    seconds: list[float]
    bytes: int
    operations: int


class Ratio(NamedTuple):
    """Seconds of a prefill, of its messages with a kernel that takes no time, and of the kernel alone."""

    prefill: float
    link: float
    kernel: float

    @property
    def over_larger(self) -> float:
        """The prefill over the larger of both."""
        return self.prefill / max(self.link, self.kernel)


_FUNCTIONS: dict[Pass, Callable[..., State]] = {"pass_kv": ring_pass_kv_attention, "pass_q": ring_pass_q_attention}


# In a rank's process.


def measure_prefill(prefill: Prefill, heads: Heads, way: Way, flops_per_s: float, repeats: int) -> Runs:
    """Some prefills."""
    communicator = ProcessGroupCommunicator()
    rank, kernels = communicator.rank, KernelRegistry((EmulatedKernel(flops_per_s),))
    plan = prefill.plan(communicator.size)
    q, k = (
        torch.zeros(1, number, layout.num_tokens(rank), heads.size, dtype=heads.dtype)
        for number, layout in ((heads.query, plan.queries), (heads.kv, plan.keys))
    )
    attend = _FUNCTIONS[way.travels]

    def run() -> None:
        attend(q, k, k, plan=plan, communicator=communicator, kernels=kernels, pieces=way.pieces)

    return _measured(run, communicator, repeats)


def measure_decode(decode: Decode, heads: Heads, context: int, batch: int, flops_per_s: float, repeats: int) -> Runs:
    """Some steps of one layer; as many sequences as `batch`, each with so many tokens of context."""
    communicator = ProcessGroupCommunicator()
    size, kernels = communicator.size, KernelRegistry((EmulatedKernel(flops_per_s),))
    own = {"heads": (batch, heads.query // size), "batch": (batch // size, heads.query)}
    q = torch.zeros(*own.get(decode.q_layout, (batch, heads.query)), 1, heads.size, dtype=heads.dtype)
    k = _everywhere_the_same(batch, heads, context // size)

    def run() -> None:
        decode_attention(q, k, k, communicator=communicator, kernels=kernels, **decode._asdict())

    return _measured(run, communicator, repeats)


def measure_alone(heads: Heads, context: int, batch: int, flops_per_s: float) -> float:
    """Seconds of a decode step of a rank that has all keys; all ranks do it."""
    q = torch.zeros(batch, heads.query, 1, heads.size, dtype=heads.dtype)
    k, kernels = _everywhere_the_same(batch, heads, context), KernelRegistry((EmulatedKernel(flops_per_s),))
    start = time.perf_counter()
    attention_state(q, k, k, kernels=kernels)
    return time.perf_counter() - start


def _everywhere_the_same(batch: int, heads: Heads, num_tokens: int) -> Tensor:
    return torch.zeros(1, 1, 1, 1, dtype=heads.dtype).expand(batch, heads.kv, num_tokens, heads.size)


def _measured(run: Callable[[], None], communicator: ProcessGroupCommunicator, repeats: int) -> Runs:
    """Runs that all ranks begin at one moment, after one that does not count."""
    run()
    traffic, seconds = communicator.traffic, []
    for _ in range(repeats):
        traffic.clear()
        moment = torch.tensor([time.time() + _START_IN_S], dtype=torch.float64)
        dist.broadcast(moment, 0)
        wait_until(time.perf_counter() + float(moment) - time.time())
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return Runs(seconds, traffic.bytes_sent.total(), traffic.calls.total())


# In the process that has the cluster.


def prefills(
    cluster: Cluster, cases: Sequence[Prefill], heads: Heads, flops_per_s: float, repeats: int
) -> dict[tuple[Prefill, Way], Measured]:
    """Each case each way."""
    settings = [(case, way) for case in cases for way in WAYS]
    return {
        (case, way): _of_ranks(cluster.call(measure_prefill, case, heads, way, flops_per_s, repeats))
        for case, way in settings
    }


def ratios(
    cluster: Cluster, case: Prefill, heads: Heads, wanted: Sequence[float], repeats: int, pieces: int
) -> dict[float, Ratio]:
    """Pass-KV with a kernel that takes 1 / ratio of what the link takes."""
    flops, found, way = case.flops(cluster.network.num_ranks, heads), {}, Way("pass_kv", pieces)
    for ratio in wanted:
        link = _of_ranks(cluster.call(measure_prefill, case, heads, way, float("inf"), repeats)).seconds
        rate = flops * ratio / link
        whole = _of_ranks(cluster.call(measure_prefill, case, heads, way, rate, repeats)).seconds
        found[ratio] = Ratio(whole, link, link / ratio)
    return found


def decodes(
    cluster: Cluster,
    ways: Sequence[Decode],
    heads: Heads,
    contexts: Sequence[int],
    batch: int,
    flops_per_s: float,
    repeats: int,
) -> dict[tuple[Decode, int], Measured]:
    """Steps by each way, at each context."""
    return {
        (way, context): _of_ranks(cluster.call(measure_decode, way, heads, context, batch, flops_per_s, repeats))
        for context in contexts
        for way in ways
    }


def _of_ranks(ranks: Sequence[Runs]) -> Measured:
    seconds = statistics.median(map(max, zip(*(each.seconds for each in ranks), strict=True)))
    return Measured(seconds, max(each.bytes for each in ranks), max(each.operations for each in ranks))
