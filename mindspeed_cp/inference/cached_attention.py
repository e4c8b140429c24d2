"""Attention of new tokens over a cache that is spread over ranks, layer by layer of one forward pass.

    prefill    many new tokens of each sample: each rank has the queries whose keys it keeps, see interleave.py
    decode     one new token of each sample, which all ranks have, or each of its own samples, see decode.py: only
               queries, what was found for them, and the token's own keys and values are exchanged

Note [Wide attention]
    In fp64 the states of a model in bf16 are so exact that rounding them to bf16 gives the same on any number of ranks,
    but for chances of 1e-12. In fp32 one number in some 10,000 is rounded the other way; in bf16 itself fused kernels
    round probabilities, by a maximum that depends on which keys are together. From there on all numbers of a model
    differ, by steps of bf16; and its logits, which are rounded to bf16 themselves, by 0.0156 where they are above 2.

Shapes: B batch, N query heads, G key/value heads, S new tokens, D key head size, V value head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_cp.attention import AttentionTerms
from mindspeed_cp.attention.sinks import with_sinks
from mindspeed_cp.attention.sums import MergedOutput
from mindspeed_cp.comm import Communicator
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.inference.cache import ShardedKVCache, Slab
from mindspeed_cp.inference.costs import Coefficients, Rates
from mindspeed_cp.inference.decode import Method, gather_queries, pass_queries, shares
from mindspeed_cp.inference.interleave import Interleaved, Span
from mindspeed_cp.inference.local import attention_state
from mindspeed_cp.inference.prefill import Strategy, prefix_attention
from mindspeed_cp.inference.states import State, all_reduce_state
from mindspeed_cp.kernels import KERNELS, KernelRegistry, TileOutput
from mindspeed_cp.kernels.places import ALL, Place
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan, Band, Run


class Prefill:
    """Attention of the tokens at the positions `new` of each sample, dealt as `layout`, in one forward pass.

    communicator: the ranks that share the cache; None for one. strategy, rates, coefficients, pieces, kernels: see
    prefix_attention. dtype: of scores, probabilities and states, see Note [Wide attention]; that of q by default.
    """

    def __init__(
        self,
        cache: ShardedKVCache,
        new: Sequence[Span],
        communicator: Communicator | None = None,
        *,
        strategy: Strategy = "auto",
        rates: Rates | None = None,
        coefficients: Coefficients | None = None,
        pieces: int = 1,
        dtype: torch.dtype | None = None,
        kernels: KernelRegistry = KERNELS,
    ) -> None:
        self._cache, self._new, self._dtype = cache, tuple(new), dtype
        self.layout = cache.layout(new)
        self._communicator, self._kernels = communicator, kernels
        self._strategy, self._rates, self._coefficients, self._pieces = strategy, rates, coefficients, pieces
        self._plans: dict[int | None, AttentionPlan] = {}

    def refuse_window(self, layer: int, window: int | None) -> None:
        """Raise ValueError where a layer asks for another window than the cache was made for."""
        _refuse_window(self._cache, layer, window)

    @property
    def num_tokens(self) -> int:
        """Of this rank."""
        return self.layout.num_tokens(self._cache.rank)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, terms: AttentionTerms) -> Tensor:
        """Keep the keys and values of the new tokens, and give the attention of their queries over all up to them.

        q: [B, N, S, D]; k: [B, G, S, D]; v: [B, G, S, V]; S is `num_tokens` or more, what is beyond is nobody's.
        Returns [B, N, S, V].
        """
        num_tokens, given = self.num_tokens, q.size(2)
        q, k, v = (x[:, :, :num_tokens] for x in (q, k, v))
        self._cache.append(layer, k, v, self._new)
        keys, values = self._cache.view(layer, self._cache.keys(layer, self._new))
        state = prefix_attention(
            *(x.to(self._dtype or x.dtype) for x in (q, keys, values)),
            plan=self._plan(layer),
            communicator=self._communicator,
            scale=scale,
            terms=terms,
            kernels=self._kernels,
            strategy=self._strategy,
            rates=self._rates,
            coefficients=self._coefficients,
            pieces=self._pieces,
        )
        return F.pad(state.out.to(q.dtype), (0, 0, 0, given - num_tokens))

    def _plan(self, layer: int) -> AttentionPlan:
        """One for all layers of a window."""
        window = self._cache.windows[layer]
        if window not in self._plans:
            bands = CAUSAL if window is None else (Band(window - 1, 0),)
            self._plans[window] = AttentionPlan(self.layout, self._cache.keys(layer, self._new), bands)
        return self._plans[window]


class Decode:
    """Attention of one new token of each sample, or none. Arguments as those of Prefill.

    method: "tree" where all ranks have the token of every sample, and its attention; with the others each has those of
    its own samples, `own`, see `shares` in decode.py. Their new keys and values go to all, of which each rank keeps its
    own: no cached one moves either way.
    """

    num_tokens = 1

    def __init__(
        self,
        cache: ShardedKVCache,
        new: Sequence[Span],
        communicator: Communicator | None = None,
        *,
        method: Method = "tree",
        dtype: torch.dtype | None = None,
        kernels: KernelRegistry = KERNELS,
    ) -> None:
        self._cache, self._new, self._communicator = cache, tuple(new), communicator
        self._method, self._dtype, self._kernels = method, dtype, kernels
        self._plans: dict[tuple[int | None, Span, tuple[int, int]], AttentionPlan] = {}
        sharded = method != "tree" and communicator is not None
        counts = shares(cache.batch, cache.size) if sharded else [cache.batch] * cache.size
        self._samples = [slice(sum(counts[:rank]), sum(counts[: rank + 1])) for rank in range(cache.size)]
        if not sharded:
            self._samples = [slice(0, cache.batch)] * cache.size

    @property
    def own(self) -> slice:
        """The samples whose tokens this rank has."""
        return self._samples[self._cache.rank]

    def refuse_window(self, layer: int, window: int | None) -> None:
        """As Prefill.refuse_window."""
        _refuse_window(self._cache, layer, window)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, terms: AttentionTerms) -> Tensor:
        """As Prefill.attend, of one token of each of this rank's samples."""
        self._cache.append(layer, *self._of_all(k, v), self._new, whole=True)
        wide = q.to(self._dtype or q.dtype)

        def state_of(queries: Tensor, samples: slice) -> State:
            return self._state(layer, queries, v.size(3), samples, scale, terms)

        every = slice(0, self._cache.batch)
        if self._communicator is None or self._method == "tree":
            whole = all_reduce_state(*state_of(wide, every), self._communicator)
        elif self._method == "allgather_q":
            whole = gather_queries(wide, self._communicator, lambda queries: state_of(queries, every), dim=0)
        else:
            shapes = [torch.Size((each.stop - each.start, *q.shape[1:])) for each in self._samples]
            whole = pass_queries(
                wide, shapes, self._communicator, lambda owner, queries: state_of(queries, self._samples[owner])
            )
        return with_sinks(TileOutput(*whole), terms.sinks).out.to(q.dtype)

    def _of_all(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values of all samples, from the ranks that have them."""
        if self._communicator is None or self._method == "tree":
            return k, v
        longest = max(each.stop - each.start for each in self._samples)
        mine = k.new_zeros((longest, k.size(1), 1, k.size(3) + v.size(3)))
        mine[: k.size(0)] = torch.cat([k, v], dim=-1)
        rows = self._communicator.all_gather(mine)
        every = torch.cat([row[: each.stop - each.start] for row, each in zip(rows, self._samples, strict=True)])
        return every[..., : k.size(3)], every[..., k.size(3) :]

    def _state(
        self, layer: int, q: Tensor, value_head_size: int, samples: slice, scale: float, terms: AttentionTerms
    ) -> State:
        """Of the queries of some samples over the keys that this rank keeps of them."""
        seen = self._cache.keys(layer, self._new)
        merged = MergedOutput.of(q, value_head_size)
        for slab in self._cache.slabs(layer, seen):
            first, stop = max(samples.start, slab.samples.start), min(samples.stop, slab.samples.stop)
            if first >= stop:
                continue
            rows, held = (slice(first - each.start, stop - each.start) for each in (samples, slab.samples))
            state = attention_state(
                *(q[rows], slab.k[held].to(q.dtype), slab.v[held].to(q.dtype)),
                plan=self._plan(layer, seen, slab, slice(first, stop)),
                scale=scale,
                terms=terms,
                kernels=self._kernels,
            )
            merged.merge(TileOutput(*state), Place(rows, ALL))
        return State(*merged.result(accumulation_dtype(q.dtype))[:2])

    def _plan(self, layer: int, seen: Interleaved, slab: Slab, samples: slice) -> AttentionPlan:
        """Each sample's query sees those of its keys that are in the slab, all earlier ones. One for all layers."""
        case = self._cache.windows[layer], slab.slots, (samples.start, samples.stop)
        if case not in self._plans:
            every = [seen.slots(self._cache.rank, sample) for sample in range(self._cache.batch)]
            held = [
                Span(max(every[sample].start, slab.slots.start), min(every[sample].stop, slab.slots.stop))
                if self._new[sample].start < self._new[sample].stop
                else Span(0, 0)
                for sample in range(samples.start, samples.stop)
            ]
            alike = len(set(held)) == 1
            queries, keys = [], []
            for place, (start, stop) in enumerate(held[:1] if alike else held):
                if start < stop:
                    named = None if alike else place
                    queries.append(Run(0, 1, 0, place, named))
                    keys.append(Run(start - slab.slots.start, stop - slab.slots.start, 0, place, named))
            count = slab.slots.stop - slab.slots.start
            self._plans[case] = AttentionPlan(_Held(1, tuple(queries)), _Held(count, tuple(keys)), FULL)
        return self._plans[case]


def _refuse_window(cache: ShardedKVCache, layer: int, window: int | None) -> None:
    if window != cache.windows[layer]:
        raise ValueError(
            f"layer {layer} attends within a window of {window}, and the cache was made for {cache.windows[layer]}; "
            f"give each layer's window to the cache."
        )


@dataclass(frozen=True)
class _Held:
    """Tokens of the rank that asks: a plan's Layout, see there."""

    tokens: int
    held: tuple[Run, ...]

    num_ranks: ClassVar[int] = 1

    def num_tokens(self, rank: int) -> int:
        return self.tokens

    def runs(self, rank: int) -> tuple[Run, ...]:
        return self.held
