"""Branches that a program asks for one after another: none is waited for before all of them have been asked for.

    noise = model(latents, prompt)                      rank 0 computes it, rank 1 gets a promise
    negative = model(latents, negative_prompt)          rank 1 computes it, rank 0 gets a promise
    noise = negative + scale * (noise - negative)       the first use of either: both are exchanged, in one message

So a loop that was written for one rank shares its branches without a change.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mindspeed_cp.diffusion.guidance import GuidanceParallel


class PendingBranches:
    """Branches that have been asked for, and are shared when the first of them is used."""

    def __init__(self, guidance: GuidanceParallel) -> None:
        self._guidance = guidance
        self._open: _Step | None = None

    def ask(self, predict: Callable[[], Tensor], like: Tensor) -> Tensor:
        """A promise of the next branch of this step, which one rank computes now.

        predict: computes it. like: see GuidanceParallel.share. Using the result raises ValueError where no other branch
        has been asked for by then.
        """
        if self._open is None or self._open.outputs is not None:
            self._open = _Step(self._guidance, like)
        return PendingTensor.promised(self._open, self._open.add(predict))


class _Step:
    """The branches of a step. outputs: all of them, from their first use on."""

    def __init__(self, guidance: GuidanceParallel, like: Tensor) -> None:
        self._guidance, self._like = guidance, like
        self._count = 0
        self._mine: dict[int, Tensor] = {}
        self.outputs: list[Tensor] | None = None

    def add(self, predict: Callable[[], Tensor]) -> int:
        """The number of one more branch, computed where it is this rank's."""
        number, self._count = self._count, self._count + 1
        if self._guidance.computes(number):
            self._mine[number] = predict()
        return number

    def output(self, number: int) -> Tensor:
        """Of one branch, shared with that of all the others."""
        if self.outputs is None:
            self.outputs = self._guidance.share(self._mine, self._count, self._like)
        return self.outputs[number]


class PendingTensor(Tensor):
    """A branch's output, which is fetched when anything is done with it."""

    _step: _Step
    _number: int

    @classmethod
    def promised(cls, step: _Step, number: int) -> "PendingTensor":
        """The output of the branch of that number."""
        promise = torch.Tensor._make_subclass(cls, torch.empty(0))
        promise._step, promise._number = step, number
        return promise

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_fetched, (args, kwargs or {}))
        return func(*args, **kwargs)


def _fetched(x: Any) -> Any:
    return x._step.output(x._number) if isinstance(x, PendingTensor) else x
