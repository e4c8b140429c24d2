"""Results that a program asks for one after another: none is waited for before it is used.

    noise = model(latents, prompt)                      rank 0 computes it, rank 1 gets a promise
    negative = model(latents, negative_prompt)          rank 1 computes it, rank 0 gets a promise
    noise = negative + scale * (noise - negative)       the first use of either: both are exchanged, in one message

So a loop that was written for one rank is shared among several without a change: the branches of guidance here, the
tiles of a decoder in tiles.py.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mindspeed_cp.diffusion.guidance import GuidanceParallel


class PendingTensor(Tensor):
    """A tensor that is fetched when anything is done with it but to concatenate it with others, which waits too."""

    _fetch: Callable[[], Tensor]

    @classmethod
    def promised(cls, fetch: Callable[[], Tensor]) -> "PendingTensor":
        """The tensor that `fetch` gives, which is called once at most."""
        promise = torch.Tensor._make_subclass(cls, torch.empty(0))
        promise._fetch = functools.cache(fetch)
        return promise

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def compute() -> Any:
            fetched, named = tree_map(_fetched, (args, kwargs or {}))
            return func(*fetched, **named)

        return cls.promised(compute) if func in (torch.cat, torch.concat, torch.concatenate) else compute()


def _fetched(x: Any) -> Any:
    return x._fetch() if isinstance(x, PendingTensor) else x


class PendingBranches:
    """Branches that have been asked for, and are shared when the first of them is used."""

    def __init__(self, guidance: GuidanceParallel) -> None:
        self._guidance = guidance
        self._open: _Step | None = None
        self._promise: Callable[[], Tensor | None] = lambda: None

    def ask(self, predict: Callable[[], Tensor], like: Tensor) -> Tensor:
        """A promise of the next branch of this step, which one rank computes now.

        predict: computes it. like: see GuidanceParallel.share. Using the result raises ValueError where no other branch
        has been asked for by then.
        """
        # A promise that nobody has any more is of a step that was given up, say by an interrupt.
        if self._open is None or self._open.closed or self._promise() is None:
            self._open = _Step(self._guidance, like)
        promise = PendingTensor.promised(functools.partial(self._open.output, self._open.add(predict)))
        self._promise = weakref.ref(promise)
        return promise


class _Step:
    """The branches of a step. closed: whether one has been used, and no more can be added."""

    def __init__(self, guidance: GuidanceParallel, like: Tensor) -> None:
        self._guidance, self._like = guidance, like
        self._count = 0
        self._mine: dict[int, Tensor] = {}
        self._outputs: list[Tensor] = []
        self.closed = False

    def add(self, predict: Callable[[], Tensor]) -> int:
        """The number of one more branch, computed where it is this rank's."""
        number, self._count = self._count, self._count + 1
        if self._guidance.computes(number):
            self._mine[number] = predict()
        return number

    def output(self, number: int) -> Tensor:
        """Of one branch, shared with that of all the others."""
        if not self.closed:
            self.closed = True
            self._outputs = self._guidance.share(self._mine, self._count, self._like)
        return self._outputs[number]
