"""What the ranks run for attention/test_call.py: one rank comes with something else than the rest, or does not come."""

import copy
import dataclasses
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.attention import ContextParallelAttention, build_attention
from mindspeed_cp.attention.interface import OUTPUT, Told
from mindspeed_cp.comm import Agreement, ContextParallelGroups, VirtualCommunicator, VirtualWorld
from mindspeed_cp.kernels import KERNELS, KernelRegistry
from mindspeed_cp.testing.rank_pool import LIMIT_S
from mindspeed_cp.topology import CPTopology
from unit_tests.ring_cases import FailingKernel, case_on, virtual_attention
from unit_tests.ulysses_cases import Case, Shard, forward_and_backward

ULYSSES, RING, DOUBLE, HYBRID = (
    CPTopology(ulysses=4),
    CPTopology(inner=4),
    CPTopology(outer=2, inner=2),
    CPTopology(inner=2, ulysses=2),
)
ALGORITHMS = {"ulysses": ULYSSES, "ring": RING, "double ring": DOUBLE, "hybrid": HYBRID}


class Call(NamedTuple):
    """What one rank gives to attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Any = None
    visible: Tensor | None = None


def plain_call(case: Case, dtype: torch.dtype = torch.float32) -> Call:
    """Zeros of the case's shapes."""
    heads = case.topology.ulysses * case.heads
    q = torch.zeros(case.batch, heads, case.tokens, case.head_size, dtype=dtype)
    return Call(q, q.clone(), q.clone())


def agreeing_attention(
    case: Case, world: VirtualWorld, rank: int, kernels: KernelRegistry = KERNELS
) -> ContextParallelAttention:
    """The case's attention on a virtual rank, with all that `build_attention` puts before it."""
    agreement = Agreement(VirtualCommunicator(world, range(case.size), rank, "agreement"))
    attention = virtual_attention(case, world, rank, kernels=kernels)
    return ContextParallelAttention(attention, case.config, case.sequence_layout, agreement)


def run_virtually(case: Case, function: Callable[[ContextParallelAttention, int], Any]) -> list[Any]:
    """What `function(attention, rank)` gives on each virtual rank."""
    world = VirtualWorld(case.size, LIMIT_S)
    return world.run(lambda rank: function(agreeing_attention(case, world, rank), rank))


def attend(case: Case) -> list[Shard]:
    """The case's results on virtual ranks."""
    return run_virtually(case, lambda attention, rank: forward_and_backward(rank, case, attention))


def error_of(attention: ContextParallelAttention, call: Call) -> str:
    """What a call raises."""
    try:
        attention(call.q, call.k, call.v, scale=call.scale, visible=call.visible)
    except ValueError as error:
        return str(error)
    return "nothing"


def virtual_errors(case: Case, calls: list[Call]) -> list[str]:
    """What each virtual rank raises."""
    return run_virtually(case, lambda attention, rank: error_of(attention, calls[rank]))


def sent_to_agree(case: Case, calls: int, *, once: bool) -> list[tuple[int, int]]:
    """Messages and bytes that each virtual rank sends to agree on so many calls, within one `once` or without it."""

    def on_rank(attention: ContextParallelAttention, rank: int) -> tuple[int, int]:
        def call() -> None:
            for _ in range(calls):
                attention(*plain_call(case)[:3])

        agreement = attention.agreement
        assert agreement is not None
        if once:
            with agreement.remembering():
                call()
        else:
            call()
        traffic = agreement.communicator.traffic
        return traffic.calls["exchange"], traffic.bytes_sent["exchange"]

    return run_virtually(case, on_rank)


def errors_in_micro_batches(case: Case, micro_batches: Sequence[Sequence[Call]]) -> list[list[str]]:
    """What each virtual rank raises in two layers of each micro-batch, in which the ranks agree once.

    micro_batches: what each rank comes with, in each of them.
    """
    from mindspeed_cp.patches.micro_batch import micro_batch_patches
    from mindspeed_cp.patches.plugin import Plugin

    def on_rank(attention: ContextParallelAttention, rank: int) -> list[str]:
        def forward_step(call: Call, config: object, current_microbatch: int = 0, vp_stage: int | None = None) -> str:
            return " then ".join(error_of(attention, call) for _ in range(2))

        assert attention.agreement is not None
        groups = ContextParallelGroups(None, attention.agreement, None)  # type: ignore[arg-type]
        forward, _ = micro_batch_patches(Plugin(groups=groups))
        step = forward.in_place_of(forward_step)
        config = SimpleNamespace(virtual_pipeline_model_parallel_size=None)
        errors = [step(calls[rank], config) for calls in micro_batches]
        return [*errors, f"{attention.agreement.communicator.traffic.calls['exchange']} messages"]

    return run_virtually(case, on_rank)


def errors_after_a_layer_is_left_out(case: Case, culprit: int) -> list[str]:
    """Two layers of a micro-batch, of which the culprit leaves out one, and the next call: the error on rank 0."""

    def on_rank(attention: ContextParallelAttention, rank: int) -> str:
        call = plain_call(case)
        agreement = attention.agreement
        assert agreement is not None
        with agreement.remembering():
            for _ in range(1 if rank == culprit else 2):
                q, k, v = call[:3]
                attention.prepare(OUTPUT, q, (k, v), Told())
        return error_of(attention, call)

    errors = run_virtually(case, on_rank)
    assert len(set(errors)) == 1
    return [part for part in ("ranks 0, 2 to 3: q", "rank 1: q", "call 3", "call 2") if part in errors[0]]


# Gloo ranks.


def change_length_in_a_micro_batch(group: dist.ProcessGroup | None, case: Case, timeout: timedelta) -> str:
    """The second layer of a micro-batch, in which rank 1 has other lengths: what each rank gets."""
    ours = dist.new_group(list(range(case.size)), timeout=timeout)
    if group is None:
        return "RuntimeError: outside"
    attention = build_attention(case.config, ours)
    usual, other = plain_call(case), plain_call(dataclasses.replace(case, tokens=case.tokens + 2))
    assert attention.agreement is not None
    with attention.agreement.remembering():
        attention(*usual[:3])
        try:
            attention(*(other if dist.get_rank(group) == 1 else usual)[:3])
        except RuntimeError as error:
            return f"RuntimeError: {error}"
    return "a result"


def messages_after_pickling(group: dist.ProcessGroup, case: Case) -> int:
    """How many messages a copy that was pickled in a micro-batch sends to agree on two calls."""
    attention, call = build_attention(case.config, group), plain_call(case)
    assert attention.agreement is not None
    with attention.agreement.remembering():
        attention(*call[:3])
        copied = pickle.loads(pickle.dumps(attention))
    copied.agreement.communicator.traffic.clear()
    for _ in range(2):
        copied(*call[:3])
    return copied.agreement.communicator.traffic.calls["exchange"]


def build_with_overlap_on_one_rank(group: dist.ProcessGroup, topology: CPTopology) -> str:
    """What a rank gets whose group is built with overlap on rank 1 alone."""
    try:
        ContextParallelGroups.build(topology, group, overlap=dist.get_rank(group) == 1)
    except ValueError as error:
        return str(error)
    return "nothing"


def attend_in_an_unsorted_group(world: dist.ProcessGroup, case: Case, ranks: list[int]) -> tuple[int, Shard | None]:
    """A rank's place in a group of this order, and its part of the case there."""
    ours = dist.new_group(ranks, sort_ranks=False)
    if dist.get_rank() not in ranks:
        ContextParallelGroups.take_part(case.topology, overlap=case.overlap)
        return -1, None
    rank = dist.get_rank(ours)
    assert rank == ranks.index(dist.get_rank())
    shard = forward_and_backward(rank, case, build_attention(case.config, ours))
    dist.barrier(ours)
    return rank, shard


def change_length_at_the_second_batch(group: dist.ProcessGroup | None, case: Case, culprit: int) -> list[str] | None:
    """What a rank raises in three batches; in the second the culprit comes with other lengths than the rest."""
    if group is None:
        ContextParallelGroups.take_part(case.topology, overlap=case.overlap)
        return None
    attention = build_attention(case.config, group)
    usual = plain_call(case)
    other = plain_call(Case(size=case.size, heads=case.heads, tokens=case.tokens + 2, inner=case.inner))
    assert other.q.shape[:2] == usual.q.shape[:2]
    mine = [usual, other if dist.get_rank(group) == culprit else usual, usual]
    return [error_of(attention, call) for call in mine]


def stop_one(
    group: dist.ProcessGroup | None,
    case: Case,
    culprit: int,
    phase: str,
    timeout: timedelta,
    folder: str,
) -> str:
    """The culprit's process is stopped in its second block of a phase, or before the second call; the others' errors.

    When all others have theirs, the culprit is woken, and has its own.
    """
    ours = dist.new_group(list(range(case.size)), timeout=timeout)
    if group is None:
        ContextParallelGroups.take_part(case.topology, overlap=case.overlap)
        return "outside"
    rank, notes = dist.get_rank(group), Path(folder)
    (notes / f"pid_{rank}").write_text(str(os.getpid()))

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    at = 0 if case.topology.ring_size == 1 else 1
    kernels = KernelRegistry((FailingKernel(fail=stop, at=at, phase=phase),)) if rank == culprit else KERNELS
    groups = ContextParallelGroups.build(case.topology, ours, overlap=case.overlap)
    attention = build_attention(case.config, groups, kernels=kernels)
    error = "nothing"
    try:
        if phase == "before":
            forward_and_backward(rank, case, attention)
            if rank == culprit:
                stop()
        forward_and_backward(rank, case, attention)
    except RuntimeError as raised:
        error = str(raised)
    (notes / f"error_{rank}").write_text(error)
    if rank == (culprit + 1) % case.size:
        others = [notes / f"error_{each}" for each in range(case.size) if each != culprit]
        while not all(each.exists() for each in others):
            time.sleep(0.05)
        os.kill(int((notes / f"pid_{culprit}").read_text()), signal.SIGCONT)
    return error


def copies(group: dist.ProcessGroup, case: Case) -> tuple[bool, bool, str]:
    """Whether a deep copy and a pickled one of a module give its results; how one of another job's group fails."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = build_attention(case.config, group)

    layer, rank = Layer(), dist.get_rank(group)
    result = forward_and_backward(rank, case, layer.attention)
    copied = copy.deepcopy(layer)
    assert copied.attention is not layer.attention or copied is not layer
    loaded = pickle.loads(pickle.dumps(layer.attention))
    same = [
        all(torch.equal(x, y) for x, y in zip(result, forward_and_backward(rank, case, each), strict=True))
        for each in (copied.attention, loaded)
    ]
    name = group.group_name.encode()
    elsewhere = pickle.dumps(layer.attention).replace(name, b"x" * len(name))
    try:
        pickle.loads(elsewhere)
    except RuntimeError as error:
        return same[0], same[1], str(error)
    return same[0], same[1], "nothing"


def mesh_errors(group: dist.ProcessGroup, case: Case) -> tuple[bool, str]:
    """Whether attention over one dimension of a mesh is that over its group; what a mesh of two is told."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "cp"))
    rank = mesh.get_local_rank("cp")
    over_mesh = forward_and_backward(rank, case, build_attention(case.config, mesh["cp"]))
    over_group = forward_and_backward(rank, case, build_attention(case.config, mesh.get_group("cp")))
    same = all(torch.equal(x, y) for x, y in zip(over_mesh, over_group, strict=True))
    try:
        build_attention(case.config, mesh)
    except ValueError as error:
        return same, str(error)
    return same, "nothing"


def plain_case(topology: CPTopology, **options: Any) -> Case:
    """A small case over the grid, in fp32."""
    return case_on(topology, **{"heads": 2, "kv_heads": 2, "dtype": torch.float32} | options)
