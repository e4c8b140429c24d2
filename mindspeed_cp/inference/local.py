"""Attention of the tiles at hand, without gradients: what a rank computes between two messages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mindspeed_cp.attention.sinks import with_sinks
from mindspeed_cp.attention.sums import MergedOutput
from mindspeed_cp.attention.terms import AttentionTerms, Terms, TermsOfTiles, default_scale
from mindspeed_cp.comm import Agreement
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.inference.sequences import Spans, everything
from mindspeed_cp.inference.states import State
from mindspeed_cp.kernels import KERNELS, KernelRegistry, TileCase, TileOutput, TileTerms
from mindspeed_cp.kernels.calls import Call, calls
from mindspeed_cp.kernels.places import ALL
from mindspeed_cp.kernels.precision import autocast_off
from mindspeed_cp.plan import AttentionPlan, Layout, Tile

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Asked:
    """What a call asks of its kernels. terms: all of the scores, sinks too. kernels: what to choose from."""

    terms: Terms
    kernels: KernelRegistry = KERNELS

    @classmethod
    def of(cls, q: Tensor, scale: float | None, terms: AttentionTerms | None, kernels: KernelRegistry) -> "Asked":
        """Those of a call, with 1 / sqrt(D) by default. Raises ValueError for what inference does not do."""
        if terms is not None and terms.dropout is not None:
            raise ValueError("dropout is for training, and these are inference functions; leave it out of the terms.")
        scale = default_scale(q.size(-1)) if scale is None else scale
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale={scale}: give a finite number above 0, and fold a sign into q.")
        return cls(Terms.of(terms, scale), kernels)

    def case(self, q: Tensor, k: Tensor, v: Tensor, *, looks_ahead: bool) -> TileCase:
        """The case of whole tensors. Raises ValueError where they do not fit together.

        looks_ahead: see AttentionPlan.
        """
        case = TileCase.of(q, k, v, TileTerms(self.terms.scale))
        return case._replace(terms=self.terms.needs(q.dtype, looks_ahead=looks_ahead))

    def calls(self, tiles: Sequence[Tile], case: TileCase) -> tuple[Call, ...]:
        """The calls of kernels for tiles."""
        return calls(tiles, case, self.kernels)

    def finished(self, state: TileOutput | State, dtype: torch.dtype) -> State:
        """A state over all keys, with sinks, and its output rounded once."""
        out, lse, _ = with_sinks(TileOutput(state.out, state.lse), self.terms.sinks)
        return State(out.to(dtype), lse)


def agreed(agreement: Agreement | None, come: Callable[[], tuple[_Made, str]], q: Tensor) -> _Made:
    """What a rank comes to a call with, once all have come alike; at once where there is no agreement.

    come: gives it, and in words what of it has to be the same on all ranks. q: the queries.

    Raises what `come` does, or, with an agreement, ValueError on all ranks where one has come otherwise or could not.
    """
    words, refusal, made = "", None, None
    try:
        made, words = come()
    except (ValueError, TypeError, AttributeError) as error:
        refusal = str(error)
        if agreement is None:
            raise
    if agreement is not None:
        agreement.reach(words, refusal=refusal, device=getattr(q, "device", None))
    assert made is not None, "a refusal has raised"
    return made


def attention_of(
    made: Sequence[Call],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    told: TermsOfTiles,
    owner: int,
    held: Sequence[slice] | None = None,
    heads: slice = ALL,
) -> TileOutput:
    """Output and log-sum-exp of calls over k [B, G, T, D] and v of `owner`, in the dtype of sums; sinks left out.

    q: [B, N, s, D], which holds those tokens of its rank; all of them for None. heads: which of the model's query heads
        they are; k and v are of those that they read.
    """
    merged = MergedOutput.of(q, v.size(3))
    for call in made:
        queries, keys = call.queries(q, held), call.keys(k)
        given = queries.given.take(q), keys.given.take(k), keys.given.take(v)
        output = call.kernel.forward(*given, told.of(owner, call, heads))
        merged.merge(TileOutput(queries.result(output.out), queries.result(output.lse)), queries.back)
    return merged.result(accumulation_dtype(q.dtype))


def attention_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: AttentionPlan | None = None,
    key_rank: int = 0,
    scale: float | None = None,
    terms: AttentionTerms | None = None,
    kernels: KernelRegistry = KERNELS,
) -> State:
    """Attention of queries over the keys at hand, as a state to be merged with others; nothing is sent.

    q: [B, N, S, D]; k: [B, G, T, D]; v: [B, G, T, V]; one floating dtype, any strides.
    plan: who sees whom between queries of its rank 0 and keys of its rank `key_rank`; without it all see all.
    scale: 1 / sqrt(D) by default. terms: of the scores; sinks are left out here, since they are beside all keys: add
        them once, with attention/sinks.py, to the merged state.

    Returns out [B, N, S, V] and lse [B, N, S] in fp32 (fp64 for fp64), 0 and -inf where a query sees no key. No
    gradients. Raises ValueError where the tensors do not fit together, or the plan.
    """
    asked = Asked.of(q, scale, terms, kernels)
    case = asked.case(q, k, v, looks_ahead=plan is None or plan.looks_ahead)
    if plan is None:
        plan, key_rank = everything(q.size(2), k.size(2)), 0
    check_tokens("q", q, plan.queries, 0)
    check_tokens("k", k, plan.keys, key_rank)
    with torch.no_grad(), autocast_off(q.device.type):
        made = plan.once(("state", key_rank, kernels, case), lambda: asked.calls(plan.tiles(0, key_rank), case))
        told = TermsOfTiles(plan, 0, asked.terms, case.terms, q)
        out, lse, _ = attention_of(made, q, k, v, told, key_rank)
    return State(out, lse)


def check_tokens(name: str, x: Tensor, layout: Layout, rank: int) -> None:
    """Raise ValueError unless x [B, H, S, D] has the tokens that a plan has on a rank, of as many sequences."""
    if not 0 <= rank < layout.num_ranks:
        raise ValueError(
            f"the plan deals {name} to {layout.num_ranks} ranks, and has none of rank {rank}; give one of them."
        )
    planned = layout.num_tokens(rank)
    if x.dim() != 4 or x.size(2) != planned:
        raise ValueError(
            f"{name} {tuple(x.shape)} has {x.size(2) if x.dim() == 4 else 'no'} tokens in dim 2, and the plan has "
            f"{planned} on this rank; give [batch, heads, tokens, head size], by the plan's own layout."
        )
    last = max((run.sample for run in layout.runs(rank) if run.sample is not None), default=-1)
    known = layout.num_samples if isinstance(layout, Spans) else 1
    if last >= x.size(0) or known not in (1, x.size(0)):
        raise ValueError(
            f"{name} {tuple(x.shape)} has {x.size(0)} sequences, and the plan has {max(known, last + 1)}"
            f"{'' if known > 1 else ' or more'}; give the batch that it was made for."
        )
