"""Attention with every term, on virtual ranks and over gloo, and the dense attention that it has to equal.

Shapes: B batch, N query heads, G key/value heads, S tokens of the stream, D key head size, V value head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.attention import AttentionTerms, Dropout, RingCommunicators
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.comm import Communicator, VirtualCommunicator, VirtualWorld
from mindspeed_cp.kernels import KERNELS
from mindspeed_cp.kernels.philox import philox
from unit_tests.plan_cases import PlanCase, attention_of, plan_of, seen

SCALE = 0.4
DROPOUT = Dropout(rate=0.3, seed=5, layer=2)


@dataclass(frozen=True)
class TermCase:
    """One attention. plan: who holds what and sees whom. heads: N and G. told: names of its terms. learnt: whether
    slopes and bias want gradients.
    """

    plan: PlanCase
    heads: tuple[int, int]
    told: tuple[str, ...]
    dtype: torch.dtype = torch.float64
    kernels: tuple[str, ...] = KERNELS.names
    value_head_size: int = 12
    learnt: bool = True


class Told(NamedTuple):
    """Inputs of the whole stream, and parameters."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    sinks: Tensor
    slopes: Tensor
    bias: Tensor
    visible: Tensor


class Found(NamedTuple):
    """Results for some tokens [B, H, s, ...], the largest scores [N], and gradients of parameters."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    largest: Tensor
    dsinks: Tensor
    dslopes: Tensor
    dbias: Tensor


def given(case: TermCase) -> Told:
    """The same in every process; what the case is not told is there, and not used."""
    generator = torch.Generator().manual_seed(3)
    samples, length, (heads, kv_heads) = case.plan.samples, case.plan.length, case.heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    broadcast = "bias of all" in case.told
    own = len(case.plan.layout.documents) > 1
    return Told(
        normal(samples, heads, length, 8),
        normal(samples, kv_heads, length, 8),
        normal(samples, kv_heads, length, case.value_head_size),
        normal(samples, heads, length, case.value_head_size),
        normal(samples, heads, length),
        normal(heads),
        normal(heads).abs() / 4,
        normal(samples if own or not broadcast else 1, 1 if broadcast else heads, length, length),
        torch.rand(length, length, generator=generator) < 0.7,
    )


def terms_of(case: TermCase, told: Told, bias: Tensor) -> AttentionTerms:
    """The terms that the case is told."""
    off_by_one = 0.0 if "off by one" in case.told else None
    return AttentionTerms(
        sinks=told.sinks if "sinks" in case.told else off_by_one,
        softcap=1.5 if "softcap" in case.told else None,
        alibi_slopes=told.slopes if "alibi" in case.told else None,
        bias=bias if {"bias", "bias of all"} & set(case.told) else None,
        dropout=DROPOUT if "dropout" in case.told else None,
    )


def parameters_of(terms: AttentionTerms) -> list[Tensor]:
    """Those that are learnt."""
    return [x for x in (terms.sinks, terms.alibi_slopes, terms.bias) if isinstance(x, Tensor) and x.requires_grad]


def found(case: TermCase, told: Told, terms: AttentionTerms, results: Sequence[Tensor], of: Sequence[Tensor]) -> Found:
    """Gradients of (out * dout).sum() + (lse * dlse).sum(), those of what the case is not told being 0."""
    out, lse, largest = results
    loss = (out * told.dout).sum() + (lse.masked_fill(lse.isinf(), 0.0) * told.dlse).sum()
    inputs = [*of, *parameters_of(terms)]
    gradients = dict(zip(map(id, inputs), torch.autograd.grad(loss, inputs), strict=True))
    dq, dk, dv = (gradients[id(x)] for x in of)
    more = (gradients.get(id(x), torch.zeros_like(x)) for x in (told.sinks, told.slopes, told.bias))
    return Found(out.detach(), lse.detach(), dq, dk, dv, largest, *more)


def dense(case: TermCase) -> Found:
    """The oracle: plain torch with autograd, of the whole stream, in fp64."""
    told = Told(*(x if x.dtype == torch.bool else x.double() for x in given(case)))
    for x in (*told[:3], *told[5 : 8 if case.learnt else 6]):
        x.requires_grad_()
    q, k, v = told[:3]
    terms, repeats, length = terms_of(case, told, told.bias), case.heads[0] // case.heads[1], case.plan.length
    scores = q @ k.repeat_interleave(repeats, dim=1).transpose(2, 3) * SCALE
    if terms.softcap is not None:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    if terms.alibi_slopes is not None:
        place = torch.arange(length)
        scores = scores - terms.alibi_slopes[:, None, None] * (place[:, None] - place).abs()
    if terms.bias is not None:
        scores = scores + terms.bias
    allowed = seen(case.plan) & told.visible if "mask" in case.told else seen(case.plan)
    scores = scores.masked_fill(~allowed, -torch.inf)
    sinks = torch.as_tensor(-torch.inf if terms.sinks is None else terms.sinks, dtype=torch.float64)
    with_sink = torch.cat([scores, sinks.reshape(-1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    dead = with_sink.isneginf().all(dim=-1, keepdim=True)
    alive = with_sink.masked_fill(dead, 0.0)
    weights = alive.softmax(dim=-1).masked_fill(dead, 0.0)[..., :-1]
    lse = alive.logsumexp(dim=-1).masked_fill(dead[..., 0], -torch.inf)
    if terms.dropout is not None:
        weights = weights * kept(case) / (1 - terms.dropout.rate)
    out = weights @ v.repeat_interleave(repeats, dim=1)
    largest = scores.detach().amax(dim=(0, 2, 3))
    return found(case, told, terms, (out, lse, largest), (q, k, v))


def kept(case: TermCase) -> Tensor:
    """[B, N, S, S]: by definition, a word for each pair."""
    samples, heads, queries, keys = (
        torch.arange(size) for size in (case.plan.samples, case.heads[0], case.plan.length, case.plan.length)
    )
    grid = torch.meshgrid(samples, heads, queries, keys, indexing="ij")
    words = philox((grid[3] // 4, grid[2], grid[1], grid[0]), DROPOUT.key)
    return torch.stack(words).gather(0, (grid[3] % 4)[None])[0] >= DROPOUT.rate * 2**32


def attend(case: TermCase, rank: int, ulysses: Communicator | None, ring: RingCommunicators | None) -> Found:
    """What a rank gets. ulysses, ring: its groups along either axis; None where that has one rank."""
    whole, tokens = given(case), case.plan.layout.tokens(rank)
    attention = attention_of(case.plan, rank, ulysses, ring, KERNELS.only(case.kernels))
    mine = Told(*(x[:, :, tokens] for x in whole[:5]), *whole[5:7], whole.bias[:, :, tokens], whole.visible[tokens])
    for x in (*mine[:3], *mine[5 : 8 if case.learnt else 6]):
        x.requires_grad_()
    asked = terms_of(case, mine, mine.bias)
    terms = replace(Terms.of(asked, SCALE), visible=mine.visible if "mask" in case.told else None)
    q, k, v = mine[:3]
    whole_plan = plan_of(case.plan)
    out, lse = attention.with_lse(q, k, v, whole_plan, terms)
    _, largest = attention.with_largest(q, k, v, whole_plan, terms)
    return found(case, mine, asked, (out, lse, largest), (q, k, v))


def restored(case: TermCase, shards: Sequence[Found]) -> Found:
    """The whole stream in order, from what each rank got; parameters' gradients are added up."""
    held = [token for rank in range(case.plan.layout.num_ranks) for token in case.plan.layout.tokens(rank)]
    order = sorted(range(len(held)), key=held.__getitem__)
    joined = {
        name: torch.cat([getattr(shard, name) for shard in shards], dim=2)[:, :, order]
        for name in ("out", "lse", "dq", "dk", "dv", "dbias")
    }
    added = {name: sum(getattr(shard, name).double() for shard in shards) for name in ("dsinks", "dslopes")}
    return Found(**joined, **added, largest=torch.stack([shard.largest for shard in shards]).amax(0))


def attend_virtually(case: TermCase, timeout_s: float = 30.0) -> list[Found]:
    """What each virtual rank gets."""
    topology, overlap = case.plan.topology, case.plan.overlap
    world = VirtualWorld(topology.size, timeout_s)

    def on_rank(rank: int) -> Found:
        ulysses, ring = None, None
        if topology.ulysses > 1:
            ulysses = VirtualCommunicator(world, topology.ulysses_ranks(rank), rank, "ulysses")
        if topology.ring_size > 1:
            kinds = [kind if overlap else "ring" for kind in RingCommunicators._fields]
            ranks = topology.ring_ranks(rank)
            ring = RingCommunicators(*(VirtualCommunicator(world, ranks, rank, kind) for kind in kinds))
        return attend(case, rank, ulysses, ring)

    return world.run(on_rank)
