"""What the ranks run for comm/test_communicator.py."""

from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.comm import ProcessGroupCommunicator, Traffic


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


def posted(group: dist.ProcessGroup, operation: str) -> list[str]:
    """The point-to-point operations that a collective one posts, at its last step, in their order."""
    with mock.patch.object(dist, "batch_isend_irecv", return_value=[]) as post:
        getattr(ProcessGroupCommunicator(group), operation)(torch.zeros(dist.get_world_size(group), 1))
    return [operation.op.__name__ for operation in post.call_args.args[0]]


def default_group_place(group: dist.ProcessGroup) -> tuple[int, int]:
    """Rank and size of a communicator that was given no group."""
    communicator = ProcessGroupCommunicator()
    return communicator.rank, communicator.size


def communication_error(group: dist.ProcessGroup, operation: str, send: Tensor) -> tuple[str, dict[str, int]]:
    """What `operation` raises for `send`, and the calls counted by then."""
    communicator = ProcessGroupCommunicator(group)
    try:
        getattr(communicator, operation)(send)
    except (AssertionError, ValueError) as error:
        return f"{type(error).__name__}: {error}", dict(communicator.traffic.calls)
    return "nothing", dict(communicator.traffic.calls)
