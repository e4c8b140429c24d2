"""Attention whose keys and values are made of a latent that travels: results, bytes, what is saved, what is refused.

Shapes: B batch, N heads, S tokens of the stream, L + R numbers of a payload, U + R of a key, V of a value.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention import Latent, LatentHeads, build_attention
from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.terms import AttentionTerms, Terms
from mindspeed_cp.comm import Traffic, VirtualCommunicator
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.program import KV, Phase, Transport, program
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.topology import CPTopology
from unit_tests.attention.test_every_plan import BANDS, CUTS, DOCUMENTS, OF_EACH_DOCUMENT, layout
from unit_tests.dealt import zigzag
from unit_tests.dense import assert_equal_to
from unit_tests.pairwise import pairwise
from unit_tests.plan_cases import SCALE, PlanCase, attention_of, on_virtual_ranks, plan_of, seen
from unit_tests.ring_cases import grid_name

L, R, U, V, N = 6, 2, 4, 5, 4
HEADS = LatentHeads(latent=L, unshared=U)
AXES = {
    "grid": [
        CPTopology(),
        CPTopology(inner=3),
        CPTopology(ulysses=3),
        CPTopology(outer=2, inner=2),
        CPTopology(inner=2, ulysses=2),
    ],
    "bands": [name for name in BANDS if name != "mask"],
    "documents": list(DOCUMENTS),
    "cut": CUTS,
    "transport": [*Transport, None],
    "overlap": [False, True],
    "kept": [KV.NEITHER, KV.BOTH],
    "form": ["latent", "absorbed"],
    "sinks": [False, True],
}


class Given(NamedTuple):
    """Of the whole stream; sinks and weights are every rank's."""

    q: Tensor
    payload: Tensor
    dout: Tensor
    up: Tensor
    sinks: Tensor


class Found(NamedTuple):
    """Results of the whole stream; gradients of what ranks have in common are the sums of their parts."""

    out: Tensor
    dq: Tensor
    dpayload: Tensor
    dup: Tensor
    dsinks: Tensor


@dataclass(frozen=True)
class Row:
    """A case, which form travels, and whether there are sinks."""

    case: PlanCase
    form: str = "latent"
    sinks: bool = False


def given(case: PlanCase) -> Given:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    samples, length = case.samples, case.length
    return Given(
        normal(samples, N, length, U + R),
        normal(samples, length, L + R),
        normal(samples, N, length, V),
        normal(N, U + V, L),
        normal(N),
    )


def dense(row: Row) -> Found:
    """The oracle: keys and values of the whole stream, and plain torch with autograd."""
    q, payload, dout, up, sinks = (x.double().requires_grad_() for x in given(row.case))
    k, v = HEADS.expand(payload, up)
    scores = (q @ k.transpose(2, 3) * SCALE).masked_fill(~seen(row.case), -torch.inf)
    if row.sinks:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=3)
    out = (scores.softmax(dim=-1)[..., : v.size(2)]) @ v
    wanted = torch.autograd.grad(out, (q, payload, up, sinks), dout.detach(), materialize_grads=True)
    return Found(out.detach(), *wanted)


def attend(row: Row, place: Any) -> Found:
    """What a rank gets of its tokens."""
    rank, ulysses, ring = place
    case, tokens = row.case, row.case.layout.tokens(rank)
    attention, whole = attention_of(case, rank, ulysses, ring), given(case)
    q, payload, dout = whole.q[:, :, tokens], whole.payload[:, tokens], whole.dout[:, :, tokens]
    leaves = [x.detach().requires_grad_() for x in (q, payload, whole.up, whole.sinks)]
    q, payload, up, sinks = leaves
    terms = Terms.of(AttentionTerms(sinks=sinks if row.sinks else None), SCALE)
    if row.form == "latent":
        out = attention.of_latent(q, Latent(payload, HEADS.expand, (up,)), plan_of(case), terms)
    else:
        q_of_latent = HEADS.absorb(q, up)
        of_latents = attention.of_latent(q_of_latent, Latent(payload, HEADS.absorbed), plan_of(case), terms)
        out = HEADS.values(of_latents, up)
    return Found(out.detach(), *torch.autograd.grad(out, leaves, dout, materialize_grads=True))


def found(row: Row) -> Found:
    """Of the whole stream."""
    case = row.case
    shards = on_virtual_ranks(case, lambda *place: attend(row, place))
    held = [token for rank in range(case.layout.num_ranks) for token in case.layout.tokens(rank)]
    order = sorted(range(len(held)), key=held.__getitem__)
    out, dq, dpayload, dup, dsinks = zip(*shards, strict=True)
    in_order = (
        torch.cat(parts, dim=dim).index_select(dim, torch.tensor(order))
        for parts, dim in ((out, 2), (dq, 2), (dpayload, 1))
    )
    return Found(*in_order, sum(x.double() for x in dup), sum(x.double() for x in dsinks))


def row_of(row: dict[str, Any]) -> Row:
    case = PlanCase(
        layout=layout(row["cut"], row["grid"].size, DOCUMENTS[row["documents"]]),
        topology=row["grid"],
        bands=BANDS[row["bands"]],
        bands_of=OF_EACH_DOCUMENT if row["bands"] == "of each document" else {},
        transport=row["transport"],
        overlap=row["overlap"],
        kept=row["kept"],
    )
    return Row(case, row["form"], row["sinks"])


def row_id(row: dict[str, Any]) -> str:
    return ", ".join([grid_name(row["grid"]), row["bands"], row["documents"], row["cut"], row["form"]])


@pytest.mark.parametrize("row", pairwise(AXES), ids=row_id)
def test_attention_of_latents_over_any_plan_equals_dense_attention(row):
    made = row_of(row)
    assert_equal_to(dense(made), found(made))


RING, ULYSSES, HYBRID = CPTopology(inner=4), CPTopology(ulysses=4), CPTopology(inner=2, ulysses=2)
EVEN = PlanCase(zigzag([4] * 8), RING)


def test_gradients_of_weights_are_summed_in_fp32_over_the_steps():
    errors = {}
    for size in (2, 16):
        row = Row(PlanCase(zigzag([256 // size] * (2 * size)), CPTopology(inner=size), dtype=torch.bfloat16))
        exact = dense(row).dup
        errors[size] = float((found(row).dup - exact).norm() / exact.norm())
    assert errors[16] <= 1.2 * errors[2]


@pytest.mark.parametrize("form", ["latent", "absorbed"])
@pytest.mark.parametrize("topology", [RING, ULYSSES, HYBRID], ids=grid_name)
def test_payloads_alone_are_sent(topology, form):
    sent: dict[int, list[int]] = {}

    class Counted(VirtualCommunicator):
        def __init__(self, world, ranks, rank, channel):
            self.counted = Traffic()
            super().__init__(world, ranks, rank, channel, self.counted)
            sent.setdefault(rank, []).append(self.counted)

    row = Row(replace(EVEN, topology=topology), form)
    on_virtual_ranks(row.case, lambda *place: attend(row, place), Counted)
    tokens, degree, plan = 8, topology.ulysses, plan_of(row.case)
    plan = plan.of_groups(topology.ulysses_groups)
    q_size, out_size = (U + R, V) if form == "latent" else (L + R, L)
    for rank in range(4):
        ring = sum(
            program(plan, RingSchedule(1, topology.inner), rank // degree, phase).sent().total() for phase in Phase
        )
        others = (degree - 1) * tokens
        ulysses = 2 * others * (N // degree * (q_size + out_size) + L + R)
        assert sum(sum(each.bytes_sent.values()) for each in sent[rank]) == 8 * (ring * (L + R) + ulysses)


def test_payload_queries_output_and_weights_are_saved_and_no_keys_or_values():
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    case = replace(EVEN, topology=CPTopology(), layout=zigzag([16, 16]))
    whole = given(case)
    q, payload, up = (x.requires_grad_() for x in (whole.q, whole.payload, whole.up))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention_of(case, 0, None, None).of_latent(
            q, Latent(payload, HEADS.expand, (up,)), plan_of(case), Terms(SCALE)
        )
    numbers = 32 * (N * (U + R) + L + R + N * V + N) + N * (U + V) * L
    assert sum(storages.values()) == 8 * numbers


# Refusals.


def attention_on_one_rank(**options: Any) -> Any:
    return build_attention(ContextParallelConfig(**options))


CLOSED_OVER = torch.ones(L + R, 8, requires_grad=True)
REFUSED = {
    "no payload": (
        dict(payload=torch.zeros(1, 1, 8, L + R)),
        "a payload of (1, 1, 8, 8) is none; give [B, S, W], of each token W numbers.",
    ),
    "other tokens": (
        dict(payload=torch.zeros(1, 6, L + R)),
        "a rank's q has 8 tokens and its k 6: without a plan it gives those of the same tokens; do so, or give plan=, "
        "with queries and keys of their own.",
    ),
    "tokens that are left out": (
        dict(expand=lambda payload, up: HEADS.expand(payload[:, :1], up)),
        "expand has made (1, 4, 1, 6) and (1, 4, 1, 5) of a payload (1, 2, 8), and expand makes k [B, G, s, D] and v "
        "[B, G, s, V] of a payload [B, s, W], token by token; let it do so.",
    ),
    "a weight that is not given": (
        dict(expand=lambda payload: ((payload @ CLOSED_OVER)[:, None, :, : U + R],) * 2, weights=()),
        "expand reads a tensor that requires a gradient and is not among its weights, which would get none; give it in "
        "Latent(weights=...), [G, ...] by K/V heads.",
    ),
    "a weight of other heads": (
        dict(expand=lambda payload, up: HEADS.expand(payload, up.view(N, U + V, L)), weights=(torch.ones(2, 18, L),)),
        "weights of expand are [(2, 18, 6)], and it makes 4 K/V heads; give each as [4, ...], by K/V heads.",
    ),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_latents_that_cannot_be_attended_to_are_refused(changed, message):
    fine = dict(payload=torch.zeros(1, 8, L + R), expand=HEADS.expand, weights=(torch.zeros(N, U + V, L),))
    attention, q = attention_on_one_rank(), torch.zeros(1, N, 8, U + R)
    assert attention.of_latent(q, Latent(**fine)).shape == (1, N, 8, V)
    with pytest.raises(ValueError, match=re.escape(message)):
        attention.of_latent(q, Latent(**{**fine, **changed}))


def test_half_of_a_latent_is_not_to_be_kept():
    with pytest.raises(ValueError, match="made of the one latent, which is kept or not; use full, or leave it out"):
        RingAttention(kept=KV.KEYS).check_latent()
