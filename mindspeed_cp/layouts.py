"""Who holds what: makers of a rank's runs, for plans. Integers and slices; no torch.

Note [Zigzag]
    Under a causal mask the last tokens see the most keys. A sequence is therefore cut into 2P chunks for P ranks, and
    rank r holds chunks r and 2P-1-r; every rank then has the same work. For P = 4:

        chunk   0  1  2  3  4  5  6  7
        rank    0  1  2  3  3  2  1  0

    This is Megatron's own sharding (PyTorch calls it head-tail, TransformerEngine DualChunkSwap), and every algorithm
    here works on it, so that neither the data loader nor the rotary embedding has to know which algorithm runs.
    Source: Llama 3, arXiv:2407.21783, section 3.3.2; zhuzilin/ring-flash-attention.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from mindspeed_cp.plan import Run, joined


@dataclass(frozen=True)
class EqualChunks:
    """A stream of documents in equal chunks, one (contiguous) or two (zigzag, see Note [Zigzag]) for each rank.

    num_ranks: P. tokens: of one rank. kind: which chunks a rank holds. documents: their lengths, which make up the
    stream's P * tokens; the whole stream is one document by default.

    Raises ValueError where the chunks do not divide the tokens, or the documents are not as long as the stream.
    """

    num_ranks: int
    tokens: int
    kind: Literal["zigzag", "contiguous"] = "zigzag"
    documents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        length = self.num_ranks * self.tokens
        if self.num_ranks < 1 or self.kind not in ("zigzag", "contiguous") or self.tokens < 0:
            raise ValueError(f"{self}: a layout is zigzag or contiguous, over 1 rank or more.")
        if self.kind == "zigzag" and self.tokens % 2:
            raise ValueError(f"{self.tokens} tokens a rank are no two equal chunks; give {self.tokens + 1}.")
        if self.documents is not None and (sum(self.documents) != length or min(self.documents, default=1) < 1):
            raise ValueError(
                f"documents of {sum(self.documents)} tokens do not make up {self.num_ranks} ranks of {self.tokens}: "
                f"give lengths above 0 whose sum is {length}."
            )

    def num_tokens(self, rank: int) -> int:
        """See Layout."""
        return self.tokens

    def runs(self, rank: int) -> tuple[Run, ...]:
        """See Layout."""
        return _runs(self, rank)

    @property
    def chunks_per_rank(self) -> int:
        """Number of chunks that one rank holds."""
        return 2 if self.kind == "zigzag" else 1

    def chunks(self, rank: int) -> tuple[int, ...]:
        """Chunks that `rank` holds, in its order."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"there is no rank {rank} among {self.num_ranks}.")
        return (rank,) if self.kind == "contiguous" else (rank, 2 * self.num_ranks - 1 - rank)


@functools.lru_cache(maxsize=4096)
def _runs(layout: EqualChunks, rank: int) -> tuple[Run, ...]:
    chunk = layout.tokens // layout.chunks_per_rank
    starts = [0] if layout.documents is None else [0, *accumulate(layout.documents)]

    def cut(number: int, start: int) -> Iterator[Run]:
        begin, end = number * chunk, (number + 1) * chunk
        for document, first in enumerate(starts):
            last = starts[document + 1] if document + 1 < len(starts) else end
            low, high = max(begin, first), min(end, last)
            if low < high:
                yield Run(start + low - begin, start + high - begin, low - first, document)

    return joined(run for place, number in enumerate(layout.chunks(rank)) for run in cut(number, place * chunk))
