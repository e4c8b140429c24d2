"""A call of attention: put in order, checked, and compared with those of the other ranks, before anything is sent.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T keys, D key head size, V value head size.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, Protocol, TypedDict

import torch
from torch import Tensor

from mindspeed_cp.attention.latent import Latent
from mindspeed_cp.attention.operators import OUTPUT, WITH_LARGEST, WITH_LSE, Source, are_called, attend
from mindspeed_cp.attention.parameters import with_summed_gradients
from mindspeed_cp.attention.recomputation import Recomputation, replay
from mindspeed_cp.attention.terms import AttentionTerms, check_terms, default_scale, terms_words
from mindspeed_cp.comm import Agreement, Communicator
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.handles import with_handle
from mindspeed_cp.kernels import TileCase, TileTerms
from mindspeed_cp.kernels.precision import autocast_is_on
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.program import Transport
from mindspeed_cp.sharding import SequenceLayout

_TYPES = "give q, k and v as tensors [B, N, S, D], scale as a number, visible as a boolean tensor"
_TYPES_OF_LATENT = (
    "give q as a tensor [B, N, S, D], a payload [B, S, W] of its dtype, and in Latent(weights=...), a tuple, what "
    "expand takes beside it, [G, ...] each"
)


class Attention(Protocol):
    """Attention over however many ranks: each gives its own tokens' queries, keys and values."""

    def check(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | None = None) -> None:
        """Raise ValueError where this algorithm cannot take tensors of these shapes; nothing is sent or computed."""
        ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> Tensor:
        """Attention output of this rank's queries over the keys of all ranks.

        q: [B, N, S, D]; k: [B, G, S, D]; v: [B, G, S, V]; one floating dtype, any strides.
        scale: factor on the scores, 1 / sqrt(D) by default.
        visible: the mask's rows for this rank's queries, [S, T] or [1 or B, 1 or N, S, T] bool with T the tokens of the
            whole sequence in order, True where a query sees a key. Only for attention that was built without a causal
            mask; without it every query sees every key.
        plan: who holds what and sees whom (`PackedBatch.plan`, say), in place of equal shards and of the type of mask
            that the attention was built with; ranks may then have different numbers of tokens. The same on all ranks.
            Beside `visible` it says who holds what alone: one document, in which all see all.
        terms: sinks, softcap, ALiBi, bias, dropout.

        Returns [B, N, S, V] in the dtype of q, differentiable in q, k, v and the terms that are learnable; 0 in rows
        that see no key.
        """
        ...

    def with_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output, and the log-sum-exp of each query's scores, a sink's among them.

        The latter is [B, N, S] in fp32 (fp64 for fp64 inputs), natural logarithm, -inf in rows that see no key, and
        differentiable too. Where gradients are wanted, eight more numbers travel with each token and head of v, and of
        k where it is as large.
        """
        ...

    def with_largest(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output, and the largest score of each head among those that this rank has computed.

        The latter is [N] in fp32 (fp64 for fp64 inputs), without a gradient: scores as the softmax takes them, sinks
        left out; -inf for heads that this rank has not computed. QK-clip takes the largest over all ranks.
        """
        ...

    def check_latent(self) -> None:
        """Raise ValueError where a latent cannot travel."""
        ...

    def of_latent(
        self,
        q: Tensor,
        latent: Latent,
        *,
        scale: float | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> Tensor:
        """The output over keys and values that are made of a latent, which travels in their place.

        latent: of this rank's tokens; of the dtype of q, as what is made of it.

        Returns [B, N, S, V], differentiable in the payload and the weights too; the gradients of weights are this
        rank's part of them.
        """
        ...


class _Told(TypedDict):
    """Arguments of `Attention` by name."""

    scale: float
    visible: Tensor | None
    plan: AttentionPlan | None
    terms: AttentionTerms | None


class PreparedCall(NamedTuple):
    """Arguments of a call in order: one dtype, shapes that fit, and a factor above 0 with the same scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    visible: Tensor | None
    plan: AttentionPlan | None
    terms: AttentionTerms | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        return self.q, self.k, self.v

    @property
    def told(self) -> "_Told":
        """What attention is told beside them."""
        return {"scale": self.scale, "visible": self.visible, "plan": self.plan, "terms": self.terms}

    @property
    def is_empty(self) -> bool:
        """Whether no rank has a query."""
        if self.plan is None or not self.q.size(0):
            return not self.q.numel()
        return not any(map(self.plan.queries.num_tokens, range(self.plan.queries.num_ranks)))


@dataclass(frozen=True)
class ContextParallelAttention:
    """Attention that its ranks enter with the same case, or not at all; what `build_attention` gives.

    attention: what computes it. config, layout, transport, pieces: how it was built; the same on all ranks. agreement:
    of these ranks; None for one that is alone. parameters: of these ranks, where the gradients of sinks and slopes are
    summed over them; None where that is somebody else's to do. recomputation: of the checkpoints that it runs in.
    handle: what stands for it in a graph of torch.compile, see handles.py.
    """

    attention: Attention
    config: ContextParallelConfig
    layout: SequenceLayout
    agreement: Agreement | None = None
    transport: Transport | None = None
    pieces: int = 1
    parameters: Communicator | None = None
    recomputation: Recomputation | None = None
    handle: Tensor = field(init=False, repr=False, compare=False)

    def check(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | None = None) -> None:
        """See Attention."""
        check_shards(q, k, v, same_tokens=plan is None)
        self.attention.check(q, k, v, plan)

    def __post_init__(self) -> None:
        with_handle(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        with_handle(self)

    @property
    def exchanges_heads(self) -> bool:
        """Whether it attends with exchanged tensors, as under Ulysses, and saves none of those that it is given."""
        return bool(getattr(self.attention, "exchanges_heads", False))

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | Tensor | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> Tensor:
        """See Attention. Under torch.autocast q, k and v may differ in dtype, and then get autocast's.

        scale: any finite number, also as a tensor that wants no gradient; one of 0 or below is exact too.

        Raises ValueError, on every rank, where one of them has tensors that do not fit, or other ones than the rest.
        """
        (out,) = self._attend(OUTPUT, q, (k, v), scale, visible, plan, terms)
        return out

    def with_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | Tensor | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See Attention; else as the call."""
        out, lse = self._attend(WITH_LSE, q, (k, v), scale, visible, plan, terms)
        return out, lse

    def with_largest(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | Tensor | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See Attention; else as the call."""
        out, largest = self._attend(WITH_LARGEST, q, (k, v), scale, visible, plan, terms)
        return out, largest

    def of_latent(
        self,
        q: Tensor,
        latent: Latent,
        *,
        scale: float | Tensor | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> Tensor:
        """See Attention; else as the call."""
        if not isinstance(latent, Latent):
            self.refuse(f"latent is a {type(latent).__name__}; give Latent(payload, expand, weights).", q)
        (out,) = self._attend(OUTPUT, q, latent, scale, visible, plan, terms)
        return out

    def _attend(
        self,
        wanted: str,
        q: Tensor,
        source: Source,
        scale: float | Tensor | None,
        visible: Tensor | None,
        plan: AttentionPlan | None,
        terms: AttentionTerms | None,
    ) -> tuple[Tensor, ...]:
        """What is wanted: as it is, or as an operator where somebody looks for one."""
        # What is kept for recomputations anyway is no policy's to keep.
        if not are_called(by_policies=self.recomputation is None):
            return self.run(wanted, q, source, scale=scale, visible=visible, plan=plan, terms=terms)
        refuse_learnt(scale)
        refuse_other_plans(plan)
        if not isinstance(source, Latent):
            q, *source_ = in_one_dtype(q, *source)
            source = source_[0], source_[1]
        return attend(self, wanted, q, source, scale=scale, visible=visible, plan=plan, terms=terms)

    def run(
        self,
        wanted: str,
        q: Tensor,
        source: Source,
        *,
        scale: float | Tensor | None,
        visible: Tensor | None,
        plan: AttentionPlan | None,
        terms: AttentionTerms | None,
    ) -> tuple[Tensor, ...]:
        """The output, and what is wanted beside it; what the operator runs too, see Note [Operators]."""
        if isinstance(source, Latent):
            call = self.prepare(q, q, q, scale=scale, visible=visible, plan=plan, terms=terms, latent=source)
            if call.is_empty:
                return (_empty(call.q, source.payload, call.v),)
            return (self.attention.of_latent(call.q, source, **call.told),)
        call = self.prepare(q, *source, scale=scale, visible=visible, plan=plan, terms=terms, wanted=wanted)
        dtype = accumulation_dtype(call.q.dtype)
        if wanted == OUTPUT:
            return (_empty(*call.tensors) if call.is_empty else self.attention(*call.tensors, **call.told),)
        if wanted == WITH_LSE:
            if not call.is_empty:
                return self.attention.with_lse(*call.tensors, **call.told)
            out = _empty(*call.tensors)
            return out, out.sum(dim=-1, dtype=dtype)
        if not call.is_empty:
            return self.attention.with_largest(*call.tensors, **call.told)
        return _empty(*call.tensors), call.q.new_full((call.q.size(1),), -torch.inf, dtype=dtype)

    def check_latent(self) -> None:
        """See Attention."""
        self.attention.check_latent()

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | Tensor | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
        wanted: str = OUTPUT,
        latent: Latent | None = None,
    ) -> PreparedCall:
        """What the algorithm is given, once it is in order and all ranks have agreed on it. Raises as the call does.

        wanted: what is asked back, in words that all ranks have to agree on. latent: in place of k and v, which are not
        looked at then; the call has such as say what is made of it.
        """
        words, refusal, factor = "", None, 1.0
        try:
            refuse_other_plans(plan)
            if latent is None:
                q, k, v = in_one_dtype(q, k, v)
            else:
                self.check_latent()
                latent.check()
                k, v = latent.stand_ins
            self.check(q, k, v, plan)
            self._check_mask(q, visible, plan)
            factor = number(scale, q)
            check_terms(terms, q, k, plan, self.layout.size)
            words = f"{_words(q, k, v, factor, visible, plan)}{terms_words(terms)}; {self._setup}"
            words += f"; for the {wanted}" * (wanted != OUTPUT)
            words += "" if latent is None else f"; made of {latent.words}"
        except Exception as error:
            # Whatever it is, the other ranks would wait for this one.
            way_out = _TYPES if latent is None else _TYPES_OF_LATENT
            refusal = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}; {way_out}"
        if self.agreement is not None:
            agreement, device = self.agreement, getattr(q, "device", None)
            replay(self.recomputation, wanted, lambda: agreement.reach(words, refusal=refusal, device=device))
        elif refusal is not None:
            raise ValueError(refusal)
        terms = with_summed_gradients(terms, self.parameters)
        # Fused kernels take a factor above 0 for granted.
        if factor < 0:
            return PreparedCall(-q, k, v, -factor, visible, plan, terms)
        q, factor = (q, factor) if factor else (q * 0.0, 1.0)
        return PreparedCall(q, k, v, factor, visible, plan, terms)

    def refuse(self, reason: str, q: Tensor) -> NoReturn:
        """Raise ValueError on every rank: the caller cannot attend with `q` here, and the others would wait for it."""
        if self.agreement is not None:
            self.agreement.reach("", refusal=reason, device=q.device)
        raise ValueError(reason)

    def _check_mask(self, q: Tensor, visible: Tensor | None, plan: AttentionPlan | None) -> None:
        refuse_mask(visible, plan, causal=self.config.attention_mask_type == "causal")
        if visible is None:
            return
        check_mask(visible, q, self.layout.size * q.size(2) if plan is None else num_keys(plan), self.layout.size)

    @functools.cached_property
    def _setup(self) -> str:
        """How it was built, in words that must be the same on all ranks."""
        grid, overlap = self.config.topology, " with overlap" * self.config.use_cp_send_recv_overlap
        transport = "" if self.transport is None else f", K/V by {self.transport.name.lower()}"
        transport += f" in {self.pieces} pieces" * (self.pieces > 1)
        policy = self.config.kept_policy
        transport += f", K/V kept by policy {policy}" * (policy is not None)
        transport += ", gradients of parameters summed" * (self.parameters is not None)
        transport += ", outputs kept for recomputation" * (self.recomputation is not None)
        return (
            f"{self.config.attention_mask_type} attention on {self.layout.kind} shards of {self.layout.size} ranks, "
            f"Ulysses {grid.ulysses} x inner ring {grid.inner} x outer ring {grid.outer}{overlap}{transport}"
        )


def in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in one dtype: where they differ, that of torch.autocast, if it is on.

    That is what it does for torch's own scaled_dot_product_attention, but for fp64, which it leaves alone.
    """
    if any(hasattr(x, "to_local") for x in (q, k, v)):
        raise ValueError("q, k or v is a DTensor, and attention takes each rank's own shard; give q.to_local().")
    device_type = q.device.type
    if q.dtype == k.dtype == v.dtype or not autocast_is_on(device_type):
        return q, k, v
    dtype = torch.get_autocast_dtype(device_type)
    castable = (torch.float32, torch.bfloat16, torch.float16)
    q, k, v = (x.to(dtype) if x.dtype in castable else x for x in (q, k, v))
    return q, k, v


def check_shards(q: Tensor, k: Tensor, v: Tensor, *, same_tokens: bool = True) -> None:
    """Raise ValueError unless these are the shards of one rank, see Attention. same_tokens: as many of q as of k."""
    if q.dim() == k.dim() == v.dim() == 4 and not min(q.size(1), q.size(3), k.size(1), v.size(3)):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: one head and a head size of 1 at least; only "
            f"batch and tokens may be 0."
        )
    TileCase.of(q, k, v, TileTerms(1.0))
    if same_tokens and q.size(2) != k.size(2):
        raise ValueError(f"a rank's q has {q.size(2)} tokens and its k {k.size(2)}: it gives those of the same tokens.")


def num_keys(plan: AttentionPlan) -> int:
    """Keys of a whole sample."""
    return sum(map(plan.keys.num_tokens, range(plan.keys.num_ranks)))


def check_mask(visible: Tensor, q: Tensor, keys: int, num_ranks: int) -> None:
    """Raise ValueError unless these are the mask's rows for one of so many ranks, see Attention."""
    rows = q.size(2)
    needed = f"give [{rows}, {keys}] or [1 or {q.size(0)}, 1 or {q.size(1)}, {rows}, {keys}]"
    of_heads = visible.dim() == 4 and visible.size(0) in (1, q.size(0)) and visible.size(1) in (1, q.size(1))
    if (visible.dim() != 2 and not of_heads) or tuple(visible.shape[-2:]) != (rows, keys):
        raise ValueError(
            f"a mask of {tuple(visible.shape)} is not one for this rank's {rows} queries over the {keys} keys of "
            f"{num_ranks} ranks, q being {tuple(q.shape)}; {needed}."
        )
    if visible.device != q.device:
        raise ValueError(f"a mask is on {visible.device} and q on {q.device}; move it, visible.to(q.device).")
    if visible.dtype != torch.bool:
        raise ValueError(
            f"a mask is boolean, True where a query sees a key, and this one is {visible.dtype}; "
            f"give `mask > 0`, or `mask == 0` for one that is added to the scores."
        )


def check_plan(plan: AttentionPlan, q: Tensor, k: Tensor, rank: int, num_ranks: int) -> None:
    """Raise ValueError unless q [B, N, S, D] and k [B, G, T, D] are what a plan of these ranks has on this one."""
    for name, x, layout in (("q", q, plan.queries), ("k", k, plan.keys)):
        if layout.num_ranks != num_ranks:
            raise ValueError(
                f"the plan deals {name} to {layout.num_ranks} ranks, and the context-parallel group has {num_ranks}; "
                f"make it for {num_ranks}."
            )
        if x.size(2) != layout.num_tokens(rank):
            raise ValueError(
                f"{name} {tuple(x.shape)} has {x.size(2)} tokens, and the plan has {layout.num_tokens(rank)} on rank "
                f"{rank}; shard by the plan's own layout, for this rank."
            )
        samples = {run.sample for run in layout.runs(rank)} - {None}
        if samples and (samples != set(range(x.size(0)))):
            raise ValueError(
                f"{name} {tuple(x.shape)} has {x.size(0)} samples, and the plan has documents for {len(samples)}; give "
                f"the batch that it was made for."
            )


def refuse_other_plans(plan: object) -> None:
    """Raise ValueError for what is no plan."""
    if plan is None or isinstance(plan, AttentionPlan):
        return
    way_out = "plan=batch.plan" if isinstance(getattr(plan, "plan", None), AttentionPlan) else "an AttentionPlan"
    raise ValueError(f"plan is a {type(plan).__name__}; give {way_out}.")


def refuse_mask(visible: Tensor | None, plan: AttentionPlan | None, *, causal: bool) -> None:
    """Raise ValueError where a causal attention is given a mask, or one beside a plan that says who sees whom."""
    if visible is not None and plan is not None and not plan.shows_all:
        raise ValueError(
            "a call with a plan takes no mask tensor: each says who sees whom; leave out `visible`, or give a plan of "
            "one document in which all see all."
        )
    if causal and visible is not None:
        raise ValueError(
            "a causal attention takes no mask tensor: it would be one of the two; build it with "
            "attention_mask_type='general' to use the tensor."
        )


def refuse_learnt(scale: float | Tensor | None) -> None:
    """Raise ValueError for a scale that wants a gradient."""
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "scale is a tensor that requires a gradient, and attention gives it none; multiply q by it, and give "
            "scale=1.0."
        )


def number(scale: float | Tensor | None, q: Tensor) -> float:
    """The factor on the scores as a number. Raises ValueError for one that is none, or that wants a gradient."""
    if scale is None:
        return default_scale(q.size(-1))
    refuse_learnt(scale)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"scale is a tensor of {tuple(scale.shape)}; give one number, or multiply q by it.")
    value = float(scale) + 0.0  # -0.0 is 0.0.
    largest = torch.finfo(torch.promote_types(q.dtype, torch.float32)).max
    if not abs(value) <= largest:
        raise ValueError(
            f"scale is {value}, and scores are computed up to {largest:.2g}; give a finite number, or None for "
            f"1 / sqrt({q.size(-1)})."
        )
    return value


def _empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output of a batch, or a shard, of nothing: it has gradients, which are as empty, and nothing is sent."""
    return q.new_zeros((*q.shape[:3], v.size(3))) * (q.sum() + k.sum() + v.sum())


def _words(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None, plan: AttentionPlan | None) -> str:
    """What has to be the same on all ranks of a call, for messages and for comparing."""
    shapes = [tuple(x.shape) if plan is None else (*x.shape[:2], "tokens", x.size(3)) for x in (q, k, v)]
    of_plan = "" if plan is None else f", {plan.words}"
    mask = "no mask"
    if visible is not None:
        rows: object = visible.size(-2) if plan is None else "tokens"
        mask = f"a mask {_spelled((*visible.shape[:-2], rows, visible.size(-1)))}"
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return (
        f"q {_spelled(shapes[0])}, k {_spelled(shapes[1])}, v {_spelled(shapes[2])}, "
        f"{str(q.dtype).removeprefix('torch.')} on {q.device.type}, {mask}{of_plan}, "
        f"scale {scale:.17g}, with{'' if gradients else 'out'} gradients"
    )


def _spelled(shape: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
