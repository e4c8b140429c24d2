"""Tensors cut into the shards of context-parallel ranks, and put together again; see Note [Zigzag] in layouts.py."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mindspeed_cp.layouts import EqualChunks


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Assignment of sequence chunks to the `size` ranks of a context-parallel group, for sequences of any length.

    size: number of ranks P.
    kind: "zigzag" (see Note [Zigzag]) or "contiguous" (rank r holds the r-th of P equal parts).
    """

    size: int
    kind: Literal["zigzag", "contiguous"] = "zigzag"

    def __post_init__(self) -> None:
        self.of(0)

    def of(self, tokens: int) -> EqualChunks:
        """Who holds what, so many tokens each. Raises ValueError where the chunks do not divide them."""
        return EqualChunks(self.size, tokens, self.kind)

    @property
    def chunks_per_rank(self) -> int:
        """Number of chunks that one rank holds."""
        return self.of(0).chunks_per_rank

    @property
    def num_chunks(self) -> int:
        """Number of equal chunks that the whole sequence is cut into; it must divide the sequence length."""
        return self.size * self.chunks_per_rank

    def chunk_ids(self, rank: int) -> tuple[int, ...]:
        """Chunks that `rank` holds, in the order in which it holds them."""
        return self.of(0).chunks(rank)

    def shard(self, sequence: Tensor, rank: int, dim: int) -> Tensor:
        """Tokens of `sequence` that `rank` holds, as a new contiguous tensor.

        sequence: any shape, the whole sequence along `dim`. Raises ValueError if its length is not a multiple of
        `num_chunks`.
        """
        chunks = self._chunks(sequence, dim)
        return torch.cat([chunks[chunk] for chunk in self.chunk_ids(rank)], dim=dim).contiguous()

    def restore(self, shards: Tensor, dim: int) -> Tensor:
        """The sequence in order, from the shards of ranks 0 to P-1 concatenated along `dim`: the inverse of `shard`."""
        held = [chunk for rank in range(self.size) for chunk in self.chunk_ids(rank)]
        chunks = self._chunks(shards, dim)
        return torch.cat([chunks[held.index(chunk)] for chunk in range(self.num_chunks)], dim=dim)

    def _chunks(self, sequence: Tensor, dim: int) -> tuple[Tensor, ...]:
        length = sequence.size(dim)
        if length % self.num_chunks:
            raise ValueError(
                f"a sequence of {length} tokens cannot be cut into the {self.num_chunks} equal chunks that the "
                f"{self.kind} layout of {self.size} ranks needs; pad it to a multiple of {self.num_chunks}."
            )
        return sequence.chunk(self.num_chunks, dim)
