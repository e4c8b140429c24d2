"""Gradients of attention have none of their own: who asks for second derivatives is told so."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def never_twice(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of an autograd function that refuses to be part of a graph.

    torch's once_differentiable alone drops a second derivative where the gradient that comes does not require one.
    """
    once = once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_second_derivatives()
        return once(ctx, *grads)

    return run


def refuse_second_derivatives() -> None:
    """Raise RuntimeError in a backward pass that is to be part of a graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "attention's gradient has none of its own; leave out create_graph=True, or take second derivatives of "
            "torch.nn.functional.scaled_dot_product_attention with its math backend."
        )
