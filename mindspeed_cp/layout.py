"""Which tokens of a sequence each context-parallel rank holds.

Note [Zigzag]
    Under a causal mask the last tokens see the most keys. A sequence is therefore cut into 2P chunks for P ranks, and
    rank r holds chunks r and 2P-1-r; every rank then has the same work. For P = 4:

        chunk   0  1  2  3  4  5  6  7
        rank    0  1  2  3  3  2  1  0

    This is Megatron's own sharding (PyTorch calls it head-tail, TransformerEngine DualChunkSwap), and every algorithm
    here works on it, so that neither the data loader nor the rotary embedding has to know which algorithm runs.
    Source: Llama 3, arXiv:2407.21783, section 3.3.2; zhuzilin/ring-flash-attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class MaskKind(Enum):
    """Which keys a query sees."""

    NONE = "none"
    """All of them."""
    TRIANGLE = "triangle"
    """Key j is seen by query i where j <= i; as many keys as queries."""
    ARBITRARY = "arbitrary"
    """What a boolean tensor says."""


class BlockWork(NamedTuple):
    """What is to be computed between the queries of one owner and the keys of another: slices of each one's tokens.

    mask: NONE or TRIANGLE, between the queries and keys of the slices.
    """

    queries: slice
    keys: slice
    mask: MaskKind


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Assignment of sequence chunks to the `size` ranks of a context-parallel group.

    size: number of ranks P.
    kind: "zigzag" (see Note [Zigzag]) or "contiguous" (rank r holds the r-th of P equal parts).
    """

    size: int
    kind: Literal["zigzag", "contiguous"] = "zigzag"

    def __post_init__(self) -> None:
        if self.size < 1 or self.kind not in ("zigzag", "contiguous"):
            raise ValueError(f"{self}: a layout is zigzag or contiguous, over 1 rank or more.")

    @property
    def chunks_per_rank(self) -> int:
        """Number of chunks that one rank holds."""
        return 2 if self.kind == "zigzag" else 1

    @property
    def num_chunks(self) -> int:
        """Number of equal chunks that the whole sequence is cut into; it must divide the sequence length."""
        return self.size * self.chunks_per_rank

    def chunk_ids(self, rank: int) -> tuple[int, ...]:
        """Chunks that `rank` holds, in the order in which it holds them."""
        if not 0 <= rank < self.size:
            raise ValueError(f"there is no rank {rank} among {self.size}.")
        if self.kind == "contiguous":
            return (rank,)
        return (rank, 2 * self.size - 1 - rank)

    def gather_order(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Order that sorts by position the chunks found in the concatenated shards of `ranks`.

        Entry i names the place, within the concatenation, of the i-th earliest chunk. All ranks of the group give the
        whole sequence in order; some of them give the part that they hold, in order.
        """
        held = [chunk for rank in ranks for chunk in self.chunk_ids(rank)]
        return tuple(sorted(range(len(held)), key=held.__getitem__))

    def work(self, query_owner: int, key_owner: int, *, causal: bool, num_tokens: int) -> BlockWork | None:
        """The work between the queries of one rank and the keys of another, each of which holds `num_tokens`.

        None where no query sees a key. This is the one place that knows who sees whom: see Note [Zigzag] for why a rank
        sees the first half of an earlier one's keys, and a later one's keys are seen by the second half of its queries.
        """
        everything, half = slice(0, num_tokens), num_tokens // 2
        if not causal:
            return BlockWork(everything, everything, MaskKind.NONE)
        if query_owner == key_owner:
            return BlockWork(everything, everything, MaskKind.TRIANGLE)
        if self.kind == "contiguous":
            return BlockWork(everything, everything, MaskKind.NONE) if key_owner < query_owner else None
        if key_owner < query_owner:
            return BlockWork(everything, slice(0, half), MaskKind.NONE)
        return BlockWork(slice(half, num_tokens), everything, MaskKind.NONE)

    def shard(self, sequence: Tensor, rank: int, dim: int) -> Tensor:
        """Tokens of `sequence` that `rank` holds, as a new contiguous tensor.

        sequence: any shape, the whole sequence along `dim`. Raises ValueError if its length is not a multiple of
        `num_chunks`.
        """
        chunks = self._chunks(sequence, dim)
        return torch.cat([chunks[chunk] for chunk in self.chunk_ids(rank)], dim=dim).contiguous()

    def restore(self, shards: Tensor, dim: int) -> Tensor:
        """The sequence in order, from the shards of ranks 0 to P-1 concatenated along `dim`: the inverse of `shard`."""
        chunks = self._chunks(shards, dim)
        return torch.cat([chunks[place] for place in self.gather_order(range(self.size))], dim=dim)

    def _chunks(self, sequence: Tensor, dim: int) -> tuple[Tensor, ...]:
        length = sequence.size(dim)
        if length % self.num_chunks:
            raise ValueError(
                f"a sequence of {length} tokens cannot be cut into the {self.num_chunks} equal chunks that the "
                f"{self.kind} layout of {self.size} ranks needs; pad it to a multiple of {self.num_chunks}."
            )
        return sequence.chunk(self.num_chunks, dim)
