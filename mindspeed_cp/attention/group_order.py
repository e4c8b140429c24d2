"""The order of a Ulysses group's tokens: from that of its members, one after the other, to that of the stream and back.

Shapes: S tokens of all members, B batch.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from mindspeed_cp.plan import GroupedLayout, Part


@dataclass(frozen=True, eq=False)
class GroupOrder:
    """How the tokens of a group's members, one member after the other, are put in the order of the stream.

    sizes: tokens of each member. parts: of the members' shards, in order; of each sample, or of all where there is one.
    """

    sizes: tuple[int, ...]
    parts: tuple[tuple[Part, ...], ...]
    _indices: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict)

    @functools.cached_property
    def is_sorted(self) -> bool:
        """Whether they are in order as they are."""
        return all(parts == tuple(sorted(parts)) for parts in self.parts)

    def sort(self, tokens: Tensor) -> Tensor:
        """The members' tokens [S, B, ...] in order."""
        if self.is_sorted:
            return tokens
        result = torch.empty_like(tokens)
        for samples, index in self._by_sample(tokens.device):
            torch.index_select(tokens[:, samples], 0, index, out=result[:, samples])
        return result

    def unsort_into(self, result: Tensor, tokens: Tensor) -> None:
        """Put what is in order [S, B, ...] where its members have it."""
        if self.is_sorted:
            result.copy_(tokens)
            return
        for samples, index in self._by_sample(tokens.device, inverse=True):
            torch.index_select(tokens[:, samples], 0, index, out=result[:, samples])

    def _by_sample(self, device: torch.device, *, inverse: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Samples, and which of the members' tokens is the i-th in order; or the inverse of that."""
        # Copied to the device once: at each call an accelerator would have the host wait for it.
        if device not in self._indices:
            starts = (0, *accumulate(self.sizes))
            spans = [
                [(starts[part.member] + part.start, part.stop - part.start) for part in each] for each in self.parts
            ]
            there = [torch.cat([torch.arange(start, start + count) for start, count in each]) for each in spans]
            self._indices[device] = tuple(x.to(device) for each in there for x in (each, each.argsort()))
        indices = self._indices[device][inverse::2]
        for sample, index in enumerate(indices):
            yield slice(None) if len(indices) == 1 else slice(sample, sample + 1), index


def group_order(layout: GroupedLayout, group: int) -> GroupOrder:
    """The order of a group's tokens."""
    sizes = tuple(layout.layout.num_tokens(member) for member in layout.groups[group])
    return GroupOrder(sizes, tuple(layout.parts(group).values()))
