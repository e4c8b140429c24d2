"""Attention as operators of PyTorch: what a graph of torch.compile holds, and a checkpoint's policy names.

Note [Operators]
    A call is one operator, and its backward pass another, whatever the algorithm. Each runs what an eager call runs, so
    there is nothing to agree on between the two. The forward one keeps the autograd graph of that run, and gives a
    token, a [] int64 tensor, for it; the backward one finds the graph by the token. The graph lives as long as the
    storage of the token, whoever holds that: autograd, a policy's cache, or nobody once the compiled function returns.

    How many tensors a run keeps, and of which sizes, depends on the plan: tokens of a Ulysses group, kept K/V, states
    of kernels. A plan is data to a graph (Note [Handles] in handles.py), so these can be no outputs of an operator. But
    its inputs and outputs are the compiler's, which may write something else where they were, and may count on seeing
    all that is saved of them. So what a run has saved of them is saved as the operator's own, by place; what is a part
    of one is copied. Under Ulysses a run saves neither: three nodes of autograd, the middle one of exchanged tensors.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T keys, D key head size, V value head size.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from mindspeed_cp.attention.ring import refuse_second_derivatives
from mindspeed_cp.attention.terms import AttentionTerms
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.handles import numbered, owner_of
from mindspeed_cp.kernels import Dropout
from mindspeed_cp.plan import AttentionPlan

OUTPUT, WITH_LSE, WITH_LARGEST = "output", "output and log-sum-exp", "output and largest scores"
"""What can be asked back."""


class Runnable(Protocol):
    """The attention that an operator runs."""

    @property
    def handle(self) -> Tensor:
        """What stands for it, see Note [Handles]."""
        ...

    @property
    def exchanges_heads(self) -> bool:
        """Whether a run attends with exchanged tensors, and saves none of those that it is given."""
        ...

    def run(
        self,
        wanted: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | Tensor | None,
        visible: Tensor | None,
        plan: AttentionPlan | None,
        terms: AttentionTerms | None,
    ) -> tuple[Tensor, ...]:
        """The output, and what is wanted beside it; differentiable."""
        ...


def are_called(*, by_policies: bool) -> bool:
    """Whether a call now is to be seen as an operator: by a compiler, or by the policy of a selective checkpoint."""
    if torch.compiler.is_compiling():
        return True
    if not by_policies or not torch._C._len_torch_dispatch_stack():
        return False
    return any(isinstance(mode, _POLICIES) for mode in _get_current_dispatch_mode_stack())


_POLICIES = _CachingTorchDispatchMode, _CachedTorchDispatchMode


def attend(
    attention: Runnable,
    wanted: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor | None,
    visible: Tensor | None,
    plan: AttentionPlan | None,
    terms: AttentionTerms | None,
) -> tuple[Tensor, ...]:
    """What `attention.run` gives, as an operator. q, k, v: of one dtype.

    Raises ValueError for a plan without a handle, and for dropout that a kernel draws as it likes.
    """
    if plan is not None and plan.handle is None:
        raise ValueError(
            "a compiled function was given an AttentionPlan without a handle; give plan=batch.plan of a PackedBatch, "
            "or mindspeed_cp.handles.with_handle(plan), which is to be done outside of it."
        )
    terms = AttentionTerms() if terms is None else terms
    if terms.dropout is not None and terms.dropout.by_kernel:
        raise ValueError(
            "Dropout(by_kernel=True) draws from the device's generator, whose state a graph does not replay; leave out "
            "by_kernel in a compiled function."
        )
    sinks = terms.sinks if isinstance(terms.sinks, Tensor) else None
    of_gradients = q, k, v, sinks, terms.alibi_slopes, terms.bias
    out, lse, largest, _ = torch.ops.mindspeed_cp.attention(
        attention.handle,
        None if plan is None else plan.handle,
        *of_gradients,
        visible,
        scale if isinstance(scale, Tensor) else None,
        None if isinstance(scale, Tensor) else scale,
        None if sinks is not None else terms.sinks,
        terms.softcap,
        None if terms.dropout is None else terms.dropout.rate,
        [] if terms.dropout is None else [getattr(terms.dropout, name) for name in _NUMBERS],
        wanted,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in of_gradients],
        attention.exchanges_heads,
    )
    if wanted == OUTPUT:
        return (out,)
    return (out, lse) if wanted == WITH_LSE else (out, largest.detach())


_NUMBERS = "seed", "layer", "micro_batch", "data_parallel_rank", "first_head"
"""Of a dropout, in the order in which the operator is given them."""


def _dropout(rate: float, numbers: Sequence[int]) -> Dropout:
    seed, layer, micro_batch, data_parallel_rank, first_head = numbers
    return Dropout(
        rate=rate,
        seed=seed,
        layer=layer,
        micro_batch=micro_batch,
        data_parallel_rank=data_parallel_rank,
        first_head=first_head,
    )


@torch.library.custom_op("mindspeed_cp::attention", mutates_args=())
def attention(
    attention: Tensor,
    plan: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    visible: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float | None,
    sink: float | None,
    softcap: float | None,
    dropout_rate: float | None,
    dropout_numbers: Sequence[int],
    wanted: str,
    gradients: Sequence[bool],
    exchanges_heads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and largest scores, the latter two empty where they are not wanted, and the token.

    attention, plan: handles. sink: of all heads, in place of sinks. dropout_numbers: see `_NUMBERS`. gradients: whether
    those of q, k, v, sinks, slopes and bias are wanted.
    """
    runnable = cast("Runnable", owner_of(attention))
    inputs, run = [q, k, v, sinks, alibi_slopes, bias], _Run()
    with _autograd(any(gradients)), saved_tensors_hooks(run.saved.pack, run.saved.unpack):
        q_, k_, v_, sinks_, slopes_, bias_ = run.begin(inputs, gradients)
        assert q_ is not None and k_ is not None and v_ is not None
        found = runnable.run(
            wanted,
            *(q_, k_, v_),
            scale=scale if scale_tensor is None else scale_tensor,
            visible=visible,
            plan=None if plan is None else cast("AttentionPlan", owner_of(plan)),
            terms=AttentionTerms(
                sinks=sink if sinks_ is None else sinks_,
                softcap=softcap,
                alibi_slopes=slopes_,
                bias=bias_,
                dropout=None if dropout_rate is None else _dropout(dropout_rate, dropout_numbers),
            ),
        )
        run.end(found if wanted == WITH_LSE else found[:1])
    out, *more = (x.detach() for x in found)
    nothing = q.new_empty(0, dtype=accumulation_dtype(q.dtype))
    lse, largest = more[0] if wanted == WITH_LSE else nothing, more[0] if wanted == WITH_LARGEST else nothing.clone()
    given = {_storage(x) for x in (*inputs, visible) if x is not None}
    results = (
        _laid_out(out, _memory_of_output(exchanges_heads), given),
        _laid_out(lse, range(lse.dim()), given),
        largest,
    )
    run.saved.leave_to_graph(_of_graph(inputs, visible, out, lse, exchanges_heads), (*inputs, visible, *results))
    return *results, _RUNS.token(run)


@attention.register_fake
def _(
    attention: Tensor,
    plan: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    visible: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float | None,
    sink: float | None,
    softcap: float | None,
    dropout_rate: float | None,
    dropout_numbers: Sequence[int],
    wanted: str,
    gradients: Sequence[bool],
    exchanges_heads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Tensors that do not fit are refused when the operator runs, on all ranks: here one would leave the others waiting.
    out = q.new_empty(q.shape)
    if q.dim() == v.dim() == 4:
        out = _empty(q, (*q.shape[:3], v.size(3)), _memory_of_output(exchanges_heads))
    dtype = accumulation_dtype(q.dtype)
    lse = q.new_empty(q.shape[:3] if wanted == WITH_LSE else (0,), dtype=dtype)
    largest = q.new_empty(q.shape[1:2] if wanted == WITH_LARGEST else (0,), dtype=dtype)
    return out, lse, largest, torch.empty((), dtype=torch.int64, device="cpu")


def _keep_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    of_gradients, visible, exchanges_heads = list(inputs[2:8]), inputs[8], inputs[17]
    out, lse, largest, token = output
    ctx.save_for_backward(token, *_of_graph(of_gradients, visible, out, lse, exchanges_heads))
    ctx.mark_non_differentiable(largest)
    ctx.wants_lse, ctx.gradients = inputs[15] == WITH_LSE, inputs[16]
    wanted = [x for x, is_wanted in zip(of_gradients, ctx.gradients, strict=True) if is_wanted]
    ctx.sizes, ctx.dims = [size for x in wanted for size in x.shape], [x.dim() for x in wanted]
    ctx.dtypes = [None if x is None else x.dtype for x in of_gradients[3:]]


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives()
    token, *of_graph = ctx.saved_tensors
    dlse_ = dlse if ctx.wants_lse else None
    asked = ctx.gradients, ctx.sizes, ctx.dims, *ctx.dtypes
    found = iter(torch.ops.mindspeed_cp.attention_backward(token, dout, dlse_, of_graph, *asked))
    wanted = [next(found) if is_wanted else None for is_wanted in ctx.gradients]
    return None, None, *wanted, *[None] * 10


attention.register_autograd(_differentiate, setup_context=_keep_for_gradients)


@torch.library.custom_op("mindspeed_cp::attention_backward", mutates_args=())
def attention_backward(
    token: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    of_graph: Sequence[Tensor],
    gradients: Sequence[bool],
    sizes: Sequence[int],
    dims: Sequence[int],
    sinks_dtype: torch.dtype | None,
    slopes_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of those inputs for which they are wanted, in order.

    token: of the forward pass. of_graph: what it has left to the graph to save. gradients: as there. sizes, dims: of
    those inputs, one after another. The dtypes are those of the terms.
    """
    # As autograd does with a graph that it holds: what is saved goes as soon as it is used, if it may.
    keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    with _autograd(False):
        found = _RUNS.run(token).gradients([dout] if dlse is None else [dout, dlse], of_graph, keep_graph=keep_graph)
    used = {_storage(x) for x in (dout, *of_graph)}
    return [
        _empty(dout, x, memory, dtype).zero_() if gradient is None else _laid_out(gradient, memory, used)
        for gradient, (x, memory, dtype) in zip(
            found,
            _asked(gradients, sizes, dims, (*[dout.dtype] * 3, sinks_dtype, slopes_dtype, bias_dtype)),
            strict=True,
        )
    ]


@attention_backward.register_fake
def _(
    token: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    of_graph: Sequence[Tensor],
    gradients: Sequence[bool],
    sizes: Sequence[int],
    dims: Sequence[int],
    sinks_dtype: torch.dtype | None,
    slopes_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    return [
        _empty(dout, x, memory, dtype)
        for x, memory, dtype in _asked(
            gradients, sizes, dims, (*[dout.dtype] * 3, sinks_dtype, slopes_dtype, bias_dtype)
        )
    ]


attention_backward.register_autograd(lambda ctx, *grads: refuse_second_derivatives())


def _asked(
    gradients: Sequence[bool], sizes: Sequence[int], dims: Sequence[int], dtypes: Sequence[torch.dtype | None]
) -> Iterator[tuple[Sequence[int], Sequence[int], torch.dtype | None]]:
    """Sizes, order in memory and dtype of each gradient that is wanted."""
    begin = 0
    places = [place for place, is_wanted in enumerate(gradients) if is_wanted]
    for place, dim in zip(places, dims, strict=True):
        memory = _TOKENS_FIRST if place < 3 and dim == 4 else range(dim)
        yield sizes[begin : begin + dim], memory, dtypes[place]
        begin += dim


class _Run:
    """What one run of the forward operator has kept for the backward one: the graph of autograd.

    saved: by the graph's nodes; it knows nothing of the graph, so that this is no circle.
    """

    def __init__(self) -> None:
        self.saved = _Saved()
        self._inputs: list[GradientEdge] = []
        self._outputs: list[GradientEdge] = []

    def begin(self, inputs: Sequence[Tensor | None], gradients: Sequence[bool]) -> list[Tensor | None]:
        """The inputs, with the graph's beginning where gradients are wanted."""
        wanted = [x for x, is_wanted in zip(inputs, gradients, strict=True) if x is not None and is_wanted]
        if not wanted:
            return list(inputs)
        begun = _Beginning.apply(torch.zeros((), requires_grad=True), *wanted)
        self._inputs, rest = [get_gradient_edge(x) for x in begun], iter(begun)
        return [next(rest) if is_wanted else x for x, is_wanted in zip(inputs, gradients, strict=True)]

    def end(self, outputs: Sequence[Tensor]) -> None:
        """The graph ends with these."""
        self._outputs = [get_gradient_edge(x) for x in outputs if x.requires_grad]

    def gradients(
        self, of_outputs: Sequence[Tensor], of_graph: Sequence[Tensor], *, keep_graph: bool
    ) -> Sequence[Tensor | None]:
        """Those of the inputs for which they are wanted. of_graph: see `_Saved`. keep_graph: for another such pass."""
        with self.saved.given(of_graph):
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
    """Something saved: a tensor, or its number among those that the graph has saved."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.number = -1


class _Saved:
    """What a run has saved: by itself, or left to the graph."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._of_graph: Sequence[Tensor] = ()

    def pack(self, x: Tensor) -> _Place:
        """What autograd holds in place of x."""
        self._places.append(_Place(x.detach()))
        return self._places[-1]

    def unpack(self, place: _Place) -> Tensor:
        """What it stands for."""
        return self._of_graph[place.number] if place.tensor is None else place.tensor

    def leave_to_graph(self, of_graph: Sequence[Tensor], foreign: Sequence[Tensor | None]) -> None:
        """Hold none of `of_graph` from now on, which the graph saves, and no memory of `foreign` tensors."""
        numbers = {_geometry(x): number for number, x in enumerate(of_graph)}
        storages = {_storage(x) for x in foreign if x is not None}
        for place in self._places:
            assert place.tensor is not None
            if (number := numbers.get(_geometry(place.tensor))) is not None:
                place.tensor, place.number = None, number
            elif _storage(place.tensor) in storages:
                place.tensor = place.tensor.clone()
        self._places.clear()

    @contextmanager
    def given(self, of_graph: Sequence[Tensor]) -> Iterator[None]:
        """What has been left to the graph is at hand."""
        self._of_graph = of_graph
        try:
            yield
        finally:
            self._of_graph = ()


class _Runs:
    """Runs by the numbers in tokens; each as long as the storage of its token."""

    def __init__(self) -> None:
        self._runs: dict[int, _Run] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def token(self, run: _Run) -> Tensor:
        """One that stands for a run."""
        number, token = numbered()
        self._runs[number] = run
        # Not by the tensor: autograd and policies hold others, which share its memory.
        weakref.finalize(token.untyped_storage(), self._runs.pop, number).atexit = False
        return token

    def run(self, token: Tensor) -> _Run:
        """The one that a token stands for. Raises RuntimeError where that is gone."""
        try:
            return self._runs[int(token)]
        except KeyError:
            raise RuntimeError(
                "what attention has kept for its backward pass went with the token that stands for it, of which this "
                "is a copy; let hooks of saved tensors leave those of int64 where they are."
            ) from None


_RUNS = _Runs()


def num_kept() -> int:
    """How many forward passes are kept for a backward one now."""
    return len(_RUNS)


def _of_graph(
    inputs: Sequence[Tensor | None], visible: Tensor | None, out: Tensor, lse: Tensor, exchanges_heads: bool
) -> list[Tensor]:
    """What the graph saves of an operator's inputs and outputs."""
    return [] if exchanges_heads else [x for x in (*inputs, visible, out, lse) if x is not None]


@contextmanager
def _autograd(wanted: bool) -> Iterator[None]:
    """Within an operator, where autograd is left out: let it take part, and record a graph if one is wanted."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    taking_part = torch._C._ForceDispatchKeyGuard(included | _VIEWS, excluded - _AUTOGRAD - _VIEWS)
    with taking_part, torch.set_grad_enabled(wanted):
        yield


_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)

_TOKENS_FIRST = 2, 0, 1, 3
"""In memory [S, B, H, D]: gradients are added up so, and Ulysses brings heads and tokens back so."""
_SAMPLES_FIRST = 0, 2, 1, 3
"""In memory [B, S, H, D], as fused kernels have their output."""


def _memory_of_output(exchanges_heads: bool) -> Sequence[int]:
    return _TOKENS_FIRST if exchanges_heads else _SAMPLES_FIRST


def _strides(sizes: Sequence[int], memory: Sequence[int]) -> list[int]:
    """Of a tensor whose dims are in memory in this order."""
    strides, step = [0] * len(sizes), 1
    for dim in reversed(memory):
        strides[dim] = step
        step *= sizes[dim]
    return strides


def _empty(like: Tensor, sizes: Sequence[int], memory: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty_strided(list(sizes), _strides(sizes, memory), dtype=dtype or like.dtype)


def _laid_out(x: Tensor, memory: Sequence[int], taken: set[int]) -> Tensor:
    """x with its dims in memory in this order, and in none that is taken; copied where it is not so already."""
    if _storage(x) in taken or not _lies(x, memory):
        x = _empty(x, x.shape, memory).copy_(x)
    taken.add(_storage(x))
    return x.as_strided(x.shape, _strides(x.shape, memory))


def _lies(x: Tensor, memory: Sequence[int]) -> bool:
    strides = _strides(x.shape, memory)
    return all(size == 1 or one == other for size, one, other in zip(x.shape, x.stride(), strides, strict=True))


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _geometry(x: Tensor) -> tuple[object, ...]:
    return _storage(x), x.storage_offset(), tuple(x.shape), x.stride(), x.dtype
