"""What the ranks run for comm/test_communicator.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.comm import Addressed, LostRank, ProcessGroupCommunicator, Traffic


class Received(NamedTuple):
    """What one rank got, its place in the group, and what was counted."""

    result: Tensor
    rank: int
    size: int
    calls: dict[str, int]
    bytes_sent: dict[str, int]


def communicate(group: dist.ProcessGroup, operation: str, sends: Tensor) -> Received:
    """`operation` of row r of `sends` on rank r, done twice, so that the counts must add up."""
    communicator = ProcessGroupCommunicator(group, Traffic())
    send = sends[dist.get_rank(group)].contiguous()
    getattr(communicator, operation)(send)
    result = getattr(communicator, operation)(send)
    traffic = communicator.traffic
    return Received(result, communicator.rank, communicator.size, dict(traffic.calls), dict(traffic.bytes_sent))


class NotedBackend:
    """A group's backend of the CPU, and what it has been told to start: "send" or "recv", and what."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.started = backend, list[tuple[str, Tensor]]()

    def send(self, tensors: list[Tensor], to: int, tag: int) -> dist.Work:
        self.started.append(("send", *tensors))
        return self.backend.send(tensors, to, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> dist.Work:
        self.started.append(("recv", *tensors))
        return self.backend.recv(tensors, source, tag)


@contextmanager
def noted(group: dist.ProcessGroup) -> Iterator[list[tuple[str, Tensor]]]:
    """What a group's backend of the CPU is told to start meanwhile, without a way round by torch's own functions."""
    backend = NotedBackend(group._get_backend(torch.device("cpu")))
    with mock.patch.object(type(group), "_get_backend", lambda *_: backend):
        yield backend.started


def posted(group: dist.ProcessGroup, operation: str) -> list[str]:
    """What a collective operation starts, in its order."""
    with noted(group) as started:
        getattr(ProcessGroupCommunicator(group), operation)(torch.zeros(dist.get_world_size(group), 1))
    return [way for way, _ in started]


def batches(group: dist.ProcessGroup) -> list[list[str]]:
    """What is started together, in an all-to-all of another device among ranks that are not in the group's order."""
    communicator = ProcessGroupCommunicator(group, ranks=range(dist.get_world_size(group))[::-1])
    with mock.patch.object(dist, "batch_isend_irecv", return_value=[]) as post:
        communicator.all_to_all(torch.empty(communicator.size, 1, device="meta"))
    return [[each.op.__name__ for each in call.args[0]] for call in post.call_args_list]


def batches_of_pairs(group: dist.ProcessGroup) -> list[list[tuple[str, int, int]]]:
    """What is started together of two messages to and from each other rank, by way, peer and size, one a peer."""
    communicator, others = (
        ProcessGroupCommunicator(group),
        {*range(dist.get_world_size(group))} - {dist.get_rank(group)},
    )
    pairs = [Addressed(peer, torch.empty(size, device="meta")) for peer in sorted(others) for size in (1, 2)]
    with (
        mock.patch.object(dist, "batch_isend_irecv", return_value=[]) as post,
        mock.patch("mindspeed_cp.comm.communicator.ONE_EACH_WAY", ("meta",)),
    ):
        communicator.exchange_all(pairs, pairs)
    return [
        [(each.op.__name__, each.group_peer, each.tensor.numel()) for each in call.args[0]]
        for call in post.call_args_list
    ]


def default_group_place(group: dist.ProcessGroup) -> tuple[int, int]:
    """Rank and size of a communicator that was given no group."""
    communicator = ProcessGroupCommunicator()
    return communicator.rank, communicator.size


def lost_at(group: dist.ProcessGroup, place: str) -> str:
    """What is raised where a backend finds, when a message starts or is waited for, that its peer is gone."""
    communicator, closed = ProcessGroupCommunicator(group), RuntimeError("closed")
    work = mock.Mock(**{"wait.side_effect": closed})
    start = mock.Mock(side_effect=closed) if place == "start" else mock.Mock(return_value=work)
    communicator.group = mock.Mock(**{"_get_backend.return_value": mock.Mock(recv=start, send=start)})
    other = 1 - communicator.rank
    try:
        communicator.exchange(torch.zeros(1), other, torch.zeros(1), other).wait()
    except LostRank as error:
        return str(error)
    return "nothing"


def communication_error(group: dist.ProcessGroup, operation: str, send: Tensor) -> tuple[str, dict[str, int]]:
    """What `operation` raises for `send`, and the calls counted by then."""
    communicator = ProcessGroupCommunicator(group)
    try:
        getattr(communicator, operation)(send)
    except (AssertionError, ValueError) as error:
        return f"{type(error).__name__}: {error}", dict(communicator.traffic.calls)
    return "nothing", dict(communicator.traffic.calls)
