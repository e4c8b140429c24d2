"""Objects as numbers in tensors: what operators of PyTorch are given of attentions and plans.

Note [Handles]
    A graph of torch.compile has no objects in it. What they say would be constants there, and another plan another
    graph. So an operator is given a number that stands for the object, and the number in a tensor: its value is data,
    which no guard looks at, where an int would be compiled for. The table from numbers to objects keeps none of them
    alive. Numbers are drawn at random, so that one from another process is none of this one's.
"""

import secrets
import weakref
from typing import TypeVar

import torch
from torch import Tensor

Owner = TypeVar("Owner")

_OWNERS: "weakref.WeakValueDictionary[int, object]" = weakref.WeakValueDictionary()


def numbered() -> tuple[int, Tensor]:
    """A new number, and the [] int64 tensor on the CPU that holds it."""
    number = secrets.randbits(63)
    return number, torch.tensor(number, device="cpu")


def with_handle(owner: Owner) -> Owner:
    """The same object; its attribute `handle` stands for it from now on, see Note [Handles].

    PackedBatch does so with its plan; do it yourself with an AttentionPlan that you make, before it goes to a compiled
    function.

    Raises ValueError within a compiled function.
    """
    if torch.compiler.is_compiling():
        raise ValueError(
            f"a {type(owner).__name__} was made within a compiled function, where numbers are drawn once, for all of "
            f"its calls; make it outside, and give it as an argument."
        )
    number, handle = numbered()
    _OWNERS[number] = owner
    object.__setattr__(owner, "handle", handle)  # Of frozen dataclasses too.
    return owner


def owner_of(handle: Tensor) -> object:
    """The object that a handle stands for. Raises RuntimeError where that is gone, or another process's."""
    try:
        return _OWNERS[int(handle)]
    except KeyError:
        raise RuntimeError(
            "a compiled function was given the handle of an attention or a plan that is not in this process; keep the "
            "object until the call is done, and give one that was copied or unpickled a new handle, with_handle(plan)."
        ) from None
