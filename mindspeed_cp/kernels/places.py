"""Where a call's tokens lie in the tensors of a rank: taken as views where they can be, else as copies.

Shapes: B batch, H heads, S tokens, D head size; of a call, n tiles of s tokens each or m tokens in all, b samples.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

ALL = slice(None)
"""All of a dim: this very object is known at a glance."""


class Place(NamedTuple):
    """Where some tokens are in a tensor [B, H, S, ...]: slices of the batch and of the tokens, or an index of each."""

    samples: slice | Tensor
    tokens: slice | Tensor

    def take(self, x: Tensor) -> Tensor:
        """What is there: by slices a view [b, H, s, ...], by an index [m] or [n, s] a copy [1 or n, H, m or s, ...]."""
        if isinstance(self.tokens, slice):
            assert isinstance(self.samples, slice)
            return part(x if self.samples is ALL else part(x, 0, self.samples), 2, self.tokens)
        found = x[self.samples, :, self.tokens]
        return found.movedim(1, 0).unsqueeze(0) if self.tokens.dim() == 1 else found.movedim(2, 1)

    def put(self, x: Tensor, content: Tensor) -> None:
        """Write what `take` gives by an index [m]."""
        x[self.samples, :, self.tokens] = content.squeeze(0).movedim(0, 1)


def part(x: Tensor, dim: int, of: slice) -> Tensor:
    """x[:, .., of] along `dim`: one operation where indexing is one for each dim, and none where it is all of it."""
    if of is ALL or ((of.start or 0) == 0 and of.stop in (None, x.size(dim))):
        return x
    return x.narrow(dim, of.start, of.stop - of.start)


def in_all_samples(tokens: slice) -> Place:
    """Where these tokens are in every sample."""
    return Place(ALL, tokens)


class Views:
    """Tensors [B, H, S, ...] of which calls take their tokens. Calls at one place share views, one after another."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._at: tuple[Place, slice] | None = None
        self._taken: tuple[Tensor, ...] = ()

    def take(self, place: Place, heads: slice = ALL) -> tuple[Tensor, ...]:
        """What is there of some heads: by slices views, by an index copies."""
        if not isinstance(place.tokens, slice):
            return tuple(place.take(part(x, 1, heads)) for x in self._tensors)
        if (place, heads) != self._at:
            self._taken = tuple(place.take(part(x, 1, heads)) for x in self._tensors)
            self._at = place, heads
        return self._taken

    def put(self, place: Place, heads: slice, content: Sequence[Tensor]) -> None:
        """Write what `take` gives; views have it already."""
        if not isinstance(place.tokens, slice):
            for x, each in zip(self._tensors, content, strict=True):
                place.put(part(x, 1, heads), each)


class Gathered(NamedTuple):
    """How the tokens of a call's tiles are handed to a kernel, and taken back.

    given: where they are, with copies of tokens for padding. back: where the tokens themselves are; the same where
    nothing is padded. real: which of the tokens given they are, [m]; None for all.
    """

    given: Place
    back: Place
    real: Tensor | None

    def result(self, x: Tensor) -> Tensor:
        """A kernel's result for the tokens given [n, H, s, ...], as `back` has them."""
        if isinstance(self.given.tokens, slice) or self.given.tokens.dim() == 1:
            return x
        x = x.movedim(1, 2).flatten(0, 1)
        x = x if self.real is None else x[self.real]
        return x.movedim(0, 1).unsqueeze(0)


def place_within(tokens: Sequence[slice], wanted: slice) -> slice:
    """Where the tokens `wanted` are when the slices `tokens` are put one after another."""
    before = 0
    for each in tokens:
        if each.start <= wanted.start and wanted.stop <= each.stop:
            return slice(before + wanted.start - each.start, before + wanted.stop - each.start)
        before += each.stop - each.start
    raise AssertionError(f"{wanted} of {tokens}: the program sends too little")


def of_sample(sample: int | None) -> slice:
    """The part of a batch that a tile is of."""
    return ALL if sample is None else slice(sample, sample + 1)
