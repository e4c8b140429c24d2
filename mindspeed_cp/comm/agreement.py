"""Agreement of all ranks of a group on what they have come with, before they send each other tensors.

Note [Agreement]
    Messages have the sizes that both sides expect, or a backend hangs, aborts the process, or takes bf16 for fp16. So
    each rank says in words what it has come with, and sends the digest of that to every other: 8 bytes a rank. Where
    all digests are equal, nothing else is sent. Where they are not, the words follow, and every rank raises the same
    error, which names what each rank has come with. It is asked at every call, never remembered from an earlier one: a
    rank that remembers goes on to its tensors, while the one whose case has changed asks.

    A program whose layers all get the tensors of one micro-batch may ask once for all of them: `remembering` keeps what
    has been agreed on for the time of a `with` block. All ranks enter and leave it at the same place of their program,
    and within it a case that is new on one rank is new on all. The words hold the number of the call, so that a rank
    that has made fewer is found out when they next agree.

    Between processes the digests are messages from each to each, with a tag of their own: a rank that does not answer
    is known by its number, and a digest is never taken for a tensor. On a group that carries no tensors of the CPU they
    are gathered by the backend, which names nobody.

    What is not compared: the order of backward passes, and calls of two attentions that were built apart. Threads of
    one rank must not call at the same time.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.comm.communicator import Communicator, LostRank, Transfer

_WORDS_BYTES = 1024
"""Longest words that are sent; what is longer is cut."""


class Subject(NamedTuple):
    """What ranks agree on, for messages. call: what they call. way_out: how all can come to it alike."""

    call: str
    way_out: str


ATTENTION = Subject(
    "attention",
    "pad to equal shards or give one plan, cast, give one scale and kind of mask, and gradients on all or none",
)


class Agreement:
    """The ranks of a group, which come to a call together, all with the same, or not at all; see Note [Agreement].

    communicator: the group. on_host: whether it carries tensors of the CPU, as gloo does; else those of the accelerator
    are used, and the host waits for it at each call. subject: what they call.
    """

    def __init__(self, communicator: Communicator, *, on_host: bool = True, subject: Subject = ATTENTION) -> None:
        self.communicator = communicator
        self._subject = subject
        self._on_host = on_host
        self._agreed: set[str] | None = None
        self._calls = 0
        self._failure: str | None = None

    def reach(self, words: str, *, refusal: str | None = None, device: torch.device | None = None) -> None:
        """Return when all ranks have come with the same words.

        words: what this rank has come with. refusal: why it cannot go on, where it cannot.
        device: of the tensors at hand, used where the group carries none of the CPU.

        Raises ValueError on every rank where words differ or a rank refuses: with the refusal itself where all ranks
        refuse alike, else with what each rank has come with. Raises LostRank, which names them, where ranks do
        not answer within the group's timeout, and from then on: the group cannot be used any more.
        """
        self._calls += 1
        if self._agreed is not None and refusal is None and words in self._agreed:
            return
        if self._failure is not None:
            raise LostRank(f"{self._failure}; that was an earlier call, and the group cannot be used any more")
        said = f"{words if refusal is None else f'refused: {refusal}'}; call {self._calls}"
        digest = hashlib.blake2b(said.encode(), digest_size=8).digest()
        place = torch.device("cpu") if self._on_host or device is None else device
        digests = self._gather(torch.frombuffer(bytearray(digest), dtype=torch.int64).to(place))
        if len(set(digests.flatten().tolist())) > 1:
            raise ValueError(_difference(self._gather_words(said, place), self._subject))
        if refusal is not None:
            raise ValueError(refusal)
        if self._agreed is not None:
            self._agreed.add(words)

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within it, ranks that have come with some words once need not be asked about the same words again.

        All ranks have to enter and leave it at the same place of their program, once a micro-batch, say; and none of
        them may come with new words within it where another comes with words that have been agreed on.
        """
        before, self._agreed = self._agreed, set()
        try:
            yield
        finally:
            self._agreed = before

    def __deepcopy__(self, memo: object) -> "Agreement":
        """The same object: what was agreed on belongs to the group, not to one of the layers that ask."""
        return self

    def __getstate__(self) -> dict[str, object]:
        """Without what a micro-batch remembers: a copy from elsewhere would remember it for ever."""
        return self.__dict__ | {"_agreed": None}

    def _gather_words(self, words: str, place: torch.device) -> list[str]:
        sent = words.encode()[:_WORDS_BYTES].ljust(_WORDS_BYTES, b"\0")
        rows = self._gather(torch.frombuffer(bytearray(sent), dtype=torch.uint8).to(place))
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows.tolist()]

    def _gather(self, mine: Tensor) -> Tensor:
        """`mine` of every rank, [ranks, *mine.shape]."""
        if not self._on_host:
            return self.communicator.all_gather(mine)
        rank, size = self.communicator.rank, self.communicator.size
        rows = mine.new_empty((size, *mine.shape))
        rows[rank] = mine
        others = [(rank + distance) % size for distance in range(1, size)]
        transfers: dict[int, Transfer] = {}
        silent: dict[int, RuntimeError] = {}
        for other in others:
            try:
                transfers[other] = self.communicator.exchange(mine, other, rows[other], other)
            except RuntimeError as error:
                silent[other] = error
        for other, transfer in transfers.items():
            try:
                transfer.wait()
            except RuntimeError as error:
                silent[other] = error
        if silent:
            first = next(iter(silent.values()))
            self._failure = (
                f"{_ranks(sorted(silent))} of the group of {size} did not come to this call of {self._subject.call}, "
                f"which rank {rank} has reached: stopped, gone, or elsewhere in the program ({first})"
            )
            raise LostRank(self._failure) from first
        return rows


def _difference(words: Sequence[str], subject: Subject) -> str:
    """One line that says which ranks have come with what."""
    cases: dict[str, list[int]] = {}
    for rank, case in enumerate(words):
        cases.setdefault(case, []).append(rank)
    listed = "; ".join(f"{_ranks(ranks)}: {case}" for case, ranks in cases.items())
    return (
        f"the ranks of a context-parallel group call {subject.call} differently: {listed}; all of them must come to "
        f"the same call alike: {subject.way_out}."
    )


def _ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks in words: "rank 3", "ranks 0 to 2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spelled = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"rank{'s' * (len(ranks) > 1)} {spelled}"
