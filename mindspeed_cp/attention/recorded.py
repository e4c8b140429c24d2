"""What a call of the forward operator keeps for the backward one: a graph of autograd, found by a token.

How many tensors a call keeps, and of which sizes, depends on the plan: tokens of a Ulysses group, kept K/V, states of
kernels. A plan is data to a graph of torch.compile (Note [Handles] in handles.py), so these can be no outputs of an
operator: they stay with the call. But its inputs and outputs are the compiler's, which may write something else where
they were, and may count on seeing all that is saved of them. So what a call has saved of them it leaves to the
compiler's graph, and remembers where it lies there.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from mindspeed_cp.handles import numbered

Find = Callable[[Sequence[Tensor]], Tensor]
"""What was saved, from all that the compiler's graph has saved."""


class RecordedCall:
    """The graph of one call. saved: by its nodes; it knows nothing of the graph, so that this is no circle."""

    def __init__(self) -> None:
        self.saved = Saved()
        self._inputs: list[GradientEdge] = []
        self._outputs: list[GradientEdge] = []

    @contextmanager
    def recorded(self, *, wanted: bool) -> Iterator[None]:
        """Within it, in an operator, where autograd is left out, it takes part; and records, if that is wanted."""
        with autograd(wanted=wanted), saved_tensors_hooks(self.saved.pack, self.saved.unpack):
            yield

    def begin(self, inputs: Sequence[Tensor | None], gradients: Sequence[bool]) -> list[Tensor | None]:
        """The inputs, with the graph's beginning where gradients are wanted."""
        # Detached: under a checkpoint's policy x is in a graph whose hooks hold the token, and the token this graph.
        wanted = [x.detach() for x, is_wanted in zip(inputs, gradients, strict=True) if x is not None and is_wanted]
        if not wanted:
            return list(inputs)
        begun = _Beginning.apply(torch.zeros((), requires_grad=True), *wanted)
        self._inputs, rest = [get_gradient_edge(x) for x in begun], iter(begun)
        return [next(rest) if is_wanted else x for x, is_wanted in zip(inputs, gradients, strict=True)]

    def end(self, outputs: Sequence[Tensor]) -> None:
        """The graph ends with these."""
        # Of views: their nodes are torch's own. One of a Function in Python is not kept by its edge up to torch 2.6.
        self._outputs = [get_gradient_edge(x.view_as(x)) for x in outputs if x.requires_grad]

    def gradients(
        self, of_outputs: Sequence[Tensor], of_graph: Sequence[Tensor], *, keep_graph: bool
    ) -> Sequence[Tensor | None]:
        """Those of the inputs for which they are wanted. of_graph: see `Saved`. keep_graph: for another such pass."""
        with autograd(wanted=False), self.saved.given(of_graph):
            return torch.autograd.grad(
                self._outputs, self._inputs, of_outputs, retain_graph=keep_graph, allow_unused=True
            )


class _Beginning(torch.autograd.Function):
    """Tensors as they are, as the first of a graph: which then holds none of them, as their own leaves would."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise AssertionError("gradients are taken before they come here")


class _Place:
    """Something saved: a tensor, or how it is found in what the compiler's graph has saved."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.find: Find | None = None


class Saved:
    """What a call has saved: by itself, or left to the compiler's graph."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._of_graph: Sequence[Tensor] = ()

    def pack(self, x: Tensor) -> _Place:
        """What autograd holds in place of x."""
        self._places.append(_Place(x.detach()))
        return self._places[-1]

    def unpack(self, place: _Place) -> Tensor:
        """What it stands for."""
        if place.tensor is not None:
            return place.tensor
        assert place.find is not None, "it was left to the graph"
        return place.find(self._of_graph)

    def leave_to_graph(self, of_graph: Sequence[Tensor], foreign: Sequence[Tensor | None]) -> None:
        """Hold none of `of_graph` from now on, nor a part of it, and no memory of `foreign` tensors."""
        storages = {storage(x) for x in foreign if x is not None}
        for place in self._places:
            assert place.tensor is not None
            place.find = next((find for n, x in enumerate(of_graph) if (find := _found(place.tensor, n, x))), None)
            if place.find is not None:
                place.tensor = None
            elif storage(place.tensor) in storages:
                place.tensor = place.tensor.clone()
        self._places.clear()

    @contextmanager
    def given(self, of_graph: Sequence[Tensor]) -> Iterator[None]:
        """What has been left to the compiler's graph is at hand."""
        self._of_graph = of_graph
        try:
            yield
        finally:
            self._of_graph = ()


def _found(x: Tensor, number: int, whole: Tensor) -> Find | None:
    """How x is found in another tensor, of this number, wherever that lies by then; None where it is no part of it."""
    size, strides, offset = x.shape, x.stride(), x.storage_offset() - whole.storage_offset()
    if storage(x) != storage(whole) or x.dtype != whole.dtype or not x.numel():
        return None
    if not offset and _dims(x) == _dims(whole):
        return lambda of_graph: of_graph[number].reshape(size)
    end = offset + sum((count - 1) * stride for count, stride in zip(size, strides, strict=True))
    if whole.is_contiguous() and offset >= 0 and end < whole.numel():
        return lambda of_graph: of_graph[number].reshape(-1)[offset:].as_strided(size, strides)
    return None


def _dims(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides, but for dims of one."""
    return [each for each in zip(x.shape, x.stride(), strict=True) if each[0] != 1]


class RecordedCalls:
    """RecordedCalls by the numbers in tokens; each as long as the storage of its token."""

    def __init__(self) -> None:
        self._calls: dict[int, RecordedCall] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def token(self, call: RecordedCall) -> Tensor:
        """One that stands for a call: [] int64 on the CPU."""
        number, token = numbered()
        self._calls[number] = call
        # Not by the tensor: autograd and policies hold others, which share its memory.
        weakref.finalize(token.untyped_storage(), self._calls.pop, number).atexit = False
        return token

    def call(self, token: Tensor) -> RecordedCall:
        """The one that a token stands for. Raises RuntimeError where that is gone."""
        try:
            return self._calls[int(token)]
        except KeyError:
            raise RuntimeError(
                "what attention has kept for its backward pass went with the token that stands for it, of which this "
                "is a copy; let hooks of saved tensors leave those of int64 where they are."
            ) from None


def storage(x: Tensor) -> int:
    """Which memory it lies in."""
    return x.untyped_storage().data_ptr()


@contextmanager
def autograd(*, wanted: bool) -> Iterator[None]:
    """Within an operator, where autograd is left out: let it take part, and record a graph if one is wanted."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    taking_part = torch._C._ForceDispatchKeyGuard(included | _VIEWS, excluded - _AUTOGRAD - _VIEWS)
    with taking_part, torch.set_grad_enabled(wanted):
        yield


_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
