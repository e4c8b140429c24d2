"""A batch of packed documents: who sees whom, who holds what, and the shards of all that goes with it.

Shapes: B samples, S tokens of a whole sample, s tokens of one rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from mindspeed_cp.documents import (
    BandsOf,
    MaskType,
    Numbers,
    WindowSize,
    bands_of_documents,
    lengths_of,
    ranks_of,
    tokens_of,
)
from mindspeed_cp.handles import with_handle
from mindspeed_cp.layouts import Balanced, Contiguous, DocumentZigzag, PackedLayout, Zigzag
from mindspeed_cp.messages import or_list
from mindspeed_cp.plan import CAUSAL, AttentionPlan, Band
from mindspeed_cp.sharding import CPU, IGNORE_INDEX, has_next, positions, restore, shard, shift_labels

LayoutName = Literal["contiguous", "zigzag", "zigzag_by_document", "balanced"]
Preference = Literal["locality", "balance"]


@dataclass(frozen=True)
class PackedBatch:
    """Samples made of documents, cut over the ranks of a context-parallel group; documents see nothing of each other.

    Make it with `from_cu_seqlens`, once a batch, and call `attention(q, k, v, plan=batch.plan)` with shards by it.

    layout: who holds what. bands: what a query sees of its document. bands_of: the documents, by number, for which that
    is something else. plan: who sees whom, for attention.
    """

    layout: PackedLayout
    bands: tuple[Band, ...] = CAUSAL
    bands_of: BandsOf = ()
    plan: AttentionPlan = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Made here, and not when it is asked for: that may be within a compiled function.
        plan = AttentionPlan(self.layout, self.layout, self.bands, dict(self.bands_of))
        object.__setattr__(self, "plan", with_handle(plan))

    def __setstate__(self, state: dict[str, object]) -> None:
        # A deep copy, or a batch from another process, has a plan of its own.
        self.__dict__.update(state)
        with_handle(self.plan)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Numbers | Sequence[Numbers],
        num_ranks: int,
        *,
        cu_seqlens_padded: Numbers | Sequence[Numbers] | None = None,
        mask_type: MaskType | Sequence[MaskType | None] | None = None,
        window_size: WindowSize | Sequence[WindowSize | None] | None = None,
        prefix_lengths: int | Sequence[int | None] | None = None,
        layout: LayoutName = "balanced",
        prefer: Preference | None = None,
        tokens: Numbers | None = None,
    ) -> "PackedBatch":
        """The batch whose documents begin and end at these places of the stream.

        cu_seqlens: [documents + 1] from 0 to S, for all samples, or one for each of B; rows of a matrix may be filled
            up with S. int32 or int64, on the CPU.
        num_ranks: of the context-parallel group.
        cu_seqlens_padded: where the documents begin in a stream that holds padding after each; it is cut with them
            and sees nothing.
        mask_type: "causal", "full" or "prefix" (a query sees its document's first `prefix_lengths` tokens, and what
            came before it). window_size: instead of it (left, right) as FlashAttention has it, -1 being without bound.
            Each for all documents, or one for each of the batch, in order. Causal where neither is given.
        layout: how tokens are dealt to ranks, see layouts.py; prefer: what "balanced" does first. tokens: of a sample
            on each rank; by default as many on each.

        Raises ValueError for numbers that are no such places, and for a mask beside a window.
        """
        samples, padded = lengths_of(cu_seqlens, cu_seqlens_padded), cu_seqlens_padded is not None
        bands, bands_of = bands_of_documents(samples, padded, mask_type, window_size, prefix_lengths)
        dealt = _deal(layout, ranks_of(num_ranks), samples, padded, tokens_of(tokens), prefer, bands, bands_of)
        return cls(dealt, bands, bands_of)

    def with_mask(
        self,
        *,
        mask_type: MaskType | Sequence[MaskType | None] | None = None,
        window_size: WindowSize | Sequence[WindowSize | None] | None = None,
        prefix_lengths: int | Sequence[int | None] | None = None,
    ) -> "PackedBatch":
        """The same tokens on the same ranks under another mask, for layers that have windows of their own."""
        samples, padded = self.layout.samples, self.layout.padded
        bands, bands_of = bands_of_documents(samples, padded, mask_type, window_size, prefix_lengths)
        return replace(self, bands=bands, bands_of=bands_of)

    def with_layout(self, layout: LayoutName, *, prefer: Preference | None = None) -> "PackedBatch":
        """The same documents under the same mask, dealt to the ranks by another layout.

        They are dealt anew, as many tokens on each rank, also where this batch was made with `tokens`.
        """
        now = self.layout
        dealt = _deal(layout, now.num_ranks, now.samples, now.padded, None, prefer, self.bands, self.bands_of)
        return replace(self, layout=dealt)

    def shard(self, tensor: Tensor, rank: int, dim: int = 1, *, batch_dim: int = 0) -> Tensor:
        """Those tokens of `tensor` that `rank` holds. tensor: any shape, whole samples along `dim`."""
        return shard(tensor, self.layout, rank, dim, batch_dim=batch_dim)

    def restore(self, shards: Tensor | Sequence[Tensor], dim: int = 1, *, batch_dim: int = 0) -> Tensor:
        """All tokens in order. shards: of ranks 0 to P-1, or these concatenated along `dim`."""
        return restore(shards, self.layout, dim, batch_dim=batch_dim)

    def position_ids(self, rank: int, device: torch.device | str = CPU) -> Tensor:
        """Position of each of a rank's tokens in its document, of padding from 0 anew: [1 or B, s] int64."""
        return positions(self.layout, rank, device)

    def labels(self, tokens: Tensor, rank: int, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """For each of a rank's tokens the next one of its document, `ignore_index` for the last one and for padding.

        tokens: [B, S], whole samples. They are shifted before they are cut: the next token may be another rank's.
        Returns [B, s].
        """
        return self.shard(shift_labels(tokens, self.layout, ignore_index=ignore_index), rank)

    def loss_mask(self, rank: int, device: torch.device | str = CPU) -> Tensor:
        """1 for each of a rank's tokens that has a label, else 0: [1 or B, s] fp32."""
        return self.shard(has_next(self.layout, device), rank).float()


def _deal(
    name: LayoutName,
    num_ranks: int,
    samples: tuple[tuple[int, ...], ...],
    padded: bool,
    tokens: tuple[int, ...] | None,
    prefer: Preference | None,
    bands: tuple[Band, ...],
    bands_of: BandsOf,
) -> PackedLayout:
    """The layout of this name."""
    if prefer is not None and name != "balanced":
        raise ValueError(f"prefer={prefer!r} says how layout='balanced' deals, and this one is {name!r}; leave it out.")
    if name == "balanced":
        preference = "locality" if prefer is None else prefer
        return Balanced(num_ranks, samples, tokens, padded, prefer=preference, bands=bands, bands_of=bands_of)
    if name == "contiguous":
        return Contiguous(num_ranks, samples, tokens, padded)
    if name == "zigzag":
        return Zigzag(num_ranks, samples, tokens, padded)
    if name == "zigzag_by_document":
        return DocumentZigzag(num_ranks, samples, tokens, padded)
    raise ValueError(f"layout={name!r} is unknown; give {or_list(get_args(LayoutName))}.")
