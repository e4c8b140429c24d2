"""An MLP in any kind of tensor parallelism: what scripts/bench_tensor_parallel.py records, measures and predicts."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_cp.benchmark.kernels import wait_until
from mindspeed_cp.comm import Addressed, Communicator, Sizes, Transfer
from mindspeed_cp.comm.communicator import one_each_way
from mindspeed_cp.planner import Compute, Event, Network, Post, Wait, predicted_seconds, unequal_all_to_all
from mindspeed_cp.tensor_parallel import MLP, KindName, TensorMesh, on_virtual_ranks, plan_mesh, shard
from mindspeed_cp.tensor_parallel.linear import Gathering
from mindspeed_cp.testing.emulated_cluster import Cluster

_START_IN_S = 0.05


class Setting(NamedTuple):
    """A kind, the sizes of its axes, and what becomes of gathered operands."""

    kind: KindName
    sizes: dict[str, int] = {}
    gathering: Gathering = "keep"
    overlap: bool = True

    def __str__(self) -> str:
        sizes = "".join(f" {axis}={size}" for axis, size in self.sizes.items())
        how = "" if self.gathering == "keep" else f", {self.gathering}{' with overlap' * self.overlap}"
        return f"{self.kind}{sizes}{how}"


class Case(NamedTuple):
    """Sizes of the MLP, and how many floating-point operations a second the emulated accelerator does."""

    batch: int
    sequence: int
    hidden: int
    ffn: int
    flops_per_s: float


SETTINGS = {
    8: [
        Setting("1d"),
        Setting("1d-sp"),
        Setting("2.5d", {"depth": 2}),
        Setting("3d"),
        Setting("xy", {"x": 4}),
        Setting("xy", {"x": 2}),
    ],
    16: [
        Setting("1d"),
        Setting("1d-sp"),
        Setting("2d"),
        Setting("2.5d", {"depth": 4}),
        Setting("xy", {"x": 8}),
        Setting("xy", {"x": 4}),
    ],
}
OVERLAPPED: dict[int, list[tuple[KindName, dict[str, int]]]] = {
    4: [("2d", {}), ("1d-sp", {}), ("xy", {"x": 2})],
    8: [("2.5d", {"depth": 2}), ("1d-sp", {}), ("3d", {}), ("xy", {"x": 4})],
}


def overlapped(ranks: int) -> list[Setting]:
    """Each kind in panels without overlap, and with."""
    return [Setting(*each, "panels", overlap) for each in OVERLAPPED[ranks] for overlap in (False, True)]


@dataclass
class Recorder:
    """A communicator that writes down what it sends as events for mindspeed_cp.planner.

    ranks: of the group, in the numbers of the world. program: of this rank, shared by all of its communicators.
    """

    communicator: Communicator
    name: str
    ranks: tuple[int, ...]
    program: list[Event]
    calls: int = 0

    @property
    def rank(self) -> int:
        """See Communicator."""
        return self.communicator.rank

    @property
    def size(self) -> int:
        """See Communicator."""
        return self.communicator.size

    def all_to_all(self, send: Tensor, sizes: Sizes | None = None) -> Tensor:
        """See Communicator."""
        parts = send if sizes is None else send.split(list(sizes.sent))
        self.calls += 1
        handle, num_bytes = f"{self.name} {self.calls}", [part.nbytes for part in parts]
        self.program += unequal_all_to_all(handle, self.ranks[self.rank], self.ranks, num_bytes)
        return self.communicator.all_to_all(send, sizes)

    def all_to_all_of_parts(self, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Tensor]]) -> None:
        """No layer asks for it."""
        raise NotImplementedError("layers of tensor parallelism exchange whole tensors.")

    def all_gather(self, send: Tensor) -> Tensor:
        """See Communicator. gloo passes blocks around a ring."""
        after, before = (self.ranks[(self.rank + step) % self.size] for step in (1, -1))
        for _ in range(self.size - 1):
            self._write({after: send.nbytes}, [before])
        return self.communicator.all_gather(send)

    def exchange(self, send: Tensor | None, to: int, receive: Tensor | None, source: int) -> Transfer:
        """See Communicator."""
        return self.exchange_all(*one_each_way(send, to, receive, source))

    def exchange_all(self, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> Transfer:
        """See Communicator."""
        handle = self._post(
            {self.ranks[to]: content.nbytes for to, content in sends}, [self.ranks[source] for source, _ in receives]
        )
        return _Recorded(self.communicator.exchange_all(sends, receives), self.program, handle)

    def _write(self, sends: dict[int, int], sources: list[int]) -> None:
        self.program.append(Wait(self._post(sends, sources)))

    def _post(self, sends: dict[int, int], sources: list[int]) -> object:
        self.calls += 1
        handle = (self.name, self.calls)
        self.program.append(Post(handle, sends, tuple(sources)))
        return handle


@dataclass
class _Recorded:
    transfer: Transfer
    program: list[Event]
    handle: object

    def wait(self) -> None:
        self.program.append(Wait(self.handle))
        self.transfer.wait()


class Products(TorchDispatchMode):
    """Within it a matrix product gives zeros, and says how many floating-point operations it would have been."""

    def __init__(self, spend: Callable[[float], None]) -> None:
        super().__init__()
        self._spend = spend

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation of this thread."""
        if func is not torch.ops.aten.mm.default:
            return func(*args, **(kwargs or {}))
        left, right = args
        self._spend(2.0 * left.size(0) * left.size(1) * right.size(1))
        return left.new_zeros(left.size(0), right.size(1))


class Passes:
    """Forward and backward pass of an MLP on one rank."""

    def __init__(self, mesh: TensorMesh, setting: Setting, case: Case) -> None:
        fc1, fc2 = nn.Linear(case.hidden, case.ffn, bias=False), nn.Linear(case.ffn, case.hidden, bias=False)
        self.mlp = MLP(fc1, fc2, mesh, gathering=setting.gathering, overlap=setting.overlap)
        self.x = shard(torch.zeros(case.batch, case.sequence, case.hidden), mesh.kind.outer, mesh)
        self.x.local.requires_grad_()

    def run(self, spend: Callable[[float], None]) -> None:
        """Both passes; `spend` is told of each product."""
        with Products(spend):
            self.mlp(self.x).local.sum().backward()


def record(num_ranks: int, setting: Setting, case: Case) -> list[list[Event]]:
    """What each of so many ranks does in both passes, from a run on virtual ranks."""

    def on_rank(mesh: TensorMesh) -> list[Event]:
        program: list[Event] = []
        recorders = {
            axes: Recorder(each, " ".join(axes), mesh.grid.ranks_along(mesh.rank, axes), program)
            for axes, each in mesh.communicators.items()
        }
        passes = Passes(replace(mesh, communicators=recorders), setting, case)
        passes.run(lambda flops: program.append(Compute(flops / case.flops_per_s)))
        return program

    return on_virtual_ranks(on_rank, *plan_mesh(setting.kind, num_ranks, **setting.sizes))


def predict(network: Network, setting: Setting, case: Case) -> float:
    """Seconds for both passes: what virtual ranks do, played against the links."""
    programs = record(network.num_ranks, setting, case)
    return predicted_seconds(network, lambda rank: iter(programs[rank]))


class Measured(NamedTuple):
    """One rank's seconds from the start that all agree on, and bytes sent."""

    seconds: float
    bytes_sent: int


_PASSES: dict[str, tuple[TensorMesh, Passes]] = {}
"""In a rank's process: what `prepare` has made, by the setting's name."""


def prepare(setting: Setting, case: Case) -> None:
    """In a rank's process: make the mesh and the layers, and connect by a first run."""
    mesh = TensorMesh.build(setting.kind, None, **setting.sizes)  # type: ignore[arg-type]  # depth, x and y
    _PASSES[str(setting)] = mesh, Passes(mesh, setting, case)
    Passes(mesh, setting, case._replace(sequence=max(16, case.sequence // 64))).run(lambda flops: None)


def measure(setting: Setting, case: Case) -> Measured:
    """In a rank's process: both passes once."""
    mesh, passes = _PASSES[str(setting)]
    mesh.traffic.clear()
    dist.barrier()
    # All ranks are on one machine, and have one clock.
    start = torch.tensor(time.perf_counter() + _START_IN_S, dtype=torch.float64)
    dist.broadcast(start, src=0)
    wait_until(start.item())
    passes.run(lambda flops: wait_until(time.perf_counter() + flops / case.flops_per_s))
    return Measured(time.perf_counter() - start.item(), sum(mesh.traffic.bytes_sent.values()))


def report(cluster: Cluster, settings: list[Setting], case: Case, repeats: int) -> dict[str, list[float]]:
    """Print a table of medians; seconds of the slowest rank in each reading, by setting. Settings take turns."""
    for setting in settings:
        cluster.call(prepare, setting, case)
    runs: dict[str, list[list[Measured]]] = {str(setting): [] for setting in settings}
    for _ in range(repeats):
        for setting in settings:
            runs[str(setting)].append(cluster.call(measure, setting, case))
    print("| | MiB a rank | ms | of predicted |\n|---|---|---|---|")
    readings = {}
    for setting in settings:
        seconds = [max(each.seconds for each in run) for run in runs[str(setting)]]
        sent, predicted = runs[str(setting)][0][0].bytes_sent / 2**20, predict(cluster.network, setting, case)
        median = statistics.median(seconds)
        print(f"| {setting} | {sent:.2f} | {1e3 * median:.0f} | {median / predicted:.2f} |", flush=True)
        readings[str(setting)] = seconds
    return readings


class Hideable(NamedTuple):
    """Seconds without overlap, what overlap saves of them, and those of the shorter one of products and transfers; all
    predicted, as if nothing else took time."""

    without: float
    saved: float
    shorter: float


def hideable(network: Network, setting: Setting, case: Case) -> Hideable:
    """What can be hidden in a setting. The first product and the last transfer have nothing beside them."""
    without, overlapping = (predict(network, setting._replace(overlap=overlap), case) for overlap in (False, True))
    products = predict(replace(network, fast_mbit=1e9, slow_mbit=1e9), setting, case)
    transfers = predict(network, setting, case._replace(flops_per_s=1e18))
    return Hideable(without, without - overlapping, min(products, transfers))


def report_hidden(readings: dict[str, list[float]], network: Network, settings: list[Setting], case: Case) -> None:
    """Print what each reading with overlap is below the predicted time without, of what can be hidden and of the
    shorter one: so whatever else takes time counts as not hidden, and slow readings without overlap do not help."""
    print("\n| | hidden of what can be, by reading | of the shorter of products and transfers |\n|---|---|---|")
    for setting in [setting for setting in settings if setting.overlap]:
        most = hideable(network, setting, case)
        saved = [most.without - seconds for seconds in readings[str(setting)]]
        by_reading = ", ".join(f"{each / most.saved:.0%}" for each in saved)
        print(f"| {setting} | {by_reading} | {statistics.median(saved) / most.shorter:.0%} |", flush=True)
