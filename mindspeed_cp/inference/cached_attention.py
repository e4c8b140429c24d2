"""Attention of new tokens over a cache that is spread over ranks, layer by layer of one forward pass.

    prefill    many new tokens of each sample: each rank has the queries whose keys it keeps, see interleave.py
    decode     one new token of each sample, which all ranks have: only what they have found is exchanged, no key

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
from mindspeed_cp.comm import Communicator
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.inference.cache import ShardedKVCache, Stretch
from mindspeed_cp.inference.costs import Rates
from mindspeed_cp.inference.interleave import Interleaved, Span
from mindspeed_cp.inference.local import attention_state
from mindspeed_cp.inference.prefill import Strategy, prefix_attention
from mindspeed_cp.inference.states import State, all_reduce_state, merge_states
from mindspeed_cp.kernels import KERNELS, KernelRegistry, TileOutput
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan, Band, Run


class Prefill:
    """Attention of the tokens at the positions `new` of each sample, dealt as `layout`, in one forward pass.

    communicator: the ranks that share the cache; None for one. strategy, rates, kernels: see prefix_attention.
    """

    def __init__(
        self,
        cache: ShardedKVCache,
        new: Sequence[Span],
        communicator: Communicator | None = None,
        *,
        strategy: Strategy = "auto",
        rates: Rates | None = None,
        kernels: KernelRegistry = KERNELS,
    ) -> None:
        self._cache, self._new = cache, tuple(new)
        self.layout = cache.layout(new)
        self._communicator, self._strategy, self._rates, self._kernels = communicator, strategy, rates, kernels
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
            *(q, keys, values),
            plan=self._plan(layer),
            communicator=self._communicator,
            scale=scale,
            terms=terms,
            kernels=self._kernels,
            strategy=self._strategy,
            rates=self._rates,
        )
        return F.pad(state.out, (0, 0, 0, given - num_tokens))

    def _plan(self, layer: int) -> AttentionPlan:
        """One for all layers of a window."""
        window = self._cache.windows[layer]
        if window not in self._plans:
            bands = CAUSAL if window is None else (Band(window - 1, 0),)
            self._plans[window] = AttentionPlan(self.layout, self._cache.keys(layer, self._new), bands)
        return self._plans[window]


class Decode:
    """Attention of one new token of each sample, or none, which all ranks have. Arguments as those of Prefill."""

    num_tokens = 1

    def __init__(
        self,
        cache: ShardedKVCache,
        new: Sequence[Span],
        communicator: Communicator | None = None,
        *,
        kernels: KernelRegistry = KERNELS,
    ) -> None:
        self._cache, self._new, self._communicator, self._kernels = cache, tuple(new), communicator, kernels
        self._plans: dict[tuple[int | None, Span], AttentionPlan] = {}

    def refuse_window(self, layer: int, window: int | None) -> None:
        """As Prefill.refuse_window."""
        _refuse_window(self._cache, layer, window)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, terms: AttentionTerms) -> Tensor:
        """As Prefill.attend, with the same tensors of one token on every rank, and the same result."""
        self._cache.append(layer, k, v, self._new, whole=True)
        seen = self._cache.keys(layer, self._new)
        states = [
            attention_state(
                *(q, stretch.k, stretch.v),
                plan=self._plan(layer, seen, stretch),
                scale=scale,
                terms=terms,
                kernels=self._kernels,
            )
            for stretch in self._cache.stretches(layer, seen)
        ]
        mine = merge_states(*zip(*states, strict=True)) if states else _nothing_seen(q, v)
        whole = all_reduce_state(*mine, self._communicator)
        return with_sinks(TileOutput(*whole), terms.sinks).out.to(q.dtype)

    def _plan(self, layer: int, seen: Interleaved, stretch: Stretch) -> AttentionPlan:
        """Each sample's query sees those of its keys that are in the stretch, all earlier ones. One for all layers."""
        case = self._cache.windows[layer], stretch.slots
        if case not in self._plans:
            queries, keys = [], []
            for sample, new in enumerate(self._new):
                slots, named = seen.slots(self._cache.rank, sample), None if seen.alike else sample
                start, stop = max(slots.start, stretch.slots.start), min(slots.stop, stretch.slots.stop)
                if start < stop and new.start < new.stop and (named is not None or sample == 0):
                    queries.append(Run(0, 1, 0, sample, named))
                    keys.append(Run(start - stretch.slots.start, stop - stretch.slots.start, 0, sample, named))
            held = stretch.slots.stop - stretch.slots.start
            self._plans[case] = AttentionPlan(_Held(1, tuple(queries)), _Held(held, tuple(keys)), FULL)
        return self._plans[case]


def _nothing_seen(q: Tensor, v: Tensor) -> State:
    out = q.new_zeros((*q.shape[:3], v.size(3)), dtype=accumulation_dtype(q.dtype))
    return State(out, out.new_full(out.shape[:3], -torch.inf))


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
