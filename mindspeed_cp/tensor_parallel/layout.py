"""Which axes of the grid shard which dim of a tensor, as values that travel with the tensor.

Shapes: B batch, S sequence, H features. Activations are [B, S, H], or [B, H] without a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from mindspeed_cp.tensor_parallel.grid import Axes

Placement = tuple[Axes, ...]
"""The axes that shard each dim of a tensor."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which axes shard each dim of an activation; along all others it is replicated."""

    batch: Axes = ()
    sequence: Axes = ()
    features: Axes = ()

    def __str__(self) -> str:
        """In words: "batch by i, features by j"."""
        dims = [("batch", self.batch), ("sequence", self.sequence), ("features", self.features)]
        return ", ".join(f"{dim} by {' and '.join(axes)}" for dim, axes in dims if axes) or "no dim sharded"

    @property
    def rows(self) -> Axes:
        """All axes that shard batch or sequence."""
        return self.batch + self.sequence

    def row_dim(self, axis: str) -> int:
        """The dim of an activation that `axis` shards, batch or sequence.

        Counted so that it holds for [B, S, H] and, with its one dim of rows, for [B, H].
        """
        return 0 if axis in self.batch else -2

    def placement(self, num_dims: int) -> Placement:
        """By dim of an activation of two or three dims."""
        if num_dims == 2:
            return (self.rows, self.features)
        return (self.batch, self.sequence, self.features)

    def within(self, *, batch: Axes, sequence: Axes) -> "Layout":
        """The same within parts of the batch and of the sequence that further axes have cut."""
        return replace(self, batch=batch + self.batch, sequence=sequence + self.sequence)


@dataclass(frozen=True)
class Sharded:
    """This rank's part of an activation, and which part that is."""

    local: Tensor
    layout: Layout

    def map(self, function: Callable[[Tensor], Tensor]) -> "Sharded":
        """What an elementwise function gives: an activation in the same layout."""
        return Sharded(function(self.local), self.layout)

    def __add__(self, other: "Sharded") -> "Sharded":
        if self.layout != other.layout:
            raise ValueError(
                f"activations with {self.layout} and with {other.layout} cannot be added: a residual goes from a "
                f"block's input to its last layer's output, which lie alike."
            )
        return Sharded(self.local + other.local, self.layout)
