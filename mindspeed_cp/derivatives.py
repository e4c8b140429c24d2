"""Gradients that have none of their own: who asks for second derivatives is told so."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Once(NamedTuple):
    """Something whose gradient depends on its inputs, and can be taken once. instead: what to take twice."""

    what: str
    instead: str

    def refuse_second(self) -> None:
        """Raise RuntimeError in a backward pass that is to be part of a graph."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"the gradient of {self.what} has none of its own; leave out create_graph=True, or take second "
                f"derivatives of {self.instead}."
            )

    def only(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """The backward of an autograd function that refuses to be part of a graph.

        torch's once_differentiable alone drops a second derivative where the gradient that comes does not require one.
        It is enough for functions that are linear, whose second derivative is 0 then.
        """
        once = once_differentiable(backward)

        def run(ctx: Any, *grads: Tensor | None) -> Any:
            self.refuse_second()
            return once(ctx, *grads)

        return run
