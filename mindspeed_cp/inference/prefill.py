"""Prefill over ranks: new tokens attend to themselves and to what is cached; K/V travel, or the queries do.

    pass-KV     K/V of one owner after another come to a rank's queries; the rank has its output at the end

    pass-Q      queries of one owner after another come to a rank's K/V, which stay where they are; the states that are
                found for them go home at the end, see pass_q.py

Both are programs of the plan (program/): pass-KV is the ring that training has, pass-Q the program of the plan in which
queries and keys have changed places, with the same transports. Only what is seen travels, so that cached prefixes of
any lengths on any ranks need no padding to the longest. Which of both is cheaper is said in costs.py.

Shapes: B batch, N query heads, G key/value heads, S new tokens of this rank, T cached and new ones, D key head size, V
value head size.

Source: Context Parallelism for Scalable Million-Token Inference, arXiv:2411.01783, algorithms 2 and 3.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mindspeed_cp.attention import AttentionTerms, RingAttention
from mindspeed_cp.attention.terms import check_terms, terms_words
from mindspeed_cp.comm import Agreement, Communicator, Subject
from mindspeed_cp.comm.communicator import AgreeingCommunicator
from mindspeed_cp.inference.costs import Coefficients, PrefixCase, Rates, choose_pass
from mindspeed_cp.inference.local import Asked, agreed, check_tokens
from mindspeed_cp.inference.pass_q import PassQ
from mindspeed_cp.inference.ring_call import RingCall
from mindspeed_cp.inference.states import State
from mindspeed_cp.kernels import KERNELS, KernelRegistry
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.program import Transport

Strategy = Literal["auto", "pass_kv", "pass_q"]

SUBJECT = Subject("inference", "give all of them the same prompts, plan, scale and strategy")


def agreement_of(communicator: AgreeingCommunicator) -> Agreement:
    """What has the ranks of an engine come to each call alike, or raise alike; see Note [Agreement] in comm/."""
    return Agreement(communicator.apart, on_host=communicator.on_host, subject=SUBJECT)


def ring_pass_kv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: AttentionPlan,
    communicator: Communicator | None,
    scale: float | None = None,
    terms: AttentionTerms | None = None,
    kernels: KernelRegistry = KERNELS,
    transport: Transport | None = None,
    pieces: int = 1,
    overlap: bool = True,
    agreement: Agreement | None = None,
) -> State:
    """Attention of this rank's queries over the keys of all ranks; K/V travel.

    q: [B, N, S, D]; k: [B, G, T, D]; v: [B, G, T, V]; one floating dtype, any strides, by the plan's layouts: queries
        are new tokens, keys cached and new ones, see prefill_plan.
    plan: who holds what and sees whom, the same on all ranks. communicator: of these; None for a rank that is alone.
    scale: 1 / sqrt(D) by default. terms: sinks, softcap, ALiBi, bias. kernels: what to choose from for each tile.
    transport: how what travels does; the cheapest for the plan by default. overlap: whether it does while a step is
        computed; the bits are the same. pieces: of the K/V heads that a rotation works on one after another, see Note
        [Pieces] in program/rotation.py; they divide the K/V heads.
    agreement: where given, ranks that come with different plans, shapes or settings all raise, before anything is sent.

    Returns out [B, N, S, V] in the dtype of q, 0 where a query sees no key, and lse [B, N, S] in fp32 (fp64 for fp64).
    No gradients. Raises ValueError where tensors do not fit together, or the plan.
    """
    return prefix_attention(
        *(q, k, v),
        plan=plan,
        communicator=communicator,
        strategy="pass_kv",
        scale=scale,
        terms=terms,
        kernels=kernels,
        transport=transport,
        pieces=pieces,
        overlap=overlap,
        agreement=agreement,
    )


def ring_pass_q_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: AttentionPlan,
    communicator: Communicator | None,
    scale: float | None = None,
    terms: AttentionTerms | None = None,
    kernels: KernelRegistry = KERNELS,
    transport: Transport | None = None,
    pieces: int = 1,
    overlap: bool = True,
    agreement: Agreement | None = None,
) -> State:
    """Attention of this rank's queries over the keys of all ranks; queries travel, and their states come home.

    Arguments, result and errors are those of `ring_pass_kv_attention`. With pieces states of all but the last one go
    home while the next is computed, see Note [Home in pieces] in pass_q.py. A bias is sent to the keys, which is as
    many numbers for each of its heads as there are queries that travel, times keys where they go.
    """
    return prefix_attention(
        *(q, k, v),
        plan=plan,
        communicator=communicator,
        strategy="pass_q",
        scale=scale,
        terms=terms,
        kernels=kernels,
        transport=transport,
        pieces=pieces,
        overlap=overlap,
        agreement=agreement,
    )


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: AttentionPlan,
    communicator: Communicator | None,
    strategy: Strategy = "auto",
    rates: Rates | None = None,
    coefficients: Coefficients | None = None,
    scale: float | None = None,
    terms: AttentionTerms | None = None,
    kernels: KernelRegistry = KERNELS,
    transport: Transport | None = None,
    pieces: int = 1,
    overlap: bool = True,
    agreement: Agreement | None = None,
) -> State:
    """Attention of this rank's queries over the keys of all ranks, by the cheaper of both ways.

    strategy: one of them, or "auto": `choose_pass` from the plan's numbers of new and cached tokens, which are the
    same on all ranks, and `rates` or `coefficients`, which have to be: see `agreed_rates` and `fit_coefficients`.
    Without either it is by the bytes alone.
    With a bias "auto" is pass-KV: a bias travels with queries, and stays with them where K/V do.
    The rest as `ring_pass_kv_attention`.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy={strategy!r} is none; give one of {', '.join(map(repr, get_args(Strategy)))}.")

    def come() -> tuple[_Call, str]:
        asked = Asked.of(q, scale, terms, kernels)
        case = asked.case(q, k, v, looks_ahead=plan.looks_ahead)
        call = _Call(q, k, v, plan, communicator, asked, case, transport, overlap, pieces)
        call.check(terms)
        heads = f"{q.size(0)} sequences, {q.size(1)}:{k.size(1)} heads of {q.size(3)} ({v.size(3)}), {q.dtype}"
        words = f"{heads}, {plan.words}, scale {asked.terms.scale:.17g}{terms_words(terms)}"
        return call, f"{words}, {strategy}, {rates}, {coefficients}, {transport}, {pieces} pieces"

    call = agreed(agreement, come, q)
    chosen = call.chosen(rates, coefficients) if strategy == "auto" else strategy
    return call.pass_q() if chosen == "pass_q" else call.pass_kv()


@dataclass(frozen=True)
class _Call(RingCall):
    """By either way; its arguments are in order once it is checked."""

    def check(self, terms: AttentionTerms | None) -> None:
        """Raise ValueError unless the tensors are what the plan has on this rank. terms: as they were asked for."""
        for name, x, layout in (("q", self.q, self.plan.queries), ("k", self.k, self.plan.keys)):
            if layout.num_ranks != self.size:
                raise ValueError(
                    f"the plan deals {name} to {layout.num_ranks} ranks, and there are {self.size}; make it for "
                    f"{self.size}."
                )
            check_tokens(name, x, layout, self.rank)
        check_terms(terms, self.q, self.k, self.plan, self.size)
        self.ring.check_heads(self.k.size(1))

    def chosen(self, rates: Rates | None, coefficients: Coefficients | None) -> Literal["pass_kv", "pass_q"]:
        """From numbers that all ranks have."""
        if self.asked.terms.bias is not None:
            return "pass_kv"
        return choose_pass(PrefixCase.of(self.plan, self.case), rates, coefficients=coefficients)

    @property
    def ring(self) -> RingAttention:
        """The one of training."""
        kernels, transport = self.asked.kernels, self.transport
        return RingAttention(
            self.schedule, self.communicators, self.overlap, kernels, pieces=self.pieces, transport=transport
        )

    def pass_kv(self) -> State:
        """K/V around; no gradients."""
        with torch.no_grad():
            return State(*self.ring.with_lse(self.q, self.k, self.v, self.plan, self.asked.terms))

    def pass_q(self) -> State:
        """Queries around, states home."""
        return PassQ(**vars(self))()
