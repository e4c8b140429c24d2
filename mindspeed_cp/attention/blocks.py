"""Blocks of keys and values, or of their gradients: how they lie in a message, and how one is sent.

Shapes: B batch, G key/value heads, S tokens, D key head size, V value head size.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.comm import LARGE
from mindspeed_cp.kernels.places import part, place_within
from mindspeed_cp.program import KV

Content = tuple[Tensor, ...]
"""What is sent of a message: all of it, or its keys and its values."""


class BlockFormat(NamedTuple):
    """How keys and values, or their gradients, lie in one flat message: the keys [S, B, G, D], then the values.

    Where both are large they are sent by themselves, so that what lies like that already, as a rank's own block and
    what kernels give often do, is sent from where it is.

    like: of the dtype and device of a message.
    """

    like: Tensor
    batch: int
    num_heads: int
    head_size: int
    value_head_size: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> "BlockFormat":
        """The format of k [B, G, S, D] and v [B, G, S, V]."""
        return cls(k, k.size(0), k.size(1), k.size(3), v.size(3))

    def numel(self, num_tokens: int) -> int:
        """Numbers in a message of so many tokens."""
        return num_tokens * self.batch * self.num_heads * (self.head_size + self.value_head_size)

    def only(self, carries: KV) -> "BlockFormat":
        """The format of these alone: the others have no numbers."""
        return self._replace(
            head_size=self.head_size if KV.KEYS in carries else 0,
            value_head_size=self.value_head_size if KV.VALUES in carries else 0,
        )

    def unpack(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a message as k [B, G, S, D] and v [B, G, S, V]; of size 0 where it does not carry them."""
        num_tokens = message.numel() // self.numel(1)
        values_from = num_tokens * self.batch * self.num_heads * self.head_size
        begin = int(message.storage_offset())
        return (
            self._view(message, num_tokens, self.head_size, begin),
            self._view(message, num_tokens, self.value_head_size, begin + values_from),
        )

    def _view(self, message: Tensor, num_tokens: int, head_size: int, begin: int) -> Tensor:
        """[B, G, S, D] of what lies as [S, B, G, D] from a place on: one operation."""
        heads, token = self.num_heads * head_size, self.batch * self.num_heads * head_size
        return message.as_strided(
            (self.batch, self.num_heads, num_tokens, head_size), (heads, head_size, token, 1), begin
        )

    def pack(self, k: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
        """A new message of tokens that lie in several tensors."""
        message = self.like.new_empty(self.numel(sum(x.size(2) for x in k)))
        for place, parts in zip(self.unpack(message), (k, v), strict=True):
            if len(parts) == 1:
                place.copy_(parts[0])
                continue
            for target, tokens in zip(place.split([x.size(2) for x in parts], dim=2), parts, strict=True):
                target.copy_(tokens)
        return message

    def split(self, message: Tensor) -> Content:
        """A message as it is sent."""
        keys, values = (message.numel() // self.numel(1) * self.batch * self.num_heads * size for size in self._sizes)
        if min(keys, values) * message.itemsize < LARGE:
            return (message,)
        return message[:keys], message[keys:]

    def content(self, k: Sequence[Tensor], v: Sequence[Tensor]) -> Content:
        """A message, as it is sent, of tokens that lie in several tensors."""
        tokens = sum(x.size(2) for x in k) * self.batch * self.num_heads
        if tokens * min(self._sizes) * self.like.itemsize < LARGE:
            return (self.pack(k, v),)
        return _flat(k, self.like), _flat(v, self.like)

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.head_size, self.value_head_size


def _flat(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Tokens [B, G, s, D] one after another as [S, B, G, D], flat and in the dtype of `like`; where they lie if so."""
    sequences = [x.permute(2, 0, 1, 3) for x in parts]
    if len(parts) == 1 and sequences[0].is_contiguous() and sequences[0].dtype == like.dtype:
        return sequences[0].flatten()
    whole = like.new_empty((sum(map(len, sequences)), *sequences[0].shape[1:]))
    for place, tokens in zip(whole.split([len(x) for x in sequences]), sequences, strict=True):
        place.copy_(tokens)
    return whole.flatten()


class Block(NamedTuple):
    """Some tokens of an owner's K/V.

    tokens: which of the owner's. k, v: [B, G, S, D] and [B, G, S, V], those one after another. message: where they
    lie in one, as they have arrived.
    """

    tokens: tuple[slice, ...]
    k: Tensor
    v: Tensor
    message: Tensor | None = None

    def place(self, keys: slice) -> slice:
        """Where the owner's tokens `keys`, all of which are here, are in k and v."""
        return place_within(self.tokens, keys)

    def only(self, carries: KV) -> "Block":
        """With these alone: the others have no numbers."""
        k, v = (x if which in carries else x.narrow(3, 0, 0) for x, which in ((self.k, KV.KEYS), (self.v, KV.VALUES)))
        return self._replace(k=k, v=v)

    def parts(self, tokens: Iterable[slice]) -> tuple[list[Tensor], list[Tensor]]:
        """Views of k and of v of some of the owner's tokens, all of which are here."""
        places = [self.place(each) for each in tokens]
        return [part(self.k, 2, place) for place in places], [part(self.v, 2, place) for place in places]


def in_one(parts: Sequence[Tensor]) -> Tensor:
    """Tokens [B, G, s, D] one after another; a view where they are one already."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)
