"""Attention whose keys and values are made of something smaller: that travels, and they are made where they are read.

Multi-latent attention makes the keys and values of all heads of one latent for each token, and a part of the keys that
all heads share. With DeepSeek-V3's sizes these are 576 numbers for 40,960.

Note [Expanding]
    Each step makes keys and values of those tokens of its block that are seen, and drops them: nothing but payloads is
    held, sent and saved. The backward pass makes them again, with the graph from which the gradients of the payload and
    of the weights follow. The payload's go home as those of keys and values do. Those of the weights are added over the
    steps in fp32 and rounded once; they are this rank's part, as those of every weight: data-parallel reducers add
    them up.

Shapes: B batch, N query heads, G key/value heads, S tokens of one rank, W numbers in a token's payload, D key head
size, V value head size, L numbers of a latent, R numbers of the part of a key that all heads share, U of the rest.
"""

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_cp.attention.blocks import Block, in_one
from mindspeed_cp.attention.exchange import Partial
from mindspeed_cp.attention.sums import TokenSum
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.handles import with_handle
from mindspeed_cp.kernels.precision import autocast_off
from mindspeed_cp.plan import Tile, union

Expand = Callable[..., tuple[Tensor, Tensor]]
"""Keys [B, G, s, D] and values [B, G, s, V] of a payload [B, s, W] and weights: pure, token by token, of any s."""


class NamedExpand(NamedTuple):
    """An `expand` by its handle (Note [Handles] in handles.py), and what an operator is told of what it makes.

    handle: of the object whose method it is, by this name; or of itself, with no name. value_head_size: V, for a graph.
    """

    handle: Tensor
    method: str
    value_head_size: int


@dataclass(frozen=True, eq=False)
class Latent:
    """What this rank's keys and values are made of, and how.

    payload: [B, S, W]; it travels. expand: see Expand; it sends nothing, and reads no other tensor that wants a
    gradient. weights: what it is given beside the payload, [G, ...] each: under Ulysses a rank gets those of its heads.
    """

    payload: Tensor
    expand: Expand
    weights: tuple[Tensor, ...] = ()

    @property
    def travelling(self) -> tuple[Tensor, Tensor]:
        """The payload as keys of one head, [B, 1, S, W], and values of no size."""
        one_head = self.payload.unsqueeze(1)
        return one_head, one_head.narrow(3, 0, 0)

    @property
    def words(self) -> str:
        """What has to be the same on all ranks."""
        wants = torch.is_grad_enabled() and any(x.requires_grad for x in (self.payload, *self.weights))
        return f"payloads of {self.payload.size(-1)} numbers with{'' if wants else 'out'} gradients"

    def check(self) -> None:
        """Raise ValueError unless keys and values can be had of it, and weights are by K/V heads."""
        k, _ = self.stand_ins
        if wrong := [tuple(weight.shape) for weight in self.weights if weight.size(0) != k.size(1)]:
            raise ValueError(
                f"weights of expand are {wrong}, and it makes {k.size(1)} K/V heads; give each as [{k.size(1)}, ...], "
                f"by K/V heads."
            )

    def with_handle(self) -> "Latent":
        """The same, with an `expand` that has a handle for as long as this is held."""
        return replace(self, expand=with_handle(functools.partial(self.expand)))

    def named(self) -> NamedExpand:
        """The `expand` for an operator in a graph. Raises ValueError where it has no handle."""
        owner: object = self.expand
        method = ""
        if isinstance(self.expand, types.MethodType) and hasattr(self.expand.__self__, "handle"):
            owner, method = self.expand.__self__, self.expand.__name__
        handle: Tensor | None = getattr(owner, "handle", None)
        if handle is None:
            raise ValueError(
                "a compiled function was given a Latent whose expand has no handle; give the method of a LatentHeads, "
                "or mindspeed_cp.handles.with_handle(expand), which is to be done outside of it."
            )
        if not torch.compiler.is_compiling():  # What an operator gives is seen when it runs.
            return NamedExpand(handle, method, 0)
        few, weights = self.payload.detach()[:, :2], (weight.detach() for weight in self.weights)
        return NamedExpand(handle, method, self.expand(few, *weights)[-1].size(-1))

    def of_heads(self, payload: Tensor, heads: slice, given: Sequence[int]) -> "Latent":
        """That of other tokens [B, T, W] and some of the heads. given: which of these kernels are given, in order."""
        expand = self.expand
        in_order = tuple(range(heads.stop - heads.start))

        def expanded(payload: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
            k, v = expand(payload, *weights)
            if k.size(1) != len(in_order):  # Nothing among the weights says which heads.
                k, v = k[:, heads], v[:, heads]
            if tuple(given) == in_order:
                return k, v
            index = torch.tensor(given, device=k.device)
            return k.index_select(1, index), v.index_select(1, index)

        return Latent(payload, expanded, tuple(weight[heads] for weight in self.weights))

    @functools.cached_property
    def stand_ins(self) -> tuple[Tensor, Tensor]:
        """Keys [B, G, S, D] and values [B, G, S, V] that say what they would be like: one number each in memory.

        Raises ValueError where these cannot be had from the payload.
        """
        if self.payload.dim() != 3:
            raise ValueError(
                f"a payload of {tuple(self.payload.shape)} is none; give [B, S, W], of each token W numbers."
            )
        batch, num_tokens, _ = self.payload.shape
        few = self.payload.detach()[:, :2]
        with torch.enable_grad(), autocast_off(self.payload.device.type):
            made = self.expand(few, *(weight.detach() for weight in self.weights))
        needed = "expand makes k [B, G, s, D] and v [B, G, s, V] of a payload [B, s, W], token by token"
        if len(made) != 2 or any(x.dim() != 4 or (x.size(0), x.size(2)) != few.shape[:2] for x in made):
            shapes = " and ".join(str(tuple(x.shape)) for x in made)
            raise ValueError(f"expand has made {shapes} of a payload {tuple(few.shape)}, and {needed}; let it do so.")
        if any(x.requires_grad for x in made):
            raise ValueError(
                "expand reads a tensor that requires a gradient and is not among its weights, which would get none; "
                "give it in Latent(weights=...), [G, ...] by K/V heads."
            )
        k, v = (x.new_empty(1).expand(batch, x.size(1), num_tokens, x.size(3)) for x in made)
        return k, v


@dataclass(frozen=True)
class LatentHeads:
    """Keys and values of multi-latent attention, as DeepSeek-V2 has them.

    latent: L; a payload is a latent, and after it the rotated part of the keys. unshared: U, of a head's keys. handle:
    what stands for it in a graph of torch.compile, see handles.py.

    Source: DeepSeek-V2, arXiv:2405.04434.
    """

    latent: int
    unshared: int
    handle: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        with_handle(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        with_handle(self)

    def expand(self, payload: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of U + R and values of V numbers from a payload of L + R. up: the up projection, [G, U + V, L]."""
        latent, shared = payload[..., : self.latent], payload[..., self.latent :]
        made = F.linear(latent, up.flatten(0, 1)).unflatten(-1, up.shape[:2])  # [B, s, G, U + V]
        shared = shared.unsqueeze(2).expand(-1, -1, up.size(0), -1)
        keys = torch.cat([made[..., : self.unshared], shared], dim=-1)
        return keys.transpose(1, 2), made[..., self.unshared :].transpose(1, 2)

    def absorbed(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """One head: the payload is its key, the latent in it its value. For queries of `absorb`."""
        one = payload.unsqueeze(1)
        return one, one[..., : self.latent]

    def absorb(self, q: Tensor, up: Tensor) -> Tensor:
        """Queries [B, N, S, L + R] that score latents as q [B, N, S, U + R] scores keys. up: [N, U + V, L]."""
        of_latent = torch.matmul(q[..., : self.unshared], up[:, : self.unshared])
        return torch.cat([of_latent, q[..., self.unshared :]], dim=-1)

    def values(self, out: Tensor, up: Tensor) -> Tensor:
        """[B, N, S, V] from an output over latents [B, N, S, L]. up: [N, U + V, L]."""
        return torch.matmul(out, up[:, self.unshared :].transpose(1, 2))


class Expansion:
    """How a pass makes keys and values of its blocks, see Note [Expanding].

    weights: as given to `expand`. backward: whether gradients are taken.
    """

    def __init__(self, expand: Expand, weights: Sequence[Tensor], *, backward: bool) -> None:
        self._expand, self._backward = expand, backward
        self._weights = [weight.detach().requires_grad_(backward) for weight in weights]
        self._sums: list[Tensor | None] = [None] * len(weights)
        self._graph: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def block(self, block: Block, tiles: Sequence[Tile]) -> Block:
        """The keys and values that these tiles see, of a block of payloads."""
        tokens = union(tile.keys for tile in tiles)
        payload = in_one(block.parts(tokens)[0]).squeeze(1)
        if not self._backward:
            return Block(tokens, *self._expand(payload, *self._weights))
        payload = payload.detach().requires_grad_()
        with torch.enable_grad():
            made = self._expand(payload, *self._weights)
        self._graph = payload, made
        return Block(tokens, *(x.detach() for x in made))

    def of_payload(self, block: Block, found: Sequence[Partial]) -> list[Partial]:
        """Gradients of the payload of the last block, from those of its keys and values."""
        assert self._graph is not None, "a block was made"
        (payload, made), self._graph = self._graph, None
        sums = [TokenSum(x) for x in (block.k, block.v)]
        for partial in found:
            for total, more in zip(sums, (partial.dk, partial.dv), strict=True):
                total.add(more, partial.place(block.tokens))
        with torch.enable_grad():
            wanted = torch.autograd.grad(
                made, (payload, *self._weights), [total.result() for total in sums], allow_unused=True
            )
        self._add(wanted[1:])
        dpayload = (torch.zeros_like(payload) if wanted[0] is None else wanted[0]).unsqueeze(1)
        sizes = [each.stop - each.start for each in block.tokens]
        return [
            Partial.of_slice(tokens, part, part.narrow(3, 0, 0))
            for tokens, part in zip(block.tokens, dpayload.split(sizes, dim=2), strict=True)
        ]

    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        for place, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self._sums[place]
            if total is None:
                self._sums[place] = gradient.to(accumulation_dtype(gradient.dtype))
            else:
                total += gradient

    def gradients(self) -> tuple[Tensor, ...]:
        """Those of the weights, rounded once."""
        return tuple(
            torch.zeros_like(weight) if total is None else total.to(weight.dtype)
            for weight, total in zip(self._weights, self._sums, strict=True)
        )
