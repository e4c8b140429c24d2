"""Collective operations of one group of ranks.

Note [Rounds]
    In each round of an all-to-all every rank sends to one other and receives from one, so that no link has several
    messages in its queue while another one is idle. Started all at once, they queue as they come, and the longest queue
    is waited for. Links between nodes, moreover, want rounds in which all ranks leave their node, or none does. By
    distance, with four ranks to a node, rank 3 leaves it from distance 1 on, and rank 0 from 4 on: 15 of 16 ranks'
    rounds cross for somebody. So numbers are added digit by digit, without carry, digits being those of the prime
    factors of the size:

        round    1  2  3   4  5  6  7   8 ...        of 16 = 2 * 2 * 2 * 2 ranks, where it is rank XOR round:
        rank 0   1  2  3   4  5  6  7   8            rounds 1 to 3 stay inside a node, 4 to 15 cross, for every rank
        rank 3   2  1  0   7  6  5  4  11

    Two rounds are under way at a time, so that the next one begins without a pause.
"""

import functools
import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.comm.traffic import Traffic

# The name since torch 2.13, which warns at each call by the earlier one.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


ROUNDS_UNDER_WAY = 2
"""16 ranks take 1.04 times what the links need with 1 or 2, 1.1 to 1.16 with 3 or 4, 1.2 to 1.4 with all at once."""


class Transfer(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Return when what was to be received may be read, and what was sent may be overwritten.

        With gloo the host waits, and RuntimeError says that a peer is gone or does not answer within the group's
        timeout. With NCCL and HCCL only the current stream waits: their watchdog finds a lost peer later, and ends the
        process. TORCH_NCCL_BLOCKING_WAIT=1 (NPU: TORCH_HCCL_BLOCKING_WAIT=1, older builds HCCL_BLOCKING_WAIT=1), set
        before the groups are made, has the host wait and raise as with gloo, so that no overlap is left.
        """
        ...


class Communicator(Protocol):
    """What attention asks of a group of ranks."""

    @property
    def rank(self) -> int:
        """This rank's number within the group."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        ...

    def all_to_all(self, send: Tensor) -> Tensor:
        """Exchange equal parts: `send[p]` goes to rank p, and row p of the result came from rank p.

        send: [size, ...], contiguous. The result has the same shape and dtype.
        """
        ...

    def all_gather(self, send: Tensor) -> Tensor:
        """`send` of every rank, stacked by rank: [size, *send.shape]. send: contiguous."""
        ...

    def exchange(self, send: Tensor | None, to: int, receive: Tensor | None, source: int) -> Transfer:
        """Start sending `send` to rank `to` and receiving from rank `source` into `receive`; None is no message.

        send, receive: contiguous, and not to be touched before the transfer has been waited for.
        """
        ...


class _Message(NamedTuple):
    """way: dist.isend or dist.irecv. peer: rank within the group."""

    way: Callable[..., dist.Work | None]
    content: Tensor
    peer: int


class ProcessGroupCommunicator:
    """A Communicator over a torch.distributed process group, which counts what it sends in `traffic`.

    group: None is the default group of all ranks. tag: of its messages; gloo gives those of one tag to receives of no
    other.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, traffic: Traffic | None = None, *, tag: int = 0) -> None:
        group = group or dist.group.WORLD
        assert group is not None, "there is no process group yet"
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._global_ranks = dist.get_process_group_ranks(group)
        self.traffic = traffic if traffic is not None else Traffic()
        self._tag = tag

    def all_to_all(self, send: Tensor) -> Tensor:
        """See Communicator.all_to_all."""
        _require_contiguous(send)
        if send.size(0) != self.size:
            raise ValueError(f"an all-to-all among {self.size} ranks sends {self.size} parts, not {send.size(0)}.")
        received = torch.empty(send.shape, dtype=send.dtype, device=send.device)
        if send.device.type == "cpu":
            self._all_to_all_by_messages(received, send)
        else:
            dist.all_to_all_single(received, send, group=self.group)
        self.traffic.record("all_to_all", send.nbytes * (self.size - 1) // self.size)
        return received

    def _all_to_all_by_messages(self, received: Tensor, send: Tensor) -> None:
        """In rounds, see Note [Rounds], every receive before its send: gloo's own sends first, see `exchange`.

        Gloo's loses up to half of a link's rate between two ranks, and a third among eight.
        """
        received[self.rank] = send[self.rank]
        under_way: deque[Transfer] = deque()
        for to, source in rounds(self.rank, self.size):
            if len(under_way) == ROUNDS_UNDER_WAY:
                under_way.popleft().wait()
            messages = [_Message(dist.irecv, received[source], source), _Message(dist.isend, send[to], to)]
            under_way.append(self._post(messages))
        for transfer in under_way:
            transfer.wait()

    def all_gather(self, send: Tensor) -> Tensor:
        """See Communicator.all_gather."""
        _require_contiguous(send)
        received = torch.empty((self.size, *send.shape), dtype=send.dtype, device=send.device)
        if send.device.type == "cpu":
            self._all_gather_by_messages(received, send)
        else:
            _all_gather_single(received.view(-1), send.view(-1), group=self.group)
        self.traffic.record("all_gather", send.nbytes * (self.size - 1))
        return received

    def _all_gather_by_messages(self, received: Tensor, send: Tensor) -> None:
        """What gloo's own all-gather does, a ring, with every receive posted first: that one sends first."""
        received[self.rank] = send
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        for step in range(self.size - 1):
            sent, arriving = (self.rank - step) % self.size, (self.rank - step - 1) % self.size
            receive = _Message(dist.irecv, received[arriving], before)
            self._post([receive, _Message(dist.isend, received[sent], after)]).wait()

    def exchange(self, send: Tensor | None, to: int, receive: Tensor | None, source: int) -> Transfer:
        """See Communicator.exchange."""
        messages = []
        # The receive comes first: gloo sends a payload only after the receiver's ready message, and that one would
        # queue behind a payload that is already under way on the same connection.
        if receive is not None:
            _require_contiguous(receive)
            messages.append(_Message(dist.irecv, receive, source))
        if send is not None:
            _require_contiguous(send)
            messages.append(_Message(dist.isend, send, to))
            self.traffic.record("exchange", send.nbytes)
        return self._post(messages)

    def __deepcopy__(self, memo: object) -> "ProcessGroupCommunicator":
        """The same object: a module that is copied stays in its groups, which its process has once."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """By the group's name, which finds it again within the same job and nowhere else."""
        return _communicator_by_name, (self.group.group_name, tuple(self._global_ranks), self._tag)

    def _post(self, messages: list[_Message]) -> Transfer:
        """Start all of them."""
        if not messages:
            return _ProcessGroupTransfer([], [])
        operations = [
            dist.P2POp(each.way, each.content, self._global_ranks[each.peer], self.group, self._tag)
            for each in messages
        ]
        return _ProcessGroupTransfer(dist.batch_isend_irecv(operations), [each.peer for each in messages])


class _ProcessGroupTransfer:
    """peers: of each of `works`; where the backend gives one for all, of all of them."""

    def __init__(self, works: list[dist.Work], peers: list[int]) -> None:
        self._works, self._peers = works, peers

    def wait(self) -> None:
        for place, work in enumerate(self._works):
            try:
                work.wait()
            except RuntimeError as error:
                peers = self._peers if len(self._works) < len(self._peers) else [self._peers[place]]
                lost = ", ".join(str(peer) for peer in dict.fromkeys(peers))
                raise RuntimeError(f"no answer from rank {lost} of the group: {error}") from error


def _communicator_by_name(name: str, global_ranks: tuple[int, ...], tag: int) -> ProcessGroupCommunicator:
    """The communicator that was pickled. Raises RuntimeError where this process has no such group."""
    try:
        group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
        found = tuple(dist.get_process_group_ranks(group))
    except (LookupError, RuntimeError, ValueError):
        found = ()
    if found != global_ranks:
        raise RuntimeError(
            f"a pickled attention belongs to the process group {name!r} of ranks {list(global_ranks)}, which this job "
            f"does not have; save the module's state_dict instead, and build its attention anew."
        )
    return ProcessGroupCommunicator(group, tag=tag)


@functools.cache
def rounds(rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """To whom `rank` sends, and from whom it receives, in each round of an all-to-all; see Note [Rounds]."""
    radices = _prime_factors(size)
    distances = range(1, size)
    return tuple((_shifted(rank, each, radices, 1), _shifted(rank, each, radices, -1)) for each in distances)


def _shifted(rank: int, distance: int, radices: list[int], sign: int) -> int:
    """rank + sign * distance without carry; the first radix is that of the lowest digit."""
    shifted, weight = 0, 1
    for radix in radices:
        shifted += (rank // weight + sign * (distance // weight)) % radix * weight
        weight *= radix
    return shifted


def _prime_factors(number: int) -> list[int]:
    """In ascending order; none of 1."""
    if number == 1:
        return []
    smallest = next((factor for factor in range(2, math.isqrt(number) + 1) if number % factor == 0), number)
    return [smallest, *_prime_factors(number // smallest)]


def _require_contiguous(send: Tensor) -> None:
    # Backends read the memory front to back: a permuted tensor would arrive scrambled, without an error.
    assert send.is_contiguous(), f"communication needs contiguous memory; got strides {send.stride()}"
