"""What the ranks run: attention as a case and an algorithm say, timed, counted and checked."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.attention import RingCommunicators, compose_attention, local_attention
from mindspeed_cp.benchmark.all_gather import AllGatherAttention
from mindspeed_cp.benchmark.cases import Algorithm
from mindspeed_cp.benchmark.kernels import EmulatedKernel, TimedKernel, wait_until
from mindspeed_cp.benchmark.peers import Attend, deepspeed_ulysses
from mindspeed_cp.comm import Addressed, ContextParallelGroups, ProcessGroupCommunicator, Sizes, Traffic, Transfer
from mindspeed_cp.comm.communicator import one_each_way
from mindspeed_cp.kernels import KernelRegistry
from mindspeed_cp.kernels.cpu_flash import CpuFlashKernel
from mindspeed_cp.planner import AttentionShape, Network
from mindspeed_cp.sharding import SequenceLayout
from mindspeed_cp.testing.emulated_cluster import LinkBytes, link_bytes

_START_IN_S = 0.02
"""How long after their agreement the ranks start: time enough for all to hear of it."""

DTYPES = {2: torch.bfloat16, 4: torch.float32}
"""By bytes of a number."""


class PassOfRank(NamedTuple):
    """One pass on one rank.

    seconds: from the agreed start. kernel_seconds, flops: spent in, and done by, the kernel. waiting_seconds: spent in
    communication calls. counted: what the library says it sent. inside, between: the same, by where it went. cards:
    what left the network cards meanwhile.
    """

    seconds: float
    kernel_seconds: float
    waiting_seconds: float
    flops: float
    counted: int
    inside: int
    between: int
    cards: LinkBytes


class RunOfRank(NamedTuple):
    """Forward and backward pass on one rank.

    peak_bytes: memory of the process at its highest, above what it had when the inputs were there; None where it was
    not looked at. errors: of out, dq, dk and dv, relative norm; None where the kernel computes nothing.
    """

    forward: PassOfRank
    backward: PassOfRank
    peak_bytes: int | None
    errors: dict[str, float] | None


@dataclass
class Ledger:
    """Bytes that went to ranks of the same node and of others, and the time spent in communication calls."""

    inside: int = 0
    between: int = 0
    seconds: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of what is done within."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class LedgerCommunicator:
    """A communicator that also keeps a ledger of where its bytes go and how long its calls take."""

    communicator: ProcessGroupCommunicator
    network: Network
    ledger: Ledger

    @property
    def rank(self) -> int:
        """This rank's number within the group."""
        return self.communicator.rank

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return self.communicator.size

    def all_to_all(self, send: Tensor, sizes: Sizes | None = None) -> Tensor:
        """The communicator's, written into the ledger."""
        for rank, part in enumerate(send if sizes is None else send.split(list(sizes.sent))):
            if rank != self.rank:
                self._count(rank, part.nbytes)
        with self.ledger.timed():
            return self.communicator.all_to_all(send, sizes)

    def all_to_all_of_parts(self, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Tensor]]) -> None:
        """The communicator's, written into the ledger."""
        for rank, parts in enumerate(sends):
            self._count(rank, sum(x.nbytes for x in parts))
        with self.ledger.timed():
            self.communicator.all_to_all_of_parts(sends, receives)

    def all_gather(self, send: Tensor) -> Tensor:
        """The communicator's, written into the ledger: gloo passes blocks around a ring."""
        self._count((self.rank + 1) % self.size, (self.size - 1) * send.nbytes)
        with self.ledger.timed():
            return self.communicator.all_gather(send)

    def exchange(self, send: Tensor | None, to: int, receive: Tensor | None, source: int) -> Transfer:
        """The communicator's, written into the ledger; so is the time of waiting for it."""
        return self.exchange_all(*one_each_way(send, to, receive, source))

    def exchange_all(self, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> Transfer:
        """The communicator's, written into the ledger; so is the time of waiting for it."""
        for to, send in sends:
            self._count(to, send.nbytes)
        with self.ledger.timed():
            return _LedgerTransfer(self.communicator.exchange_all(sends, receives), self.ledger)

    def _count(self, to: int, num_bytes: int) -> None:
        if self.network.node(self.communicator.global_ranks[to]) == self.network.node(dist.get_rank()):
            self.ledger.inside += num_bytes
        else:
            self.ledger.between += num_bytes


@dataclass(frozen=True)
class _LedgerTransfer:
    transfer: Transfer
    ledger: Ledger

    def wait(self) -> None:
        with self.ledger.timed():
            self.transfer.wait()


class Inputs(NamedTuple):
    """q, k, v and the output's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


@dataclass
class _Bench:
    """An algorithm ready to run on this rank."""

    attend: Attend | None
    kernel: TimedKernel
    traffic: Traffic
    ledger: Ledger
    layout: SequenceLayout


_BENCHES: dict[str, _Bench] = {}
"""By the algorithm's name."""

_INPUTS: dict[AttentionShape, Inputs] = {}
_REFERENCES: dict[AttentionShape, dict[str, Tensor]] = {}
"""Of the case that was last checked: the whole sequence, and attention of it in fp32."""


def prepare(network: Network, algorithm: Algorithm, case: AttentionShape, flops_per_s: float | None) -> None:
    """Make an algorithm's process groups and attention, and run it once on a short sequence with the heads of `case`.

    flops_per_s: of the emulated accelerator; None is the real kernel of this machine.
    """
    kernel = TimedKernel(CpuFlashKernel() if flops_per_s is None else EmulatedKernel(flops_per_s))
    kernels = KernelRegistry((kernel,))
    traffic, ledger, topology = Traffic(), Ledger(), algorithm.topology
    layout = SequenceLayout(size=network.num_ranks)
    attend: Attend | None

    def noted(communicator: ProcessGroupCommunicator) -> LedgerCommunicator:
        return LedgerCommunicator(communicator, network, ledger)

    if algorithm.kind == "single device":
        layout = SequenceLayout(size=1, kind="contiguous")
        attend = local_attention(causal=True, kernels=kernels) if dist.get_rank() == 0 else None
    elif algorithm.kind == "all-gather":
        attend = AllGatherAttention(noted(ProcessGroupCommunicator(None, traffic)), kernel)
    elif algorithm.kind == "DeepSpeed":
        layout = SequenceLayout(size=network.num_ranks, kind="contiguous")
        attend = _heads_first(deepspeed_ulysses(_heads_first(local_attention(causal=True, kernels=kernels)), "gloo"))
    else:
        assert dist.group.WORLD is not None
        groups = ContextParallelGroups.build(topology, dist.group.WORLD, overlap=algorithm.overlap)
        axes = groups.along(topology, traffic)
        ring = None if axes.ring is None else RingCommunicators(*map(noted, axes.ring))
        ulysses = None if axes.ulysses is None else noted(axes.ulysses)
        attend = compose_attention(
            algorithm.config,
            rank=dist.get_rank(),
            ulysses=ulysses,
            ring=ring,
            kernels=kernels,
            pieces=algorithm.pieces,
        )
    _BENCHES[algorithm.name] = _Bench(attend, kernel, traffic, ledger, layout)
    # What is loaded and connected on first use is neither timed nor counted as memory.
    run(algorithm.name, replace(case, num_tokens=4 * network.num_ranks), look_at_memory=False, check=False)


def _heads_first(attention: Attend) -> Attend:
    """One of tensors [B, S, N, D] for one of [B, N, S, D], and the other way about."""
    return lambda *qkv: attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


def run(algorithm: str, case: AttentionShape, look_at_memory: bool, check: bool) -> RunOfRank:
    """Forward and backward pass of a prepared algorithm.

    check: compare with attention in fp32 of the whole sequence, which each rank then computes.
    """
    bench = _BENCHES[algorithm]
    q, k, v, dout = _shards(bench, case, whole=check)
    for x in (q, k, v):
        x.requires_grad_()
    memory_before = _start_of_memory() if look_at_memory else None
    gc.disable()
    try:
        out, forward = _timed(bench, lambda: None if bench.attend is None else bench.attend(q, k, v))
        _, backward = _timed(bench, lambda: None if out is None else out.backward(dout))
    finally:
        gc.enable()
    peak = None if memory_before is None else _status("VmHWM") - memory_before
    errors = None
    if check and out is not None:
        results = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
        errors = _errors(results, case, bench.layout)
    return RunOfRank(forward, backward, peak, errors)


def _timed(bench: _Bench, compute: Callable[[], Tensor | None]) -> tuple[Tensor | None, PassOfRank]:
    """What `compute` gives, started on all ranks at once."""
    bench.kernel.seconds = bench.kernel.flops = 0.0
    bench.traffic.clear()
    ledger = bench.ledger
    ledger.inside = ledger.between = 0
    ledger.seconds = 0.0
    dist.barrier()
    before = link_bytes()
    # All ranks are on one machine, and have one clock.
    start = torch.tensor(time.perf_counter() + _START_IN_S, dtype=torch.float64)
    dist.broadcast(start, src=0)
    wait_until(start.item())
    result = compute()
    seconds = time.perf_counter() - start.item()
    # When all are done, everything has left.
    dist.barrier()
    after = link_bytes()
    return result, PassOfRank(
        seconds=seconds if bench.attend else 0.0,
        kernel_seconds=bench.kernel.seconds,
        waiting_seconds=ledger.seconds,
        flops=bench.kernel.flops,
        counted=sum(bench.traffic.bytes_sent.values()),
        inside=ledger.inside,
        between=ledger.between,
        cards=LinkBytes(after.inside - before.inside, after.between - before.between),
    )


def _shards(bench: _Bench, case: AttentionShape, whole: bool) -> list[Tensor]:
    """This rank's tokens of the case's inputs; `whole` where they have to be the same sequence for every algorithm."""
    if bench.attend is None:
        return [torch.empty(0)] * 4
    rank = dist.get_rank() % bench.layout.size
    if whole:
        return [bench.layout.shard(x, rank, dim=2) for x in _whole_inputs(case)]
    return list(_random_inputs(case, case.num_tokens // bench.layout.size, seed=rank))


def _whole_inputs(case: AttentionShape) -> Inputs:
    if case not in _INPUTS:
        _INPUTS.clear()
        _REFERENCES.clear()
        _INPUTS[case] = _random_inputs(case, case.num_tokens, seed=0)
    return _INPUTS[case]


def _random_inputs(case: AttentionShape, num_tokens: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
    dtype = DTYPES[case.element_size]
    return Inputs(*(torch.randn(1, n, num_tokens, case.head_size, generator=generator, dtype=dtype) for n in heads))


def _errors(results: dict[str, Tensor | None], case: AttentionShape, layout: SequenceLayout) -> dict[str, float]:
    """Relative norm of the difference from attention in fp32 of the whole sequence."""
    if case not in _REFERENCES:
        q, k, v, dout = (x.detach().float() for x in _whole_inputs(case))
        out = local_attention(causal=True)(*(x.requires_grad_() for x in (q, k, v)))
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        _REFERENCES[case] = {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}
    errors = {}
    for name, result in results.items():
        assert result is not None, f"no {name}"
        exact = layout.shard(_REFERENCES[case][name], dist.get_rank() % layout.size, dim=2)
        errors[name] = ((result.float() - exact).norm() / exact.norm()).item()
    return errors


def _start_of_memory() -> int:
    """Memory of the process, in bytes, from where its highest point is to be counted."""
    gc.collect()
    # What earlier runs have freed goes back to the system, else it would be used again without being counted.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """An entry of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
