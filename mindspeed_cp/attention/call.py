"""A call of attention: put in order, checked, and compared with those of the other ranks, before anything is sent.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T keys, D key head size, V value head size.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from mindspeed_cp.attention import operators
from mindspeed_cp.attention.checks import (
    check_mask,
    check_shards,
    in_one_dtype,
    refuse_learnt,
    refuse_mask,
    refuse_other_plans,
    scale_as_number,
)
from mindspeed_cp.attention.interface import OUTPUT, WITH_LARGEST, WITH_LSE, Attention, Source, Told, Wanted
from mindspeed_cp.attention.latent import Latent
from mindspeed_cp.attention.parameters import with_summed_gradients
from mindspeed_cp.attention.recomputation import Recomputation, replay
from mindspeed_cp.attention.terms import AttentionTerms, check_terms, terms_words
from mindspeed_cp.comm import Agreement, Communicator
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.handles import with_handle
from mindspeed_cp.plan import AttentionPlan, total_tokens
from mindspeed_cp.program import Transport
from mindspeed_cp.sharding import SequenceLayout

_TYPES = "give q, k and v as tensors [B, N, S, D], scale as a number, visible as a boolean tensor"
_TYPES_OF_LATENT = (
    "give q as a tensor [B, N, S, D], a payload [B, S, W] of its dtype, and in Latent(weights=...), a tuple, what "
    "expand takes beside it, [G, ...] each"
)


class PreparedCall(NamedTuple):
    """A call in order: one dtype, shapes that fit, and a scale above 0 with the same scores.

    v: the values, or what they would be like where they are made of a latent.
    """

    q: Tensor
    source: Source
    told: Told
    v: Tensor

    @property
    def is_empty(self) -> bool:
        """Whether no rank has a query."""
        plan = self.told.plan
        if plan is None or not self.q.size(0):
            return not self.q.numel()
        return not total_tokens(plan.queries)

    def of_nothing(self, wanted: Wanted) -> tuple[Tensor, ...]:
        """What a batch, or a shard, of nothing gives: gradients are as empty, or 0, and nothing is sent."""
        q, dtype = self.q, accumulation_dtype(self.q.dtype)
        given = (self.source.payload, *self.source.weights) if isinstance(self.source, Latent) else self.source
        terms = self.told.terms or AttentionTerms()
        learnt = [x for x in (terms.sinks, terms.alibi_slopes, terms.bias) if isinstance(x, Tensor)]
        # Weights and parameters have numbers, whatever they are: none of them is read.
        nothing = sum((x.flatten()[:0].sum() for x in (*given, *learnt)), q.flatten()[:0].sum())
        out = q.new_zeros((*q.shape[:3], self.v.size(3))) * nothing
        if wanted == WITH_LSE:
            return out, out.sum(dim=-1, dtype=dtype)
        return (out, q.new_full((q.size(1),), -torch.inf, dtype=dtype)) if wanted == WITH_LARGEST else (out,)


@dataclass(frozen=True)
class ContextParallelAttention(Attention):
    """Attention that its ranks enter with the same case, or not at all; what `build_attention` gives.

    Its methods are those of `Attention`, and take more: under torch.autocast q, k and v that differ in dtype, which
    then get autocast's; a scale that is any finite number, 0 or below too, also as a tensor that wants no gradient.
    They raise ValueError, on every rank, where one rank has tensors that do not fit, or other ones than the rest.

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

    def __post_init__(self) -> None:
        with_handle(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        with_handle(self)

    @property
    def exchanges_heads(self) -> bool:
        """See Attention."""
        return self.attention.exchanges_heads

    def check(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | None = None) -> None:
        """See Attention."""
        check_shards(q, k, v, same_tokens=plan is None)
        self.attention.check(q, k, v, plan)

    def check_latent(self) -> None:
        """See Attention."""
        self.attention.check_latent()

    def attend(self, wanted: Wanted, q: Tensor, source: Source, told: Told) -> tuple[Tensor, ...]:
        """What is wanted: by a run as it is, or by an operator where somebody looks for one."""
        # What is kept for recomputations anyway is no policy's to keep.
        if not operators.are_called(by_policies=self.recomputation is None):
            return self.run(wanted, q, source, told)
        refuse_learnt(told.scale)
        refuse_other_plans(told.plan)
        if not isinstance(source, Latent):
            q, *source_ = in_one_dtype(q, *source)
            source = source_[0], source_[1]
        return operators.attend(self, wanted, q, source, told)

    def run(self, wanted: Wanted, q: Tensor, source: Source, told: Told) -> tuple[Tensor, ...]:
        """The output, and what is wanted beside it; what the operator runs too, see Note [Operators]."""
        call = self.prepare(wanted, q, source, told)
        if call.is_empty:
            return call.of_nothing(wanted)
        return self.attention.attend(wanted, call.q, call.source, call.told)

    def prepare(self, wanted: Wanted, q: Tensor, source: Source, told: Told) -> PreparedCall:
        """What the algorithm is given, once it is in order and all ranks have agreed on it. Raises as the call does."""
        examined, refusal = None, None
        try:
            examined = self._examined(wanted, q, source, told)
        except Exception as error:
            # Whatever it is, the other ranks would wait for this one.
            way_out = _TYPES_OF_LATENT if isinstance(source, Latent) else _TYPES
            refusal = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}; {way_out}"
        if self.agreement is not None:
            agreement, device = self.agreement, getattr(q, "device", None)
            words = "" if examined is None else examined.words
            replay(self.recomputation, wanted, lambda: agreement.reach(words, refusal=refusal, device=device))
        if examined is None:
            raise ValueError(refusal)
        q, source, v, factor, _ = examined
        terms = with_summed_gradients(told.terms, self.parameters)
        told = Told(abs(factor) or 1.0, told.visible, told.plan, terms)
        if factor <= 0:  # Fused kernels take one above 0 for granted.
            q = -q if factor else q * 0.0
        return PreparedCall(q, source, told, v)

    def _examined(self, wanted: Wanted, q: Tensor, source: Source, told: Told) -> "_Examined":
        """The call in order, by what this rank alone can tell. Raises ValueError where something does not fit."""
        refuse_other_plans(told.plan)
        if isinstance(source, Latent):
            self.check_latent()
            source.check()
            k, v = source.stand_ins
        else:
            q, k, v = in_one_dtype(q, *source)
            source = k, v
        self.check(q, k, v, told.plan)
        self._check_mask(q, told.visible, told.plan)
        factor = scale_as_number(told.scale, q)
        check_terms(told.terms, q, k, told.plan, self.layout.size)
        words = f"{_words(q, k, v, factor, told)}{terms_words(told.terms)}; {self._setup}"
        words += f"; for the {wanted}" * (wanted != OUTPUT)
        words += f"; made of {source.words}" if isinstance(source, Latent) else ""
        return _Examined(q, source, v, factor, words)

    def refuse(self, reason: str, q: Tensor) -> NoReturn:
        """Raise ValueError on every rank: the caller cannot attend with `q` here, and the others would wait for it."""
        if self.agreement is not None:
            self.agreement.reach("", refusal=reason, device=q.device)
        raise ValueError(reason)

    def _check_mask(self, q: Tensor, visible: Tensor | None, plan: AttentionPlan | None) -> None:
        refuse_mask(visible, plan, causal=self.config.attention_mask_type == "causal")
        if visible is None:
            return
        keys = self.layout.size * q.size(2) if plan is None else total_tokens(plan.keys)
        check_mask(visible, q, keys, self.layout.size)

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


class _Examined(NamedTuple):
    """A call that fits on this rank. v: see PreparedCall. factor: on the scores. words: what other ranks compare."""

    q: Tensor
    source: Source
    v: Tensor
    factor: float
    words: str


def _words(q: Tensor, k: Tensor, v: Tensor, scale: float, told: Told) -> str:
    """What has to be the same on all ranks of a call, for messages and for comparing."""
    visible, plan = told.visible, told.plan
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
