"""Attention as operators of PyTorch: what a graph of torch.compile holds, and a checkpoint's policy names.

Note [Operators]
    A call is one operator, and its backward pass another, whatever the algorithm. Each runs what an eager call runs, so
    there is nothing to agree on between the two. The forward one keeps the autograd graph of that call, and gives a
    token, a [] int64 tensor, for it; the backward one finds the graph by the token (recorded.py). The graph lives as
    long as the storage of the token, whoever holds that: autograd, a policy's cache, or nobody once the compiled
    function returns.

    What a call saves of the operator's inputs and outputs is saved as the operator's own. Under Ulysses it saves none
    of them but the weights that make keys and values: three nodes of autograd, the middle one of exchanged tensors.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T keys, D key head size, V value head size, W numbers
in a token's payload.
"""

import inspect
from collections.abc import Iterator
from typing import Any, List, NamedTuple, Protocol, Sequence, cast  # noqa: UP035  (torch 2.6 reads these in signatures)

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from mindspeed_cp.attention.derivatives import ONCE
from mindspeed_cp.attention.interface import OUTPUT, WITH_LARGEST, WITH_LSE, Source, Told, Wanted
from mindspeed_cp.attention.latent import Latent
from mindspeed_cp.attention.recomputation import Recomputation
from mindspeed_cp.attention.recorded import RecordedCall, RecordedCalls, storage
from mindspeed_cp.attention.terms import AttentionTerms
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.handles import owner_of, with_handle
from mindspeed_cp.kernels import Dropout
from mindspeed_cp.plan import AttentionPlan


class Runnable(Protocol):
    """The attention that an operator runs."""

    @property
    def handle(self) -> Tensor:
        """What stands for it, see Note [Handles]."""
        ...

    @property
    def exchanges_heads(self) -> bool:
        """See Attention."""
        ...

    @property
    def recomputation(self) -> Recomputation | None:
        """Of the checkpoints that it runs in."""
        ...

    def run(self, wanted: Wanted, q: Tensor, source: Source, told: Told) -> tuple[Tensor, ...]:
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


def attend(attention: Runnable, wanted: Wanted, q: Tensor, source: Source, told: Told) -> tuple[Tensor, ...]:
    """What `attention.run` gives, as an operator. q, and keys and values: of one dtype.

    Raises ValueError within a compiled function for a plan, or an `expand` of a latent, without a handle; and for
    dropout that a kernel draws as it likes.
    """
    plan, source = _with_handles(told.plan, source)
    terms = AttentionTerms() if told.terms is None else told.terms
    if terms.dropout is not None and terms.dropout.by_kernel:
        raise ValueError(
            "Dropout(by_kernel=True) draws from the device's generator, whose state neither a graph nor a selective "
            "checkpoint replays; leave out by_kernel there."
        )
    # Plan and source are held here until the operator has run: their handles stand for them no longer than that.
    given = _given(attention, wanted, q, source, Told(told.scale, told.visible, plan, terms))
    out, lse, largest, _ = torch.ops.mindspeed_cp.attention(*given)
    if wanted == OUTPUT:
        return (out,)
    return (out, lse) if wanted == WITH_LSE else (out, largest.detach())


def _with_handles(plan: AttentionPlan | None, source: Source) -> tuple[AttentionPlan | None, Source]:
    """The same, as far as they can be told by handles. Raises ValueError for a plan without one in a graph."""
    if not torch.compiler.is_compiling():
        # No graph outlives the call: what stands for its objects may be drawn here.
        plan = with_handle(plan) if plan is not None and plan.handle is None else plan
        source = source.with_handle() if isinstance(source, Latent) else source
    if plan is not None and plan.handle is None:
        raise ValueError(
            "a compiled function was given an AttentionPlan without a handle; give plan=batch.plan of a PackedBatch, "
            "or mindspeed_cp.handles.with_handle(plan), which is to be done outside of it."
        )
    return plan, source


def _given(attention: Runnable, wanted: Wanted, q: Tensor, source: Source, told: Told) -> "_Given":
    """The call as the operator is given it. told: with terms, and a plan, if any, that has a handle."""
    scale, visible, plan, terms = told
    assert terms is not None, "where a call has none they are empty here"
    sinks = terms.sinks if isinstance(terms.sinks, Tensor) else None
    expand = source.named() if isinstance(source, Latent) else None
    keys = [source.payload, *source.weights] if isinstance(source, Latent) else list(source)
    of_gradients = q, *keys, sinks, terms.alibi_slopes, terms.bias
    return _Given(
        attention=attention.handle,
        plan=None if plan is None else cast("Tensor", plan.handle),
        expand=None if expand is None else expand.handle,
        method="" if expand is None else expand.method,
        q=q,
        keys=keys,
        sinks=sinks,
        alibi_slopes=terms.alibi_slopes,
        bias=terms.bias,
        visible=visible,
        scale_tensor=scale if isinstance(scale, Tensor) else None,
        scale=None if isinstance(scale, Tensor) else scale,
        sink=None if isinstance(terms.sinks, Tensor) else terms.sinks,
        softcap=terms.softcap,
        dropout_rate=None if terms.dropout is None else terms.dropout.rate,
        dropout_numbers=[0 if terms.dropout is None else getattr(terms.dropout, name) for name in _NUMBERS],
        wanted=wanted,
        gradients=[torch.is_grad_enabled() and x is not None and x.requires_grad for x in of_gradients],
        value_head_size=keys[1].size(-1) if expand is None else expand.value_head_size,
        exchanges_heads=attention.exchanges_heads,
    )


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


class _Given(NamedTuple):
    """What the operator is given.

    attention, plan, expand: handles; the last for a latent, with the name of a method where it is one of its owner's.
    keys: k and v, or a payload and the weights beside it. sink: of all heads, in place of sinks. dropout_numbers: see
    `_NUMBERS`. gradients: whether those of q, of each of the keys, of sinks, slopes and bias are wanted.
    value_head_size: V.
    """

    attention: Tensor
    plan: Tensor | None
    expand: Tensor | None
    method: str
    q: Tensor
    keys: Sequence[Tensor]
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    visible: Tensor | None
    scale_tensor: Tensor | None
    scale: float | None
    sink: float | None
    softcap: float | None
    dropout_rate: float | None
    dropout_numbers: Sequence[int]
    wanted: str
    gradients: Sequence[bool]
    value_head_size: int
    exchanges_heads: bool

    @property
    def of_gradients(self) -> list[Tensor | None]:
        """Those that may have a gradient."""
        return [self.q, *self.keys, self.sinks, self.alibi_slopes, self.bias]

    def saved(self, out: Tensor, lse: Tensor) -> list[Tensor]:
        """What the graph saves of inputs and outputs."""
        if self.exchanges_heads:
            return [] if self.expand is None else list(self.keys[1:])
        return [x for x in (*self.of_gradients, self.visible, out, lse) if x is not None]

    def source(self, keys: Sequence[Tensor]) -> Source:
        """What these tensors, which stand for the keys, are."""
        if self.expand is None:
            k, v = keys
            return k, v
        payload, *weights = keys
        owner: Any = owner_of(self.expand)
        return Latent(payload, getattr(owner, self.method) if self.method else owner, tuple(weights))

    def terms(self, sinks: Tensor | None, slopes: Tensor | None, bias: Tensor | None) -> AttentionTerms:
        """Those of the call, with these tensors."""
        return AttentionTerms(
            sinks=self.sink if sinks is None else sinks,
            softcap=self.softcap,
            alibi_slopes=slopes,
            bias=bias,
            dropout=None if self.dropout_rate is None else _dropout(self.dropout_rate, self.dropout_numbers),
        )


def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and largest scores, the latter two empty where they are not wanted, and the token."""
    given = _Given(*inputs)
    runnable, call = cast("Runnable", owner_of(given.attention)), RecordedCall()
    with call.recorded(wanted=any(given.gradients)):
        q_, *keys_, sinks_, slopes_, bias_ = call.begin(given.of_gradients, given.gradients)
        assert q_ is not None
        found = runnable.run(
            cast("Wanted", given.wanted),
            q_,
            given.source(cast("list[Tensor]", keys_)),
            Told(
                given.scale if given.scale_tensor is None else given.scale_tensor,
                given.visible,
                None if given.plan is None else cast("AttentionPlan", owner_of(given.plan)),
                given.terms(sinks_, slopes_, bias_),
            ),
        )
        call.end(found if given.wanted == WITH_LSE else found[:1])
    out, *more = (x.detach() for x in found)
    nothing = given.q.new_empty(0, dtype=accumulation_dtype(given.q.dtype))
    lse = more[0] if given.wanted == WITH_LSE else nothing
    largest = more[0] if given.wanted == WITH_LARGEST else nothing.clone()
    read = *given.of_gradients, given.visible
    # A compiler writes something else over results that it is done with, which what a checkpoint keeps must not be.
    kept = () if runnable.recomputation is None else runnable.recomputation.kept_now()
    taken = {storage(x) for x in (*read, *kept) if x is not None}
    results = (
        _laid_out(out, _strides(out.shape, _memory_of_output(given.exchanges_heads)), taken),
        _laid_out(lse, _strides(lse.shape, range(lse.dim())), taken),
        _laid_out(largest, largest.stride(), taken),
    )
    call.saved.leave_to_graph(given.saved(out, lse), (*read, *results))
    return *results, _RECORDED.token(call)


# What the operator takes is read off the signature, which is the table above.
forward.__signature__ = inspect.signature(_Given).replace(  # type: ignore[attr-defined]
    return_annotation=tuple[Tensor, Tensor, Tensor, Tensor]
)
attention = torch.library.custom_op("mindspeed_cp::attention", forward, mutates_args=())


@attention.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Tensors that do not fit are refused when the operator runs, on all ranks: here one would leave the others waiting.
    given = _Given(*inputs)
    q, wanted, dtype = given.q, given.wanted, accumulation_dtype(given.q.dtype)
    sizes = (*q.shape[:3], given.value_head_size)
    out = q.new_empty(q.shape)
    if q.dim() == 4:
        out = q.new_empty_strided(sizes, _strides(sizes, _memory_of_output(given.exchanges_heads)))
    lse = q.new_empty(q.shape[:3] if wanted == WITH_LSE else (0,), dtype=dtype)
    largest = q.new_empty(q.shape[1:2] if wanted == WITH_LARGEST else (0,), dtype=dtype)
    return out, lse, largest, torch.empty((), dtype=torch.int64, device="cpu")


def _keep_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    given = _Given(*inputs)
    out, lse, largest, token = output
    ctx.save_for_backward(token, *given.saved(out, lse))
    ctx.mark_non_differentiable(largest)
    ctx.wants_lse, ctx.gradients, ctx.num_keys = given.wanted == WITH_LSE, given.gradients, len(given.keys)
    # Gradients of tokens are added up token by token, and Ulysses brings heads and tokens back so.
    memory = [_TOKENS_FIRST, *([_TOKENS_FIRST] * 2 if given.expand is None else [_TOKENS_OF_PAYLOAD])]
    memory += [()] * (len(given.of_gradients) - len(memory))
    wanted = [
        (x, order if len(order) == x.dim() else range(x.dim()))
        for x, order, is_wanted in zip(given.of_gradients, memory, given.gradients, strict=True)
        if x is not None and is_wanted
    ]
    ctx.dims = [x.dim() for x, _ in wanted]
    ctx.sizes = [size for x, _ in wanted for size in x.shape]
    ctx.strides = [stride for x, order in wanted for stride in _strides(x.shape, order)]
    ctx.dtypes = " ".join(str(x.dtype).removeprefix("torch.") for x, _ in wanted)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    ONCE.refuse_second()
    token, *of_graph = ctx.saved_tensors
    dlse_ = dlse if ctx.wants_lse else None
    asked = ctx.dims, ctx.sizes, ctx.strides, ctx.dtypes
    found = iter(torch.ops.mindspeed_cp.attention_backward(token, dout, dlse_, of_graph, *asked))
    q, *rest = [next(found) if is_wanted else None for is_wanted in ctx.gradients]
    sinks, slopes, bias = rest[ctx.num_keys :]
    gradients = {"q": q, "keys": rest[: ctx.num_keys], "sinks": sinks, "alibi_slopes": slopes, "bias": bias}
    return tuple(gradients.get(name) for name in _Given._fields)


attention.register_autograd(_differentiate, setup_context=_keep_for_gradients)


def backward(
    token: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    of_graph: Sequence[Tensor],
    dims: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
    dtypes: str,
) -> List[Tensor]:  # noqa: UP006  (see the import)
    """Gradients of those inputs for which they are wanted, in order.

    token: of the forward pass. of_graph: what it has left to the graph to save. The rest says how each gradient lies:
    dims of each, sizes and strides of all one after another, dtypes by name.
    """
    # As autograd does with a graph that it holds: what is saved goes as soon as it is used, if it may.
    keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    found = _RECORDED.call(token).gradients([dout] if dlse is None else [dout, dlse], of_graph, keep_graph=keep_graph)
    taken = {storage(x) for x in (dout, *of_graph)}
    return [
        empty.zero_() if gradient is None else _laid_out(gradient, empty.stride(), taken)
        for gradient, empty in zip(found, _empty(dout, dims, sizes, strides, dtypes), strict=True)
    ]


attention_backward = torch.library.custom_op("mindspeed_cp::attention_backward", backward, mutates_args=())


@attention_backward.register_fake
def _(
    token: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    of_graph: Sequence[Tensor],
    dims: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
    dtypes: str,
) -> list[Tensor]:
    return list(_empty(dout, dims, sizes, strides, dtypes))


attention_backward.register_autograd(lambda ctx, *grads: ONCE.refuse_second())

_RECORDED = RecordedCalls()


def num_kept() -> int:
    """How many forward passes are kept for a backward one now: for tests, which see by it that none is left."""
    return len(_RECORDED)


_TOKENS_FIRST = 2, 0, 1, 3
"""In memory [S, B, H, D]."""
_TOKENS_OF_PAYLOAD = 1, 0, 2
"""In memory [S, B, W]."""
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


def _empty(
    like: Tensor, dims: Sequence[int], sizes: Sequence[int], strides: Sequence[int], dtypes: str
) -> Iterator[Tensor]:
    """One tensor after another, see `backward`."""
    begin = 0
    for dim, dtype in zip(dims, dtypes.split(), strict=True):
        here = slice(begin, begin + dim)
        yield like.new_empty_strided(list(sizes[here]), list(strides[here]), dtype=getattr(torch, dtype))
        begin += dim


def _laid_out(x: Tensor, strides: Sequence[int], taken: set[int]) -> Tensor:
    """x with these strides, and in no memory that is taken; copied where it is not so already."""
    lies = all(size == 1 or one == other for size, one, other in zip(x.shape, x.stride(), strides, strict=True))
    if storage(x) in taken or not lies:
        x = x.new_empty_strided(x.shape, list(strides)).copy_(x)
    taken.add(storage(x))
    return x.as_strided(x.shape, list(strides))
