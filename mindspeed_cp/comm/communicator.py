"""Collective operations of one group of ranks."""

import functools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.comm.traffic import Traffic
from mindspeed_cp.rounds import rounds, rounds_under_way

# The name since torch 2.13, which warns at each call by the earlier one.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_CPU = torch.device("cpu")

_AGREEMENT_TAG = 1
"""Of the messages of agreements; tensors have 0."""


LARGE = 2**16
"""Bytes of a message from which on it is worth sending and receiving by itself, from where it lies."""


class LostRank(RuntimeError):
    """A rank is gone, or does not answer within the group's timeout; which one is said."""


class Transfer(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Return when what was to be received may be read, and what was sent may be overwritten.

        With gloo the host waits, and LostRank says that a peer is gone or does not answer within the group's
        timeout. With NCCL and HCCL only the current stream waits: their watchdog finds a lost peer later, and ends the
        process. TORCH_NCCL_BLOCKING_WAIT=1 (NPU: TORCH_HCCL_BLOCKING_WAIT=1, older builds HCCL_BLOCKING_WAIT=1), set
        before the groups are made, has the host wait and raise as with gloo, so that no overlap is left.
        """
        ...


class Addressed(NamedTuple):
    """What is sent to a rank, or where to put what comes from it."""

    rank: int
    content: Tensor


class Sizes(NamedTuple):
    """How many rows of a tensor go to each rank, and how many come from it."""

    sent: Sequence[int]
    received: Sequence[int]


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

    def all_to_all(self, send: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Exchange equal parts: `send[p]` goes to rank p, and row p of the result came from rank p.

        send: [size, ...], contiguous. The result has the same shape and dtype. sizes: for parts that are not equal; of
        the rows of `send` the first go to rank 0, those after them to rank 1, and the result's come likewise.
        """
        ...

    def all_to_all_of_parts(self, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Tensor]]) -> None:
        """Exchange several tensors with each rank: those in `sends[p]` arrive in this rank's `receives` on rank p.

        All contiguous; those of two ranks in one order, of the same sizes. Nothing goes from a rank to itself.
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

    def exchange_all(self, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> Transfer:
        """Start an exchange of several messages at once; see `exchange`, which is one of at most one either way."""
        ...


class AgreeingCommunicator(Communicator, Protocol):
    """A Communicator whose ranks can agree on what they have come with, see Note [Agreement] in agreement.py."""

    @property
    def apart(self) -> Communicator:
        """The same ranks, for messages that are never taken for those of this one, and counted in another traffic."""
        ...

    @property
    def on_host(self) -> bool:
        """Whether `apart` carries tensors of the CPU, as gloo does."""
        ...


class _Message(NamedTuple):
    """way: dist.isend or dist.irecv. peer: rank within the group."""

    way: Callable[..., dist.Work | None]
    content: Tensor
    peer: int


ONE_EACH_WAY = ("npu",)
"""Devices whose backend takes, in one batch, at most one message to a rank and one from it."""


def _batches(messages: Sequence[_Message]) -> list[list[_Message]]:
    """Messages of an accelerator as they are started together.

    Of several from one rank to another the first is matched with the first, both ends having them in one order: so
    PyTorch documents `batch_isend_irecv`, whose messages NCCL queues by peer. HCCL sorts those of a batch by itself and
    allows no second one between two ranks (HcclBatchSendRecv, "Constraints"); there the second of each pair of ranks
    waits, at both ends, for the next batch.
    """
    if messages[0].content.device.type not in ONE_EACH_WAY:
        return [list(messages)]
    batches: list[list[_Message]] = []
    met = Counter[tuple[object, int]]()
    for each in messages:
        number = met[each.way, each.peer]
        met[each.way, each.peer] += 1
        if number == len(batches):
            batches.append([])
        batches[number].append(each)
    return batches


class ProcessGroupCommunicator:
    """A Communicator over a torch.distributed process group, or some of its ranks, which counts what it sends.

    group: None is the default group of all ranks. tag: of its messages; gloo gives those of one tag to receives of no
    other. ranks: by their numbers in the group; all of them, in order, by default. Where it is among some of them,
    everything is made of messages: collective operations of a backend are for all.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        traffic: Traffic | None = None,
        *,
        tag: int = 0,
        ranks: Sequence[int] | None = None,
    ) -> None:
        group = group or dist.group.WORLD
        assert group is not None, "there is no process group yet"
        members = dist.get_process_group_ranks(group)
        self.group = group
        self.ranks = tuple(range(len(members)) if ranks is None else ranks)
        self.rank = self.ranks.index(dist.get_rank(group))
        self.size = len(self.ranks)
        self.global_ranks = tuple(members[rank] for rank in self.ranks)
        self.traffic = traffic if traffic is not None else Traffic()
        self._tag = tag
        self._is_whole = list(self.global_ranks) == members

    def subset(self, ranks: Sequence[int], traffic: Traffic | None = None) -> "ProcessGroupCommunicator":
        """A communicator among some of the ranks, by their numbers here and in their order, with no new process group.

        This rank has to be one of them. traffic: where it counts; where this one does by default.
        """
        ranks = [self.ranks[rank] for rank in ranks]
        return ProcessGroupCommunicator(self.group, traffic or self.traffic, tag=self._tag, ranks=ranks)

    @functools.cached_property
    def apart(self) -> "ProcessGroupCommunicator":
        """See AgreeingCommunicator.apart."""
        return ProcessGroupCommunicator(self.group, tag=_AGREEMENT_TAG, ranks=self.ranks)

    @property
    def on_host(self) -> bool:
        """See AgreeingCommunicator.on_host."""
        return carries_cpu_tensors(self.group)

    def all_to_all(self, send: Tensor, sizes: Sizes | None = None) -> Tensor:
        """See Communicator.all_to_all."""
        _require_contiguous(send)
        if sizes is None and send.size(0) != self.size:
            raise ValueError(f"an all-to-all among {self.size} ranks sends {self.size} parts, not {send.size(0)}.")
        if sizes is None:
            sizes = Sizes([1] * self.size, [1] * self.size)
        received = send.new_empty((sum(sizes.received), *send.shape[1:]))
        own = send.split(list(sizes.sent))[self.rank]
        if send.device.type == "cpu" or not self._is_whole:
            self._all_to_all_by_messages(received, send, sizes)
        elif len({*sizes.sent, *sizes.received}) == 1:
            dist.all_to_all_single(received, send, group=self.group)
        else:
            dist.all_to_all_single(received, send, list(sizes.received), list(sizes.sent), group=self.group)
        self.traffic.record("all_to_all", send.nbytes - own.nbytes)
        return received

    def _all_to_all_by_messages(self, received: Tensor, send: Tensor, sizes: Sizes) -> None:
        """In rounds, see Note [Rounds], every receive before its send: gloo's own sends first, see `exchange`.

        Gloo's loses up to half of a link's rate between two ranks, and a third among eight.
        """
        arriving, leaving = received.split(list(sizes.received)), send.split(list(sizes.sent))
        arriving[self.rank].copy_(leaving[self.rank])
        self._exchange_in_rounds([[x] for x in leaving], [[x] for x in arriving])

    def all_to_all_of_parts(self, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Tensor]]) -> None:
        """See Communicator.all_to_all_of_parts."""
        leaving = [x for each in sends for x in each]
        for x in (*leaving, *(x for each in receives for x in each)):
            _require_contiguous(x)
        self._exchange_in_rounds(sends, receives)
        self.traffic.record("all_to_all", sum(x.nbytes for x in leaving))

    def _exchange_in_rounds(self, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Tensor]]) -> None:
        """What goes to each other rank and comes from it; on an accelerator all at once, as its own all-to-all does."""
        on_host = any(x.device.type == "cpu" for each in (*sends, *receives) for x in each)
        most = rounds_under_way(self.size) if on_host else self.size
        in_order = rounds(self.rank, self.size)
        # What is under way at once is posted at once: every receive then comes before all sends.
        together = [in_order] if most > len(in_order) else [(each,) for each in in_order]
        under_way: deque[Transfer] = deque()
        for some in together:
            if len(under_way) == most:
                under_way.popleft().wait()
            messages = [_Message(dist.irecv, x, each.source) for each in some for x in receives[each.source]]
            messages += [_Message(dist.isend, x, each.to) for each in some for x in sends[each.to]]
            under_way.append(self._post([each for each in messages if each.content.numel()]))
        for transfer in under_way:
            transfer.wait()

    def all_gather(self, send: Tensor) -> Tensor:
        """See Communicator.all_gather."""
        _require_contiguous(send)
        received = torch.empty((self.size, *send.shape), dtype=send.dtype, device=send.device)
        if send.device.type == "cpu" or not self._is_whole:
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
        return self.exchange_all(*one_each_way(send, to, receive, source))

    def exchange_all(self, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> Transfer:
        """See Communicator.exchange_all."""
        # Receives come first: gloo sends a payload only after the receiver's ready message, and that one would queue
        # behind a payload that is already under way on the same connection.
        messages = [_Message(dist.irecv, each.content, each.rank) for each in receives]
        messages += [_Message(dist.isend, each.content, each.rank) for each in sends]
        for each in messages:
            _require_contiguous(each.content)
        for sent in sends:
            self.traffic.record("exchange", sent.content.nbytes)
        return self._post(messages)

    def __deepcopy__(self, memo: object) -> "ProcessGroupCommunicator":
        """The same object: a module that is copied stays in its groups, which its process has once."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """By the group's name, which finds it again within the same job and nowhere else."""
        members = tuple(dist.get_process_group_ranks(self.group))
        return _communicator_by_name, (self.group.group_name, members, self._tag, self.ranks)

    def _post(self, messages: list[_Message]) -> Transfer:
        """Start all of them."""
        peers = [each.peer for each in messages]
        if not messages:
            return _ProcessGroupTransfer([], [])
        if messages[0].content.device.type == "cpu":
            return _ProcessGroupTransfer(self._start_one_by_one(messages), peers)
        works: list[dist.Work] = []
        for batch in _batches(messages):
            operations = [
                dist.P2POp(each.way, each.content, self.global_ranks[each.peer], self.group, self._tag)
                for each in batch
            ]
            works += dist.batch_isend_irecv(operations)
        return _ProcessGroupTransfer(works, peers)

    def _start_one_by_one(self, messages: list[_Message]) -> list[dist.Work]:
        """Start messages of the CPU, each on the group's backend itself.

        `batch_isend_irecv` does so too there, but asks for each message anew who is in the group, and takes longer for
        that than gloo for starting it.
        """
        backend: Any = self.group._get_backend(_CPU)
        start = {dist.irecv: backend.recv, dist.isend: backend.send}
        works = []
        for each in messages:
            try:
                works.append(start[each.way]([each.content], self.ranks[each.peer], self._tag))
            except RuntimeError as error:  # The connection is known to be closed.
                raise _lost([each.peer], error) from error
        return works


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
                raise _lost(peers, error) from error


def _lost(peers: Sequence[int], error: RuntimeError) -> LostRank:
    """What is raised where a message to or from one of these ranks fails."""
    return LostRank(f"no answer from rank {', '.join(map(str, dict.fromkeys(peers)))} of the group: {error}")


def carries_cpu_tensors(group: dist.ProcessGroup) -> bool:
    """Whether the group's backend for tensors of the CPU is there: it is not in a job of NCCL or HCCL alone."""
    try:
        group._get_backend(_CPU)
    except RuntimeError:
        return False
    return True


def one_each_way(
    send: Tensor | None, to: int, receive: Tensor | None, source: int
) -> tuple[list[Addressed], list[Addressed]]:
    """The arguments of `exchange` as those of `exchange_all`."""
    sends = [] if send is None else [Addressed(to, send)]
    return sends, [] if receive is None else [Addressed(source, receive)]


def _communicator_by_name(
    name: str, global_ranks: tuple[int, ...], tag: int, ranks: tuple[int, ...]
) -> ProcessGroupCommunicator:
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
    return ProcessGroupCommunicator(group, tag=tag, ranks=ranks)


def _require_contiguous(send: Tensor) -> None:
    # Backends read the memory front to back: a permuted tensor would arrive scrambled, without an error.
    assert send.is_contiguous(), f"communication needs contiguous memory; got strides {send.stride()}"
