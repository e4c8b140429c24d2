"""The documents of the micro-batch at hand, in every pipeline stage and every part of one.

Note [Documents by stages]
    Only the first stage has tokens, and what the get_batch of a training script drops in the others no patch can bring
    back. So the first stage sends the documents of each micro-batch to the others, around the schedules' forward step:
    it sends without waiting, since a stage comes to a micro-batch only when the ones before it have computed it. Of a
    stage with several parts (virtual stages) the first receives, and the others take from it: each part comes to the
    micro-batches in the same order. A micro-batch without documents is said too, so that nobody waits for them.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_TAG = 0x0D0C
"""No other message between stages has it."""


class Pipeline(NamedTuple):
    """The stages that one micro-batch goes through.

    ranks: of all processes, one a stage, in order. group: carries tensors of the CPU between them.
    """

    ranks: Sequence[int]
    group: dist.ProcessGroup | None


@dataclass
class StageDocuments:
    """The documents of one micro-batch after the other, see Note [Documents by stages].

    at_hand: those of the present micro-batch, as packing has them; None where there are none.
    """

    pipeline: Pipeline | None = None
    at_hand: Tensor | None = None
    _of_parts: dict[int, deque[Tensor | None]] = field(default_factory=dict)
    _on_their_way: list[tuple[Tensor, dist.Work]] = field(default_factory=list)

    @contextmanager
    def one_micro_batch(self, part: int, num_parts: int, *, is_first: bool) -> Iterator[None]:
        """Within it, one part of this stage passes the next micro-batch on.

        part: from 0 on. is_first: whether it is the first one of a step: by then all have come to those of the last.
        """
        if is_first and part == 0:
            for _, work in self._on_their_way:
                work.wait()
            self._on_their_way.clear()
        if part:
            self.at_hand = self._of_parts[part].popleft()
        elif not self._is_first:
            self.at_hand = self._receive()
        try:
            yield
        finally:
            if part == 0:
                for other in range(1, num_parts):
                    self._of_parts.setdefault(other, deque()).append(self.at_hand)
                if self._is_first:
                    self._send(self.at_hand)
            self.at_hand = None

    @property
    def _is_first(self) -> bool:
        return self.pipeline is None or self.pipeline.ranks[0] == dist.get_rank()

    def _send(self, documents: Tensor | None) -> None:
        if self.pipeline is None:
            return
        shape = torch.tensor([0, 0] if documents is None else documents.shape, dtype=torch.int64)
        for rank in self.pipeline.ranks[1:]:
            for tensor in (shape,) if documents is None else (shape, documents):
                work = dist.isend(tensor, rank, group=self.pipeline.group, tag=_TAG)
                assert work is not None, "this rank is one of the pipeline's"
                self._on_their_way.append((tensor, work))

    def _receive(self) -> Tensor | None:
        assert self.pipeline is not None, "a stage that is not the first is one of several"
        first, group = self.pipeline.ranks[0], self.pipeline.group
        shape = torch.empty(2, dtype=torch.int64)
        dist.recv(shape, first, group=group, tag=_TAG)
        if not shape.any():
            return None
        documents = torch.empty(shape.tolist(), dtype=torch.int32)
        dist.recv(documents, first, group=group, tag=_TAG)
        return documents
