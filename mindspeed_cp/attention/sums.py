"""Sums that are built up part by part and rounded once: gradients of tokens, and the attention of queries over keys."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.kernels import MERGE_KERNELS, MergeKernel, TileOutput, add_, choose_merge_kernel
from mindspeed_cp.kernels.places import ALL, Place, Views, part


def _token_major(like: Tensor, make: Callable[..., Tensor] = torch.zeros) -> Tensor:
    """What `make` gives for the shape of `like` [B, H, S, D], in the dtype of sums; zeros by default.

    Token after token in memory, as fused kernels and Megatron have them: adding and rounding are one sweep.
    """
    batch, heads, num_tokens, size = like.shape
    memory = (num_tokens, batch, heads, size)
    return make(memory, dtype=accumulation_dtype(like.dtype), device=like.device).permute(1, 2, 0, 3)


class TokenSum:
    """The sum of partial gradients of tokens, in fp32 (fp64 for fp64).

    A single part of all tokens and heads is kept as it is: nothing is to be added to it.

    like: [B, H, S, D], what it is the gradient of.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._single: Tensor | None = None
        self._total: Tensor | None = None
        self._views = Views()

    def add(self, partial: Tensor, place: Place, heads: slice = ALL) -> None:
        """Add the gradient of some tokens and heads, [b, h, s, D] in any dtype, as `place` takes them."""
        if self._is_empty and isinstance(place.tokens, slice) and partial.shape == self._like.shape:
            self._single = partial
            return
        self._accumulator()
        there = self._views.take(place, heads)
        add_(there[0], partial)
        self._views.put(place, heads, there)

    @property
    def _is_empty(self) -> bool:
        return self._total is None and self._single is None

    def result(self) -> Tensor:
        """The sum, rounded to the dtype of `like`; zeros where nothing was added."""
        if self._single is not None:
            return self._single.to(self._like.dtype)
        return self._accumulator().to(self._like.dtype)

    def at(self, tokens: slice) -> Tensor:
        """The sum of some tokens, as it is kept."""
        return part(self._accumulator() if self._single is None else self._single, 2, tokens)

    def _accumulator(self) -> Tensor:
        if self._total is None:
            if self._single is None:
                self._total = _token_major(self._like)
            else:
                self._total = _token_major(self._like, torch.empty).copy_(self._single)
                self._single = None
            self._views = Views(self._total)
        return self._total


class MergedOutput:
    """The attention of some queries over the keys seen so far, in fp32 (fp64 for fp64 inputs).

    The parts may come in any order. A single one of all queries is kept as it is. Note [Merge] in kernels/merge.py.

    like: [B, N, S, V], of the shape and dtype of the output.
    """

    def __init__(self, like: Tensor, kernels: Sequence[MergeKernel] = MERGE_KERNELS) -> None:
        self._like, self._kernels = like, kernels
        self._single: TileOutput | None = None
        self._total: TileOutput | None = None
        self._views = Views()

    @classmethod
    def of(cls, q: Tensor, value_head_size: int, kernels: Sequence[MergeKernel] = MERGE_KERNELS) -> "MergedOutput":
        """For queries q [B, N, S, D] and values of head size V."""
        return cls(q.new_empty(()).expand(*q.shape[:3], value_head_size), kernels)

    def merge(self, more: TileOutput, place: Place, heads: slice = ALL) -> None:
        """Add the attention of some queries and heads over some more keys, as `place` takes them."""
        if self._is_empty and isinstance(place.tokens, slice) and more.out.shape == self._like.shape:
            self._single = more
            return
        self._accumulator()
        out, lse = self._views.take(place, heads)
        self.kernel.merge_(out, lse, more)
        self._views.put(place, heads, (out, lse))

    @property
    def _is_empty(self) -> bool:
        return self._total is None and self._single is None

    @functools.cached_property
    def kernel(self) -> MergeKernel:
        """The one that merges."""
        return choose_merge_kernel(self._like.device.type, self._like.dtype, self._kernels)

    def result(self, dtype: torch.dtype | None = None) -> TileOutput:
        """Output rounded once, to the dtype of `like` by default, 0 in rows that see no key, and log-sum-exp."""
        out, lse, _ = self._accumulator() if self._single is None else self._single
        return TileOutput(out.to(dtype or self._like.dtype), lse)

    def _accumulator(self) -> TileOutput:
        if self._total is None:
            dtype = accumulation_dtype(self._like.dtype)
            if self._single is None:
                out = _token_major(self._like)
                self._total = TileOutput(out, out.new_full(out.shape[:3], -torch.inf))
            else:
                single, self._single = self._single, None
                self._total = TileOutput(single.out.to(dtype, copy=True), single.lse.to(dtype, copy=True))
            self._views = Views(self._total.out, self._total.lse)
        return self._total
