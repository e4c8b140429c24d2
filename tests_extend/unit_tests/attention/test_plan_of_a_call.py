"""A call that comes with a plan: packed documents on every algorithm, and plans that do not fit."""

import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention import ContextParallelAttention, build_attention
from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.topology import CPTopology
from unit_tests.call_cases import ALGORITHMS, run_virtually
from unit_tests.dense import Result, assert_equal_to, dense_attention
from unit_tests.ring_cases import case_on

CU_SEQLENS = [[0, 7, 8, 30, 33, 50], [0, 21, 22, 25, 49, 50]]
BATCH = PackedBatch.from_cu_seqlens(CU_SEQLENS, 4)


def inputs(batch: PackedBatch, samples: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator, length = torch.Generator().manual_seed(1), sum(batch.layout.samples[0])
    q, k, v, dout = (
        torch.randn(samples, heads, length, 8, generator=generator, dtype=torch.float64) for heads in (4, 4, 4, 4)
    )
    return q, k, v, dout


def visible_of(cu_seqlens: list[list[int]]) -> Tensor:
    """[B, 1, S, S]: causal within each document."""
    length = cu_seqlens[0][-1]
    visible = torch.zeros(len(cu_seqlens), 1, length, length, dtype=torch.bool)
    for sample, ends in enumerate(cu_seqlens):
        for begin, end in pairwise(ends):
            visible[sample, 0, begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
    return visible


def attend(topology: CPTopology, batch: PackedBatch) -> Result:
    """The whole batch's results, each rank having given its shards."""
    whole = inputs(batch)

    def on_rank(attention: ContextParallelAttention, rank: int) -> list[Tensor]:
        q, k, v, dout = (batch.shard(x, rank, dim=2) for x in whole)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = attention.with_lse(*leaves, plan=batch.plan)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]

    shards = run_virtually(case_on(topology, heads=4 // topology.ulysses), on_rank)
    return Result(*(batch.restore(each, dim=2) for each in zip(*shards, strict=True)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_packed_documents_of_each_sample_equal_dense_attention(algorithm):
    exact = dense_attention(*inputs(BATCH), visible=visible_of(CU_SEQLENS))
    assert_equal_to(exact, attend(ALGORITHMS[algorithm], BATCH))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ranks_without_tokens_take_part(algorithm):
    batch = PackedBatch.from_cu_seqlens([0, 3, 10], 4, layout="contiguous", tokens=(0, 7, 0, 3))
    visible = visible_of([[0, 3, 10]]).expand(2, -1, -1, -1)
    assert_equal_to(dense_attention(*inputs(batch), visible=visible), attend(ALGORITHMS[algorithm], batch))


def errors(batch_of: Callable[[int], PackedBatch], change: Callable[[Tensor, int], Tensor] = lambda x, rank: x) -> set:
    """What ranks of a ring raise, each with its plan."""

    def on_rank(attention: ContextParallelAttention, rank: int) -> str:
        batch = batch_of(rank)
        x = torch.zeros(2, 4, batch.layout.num_tokens(min(rank, batch.layout.num_ranks - 1)), 8, dtype=torch.float64)
        x = change(x, rank)
        with pytest.raises(ValueError) as error:
            attention(x, x, x, plan=batch.plan)
        return str(error.value)

    return set(run_virtually(case_on(ALGORITHMS["ring"]), on_rank))


def test_plans_that_differ_between_ranks_are_refused_on_all_of_them():
    other = PackedBatch.from_cu_seqlens([[0, 8, 30, 33, 50], [0, 21, 22, 49, 50]], 4)
    (message,) = errors(lambda rank: other if rank == 2 else BATCH)
    assert re.search(
        r"ranks 0 to 1, 3: .* a plan of 50 tokens on 4 ranks \(\w{16}\).*; rank 2: .* a plan of 50", message
    )


@pytest.mark.parametrize(
    ("batch", "change", "message"),
    [
        (
            PackedBatch.from_cu_seqlens([0, 50], 3),
            lambda x, rank: x,
            "the plan deals q to 3 ranks, and the context-parallel group has 4; make it for 4.",
        ),
        (
            BATCH,
            lambda x, rank: x[:, :, 1:] if rank == 1 else x,
            "has 12 tokens, and the plan has 13 on rank 1; shard by the plan's own layout, for this rank.",
        ),
        (
            BATCH,
            lambda x, rank: x[:1],
            "has 1 samples, and the plan has documents for 2; give the batch that it was made for.",
        ),
        (
            BATCH,
            lambda x, rank: torch.cat([x, x[:1]]),
            "has 3 samples, and the plan has documents for 2; give the batch that it was made for.",
        ),
    ],
    ids=["of another world", "of another shard", "of a smaller batch", "of a larger batch"],
)
def test_tensors_that_do_not_fit_the_plan_are_refused_on_all_ranks(batch, change, message):
    (said,) = errors(lambda rank: batch, change)
    assert message in said


def test_a_mask_beside_a_plan_is_refused():
    attention = build_attention(ContextParallelConfig(attention_mask_type="general"))
    plan: AttentionPlan = PackedBatch.from_cu_seqlens([0, 4], 1).plan
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="a call with a plan takes no mask tensor"):
        attention(x, x, x, plan=plan, visible=torch.ones(4, 4, dtype=torch.bool))


def test_a_batch_in_the_place_of_its_plan_is_refused_with_the_way_out():
    attention, batch = build_attention(ContextParallelConfig()), PackedBatch.from_cu_seqlens([0, 4], 1)
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"plan is a PackedBatch; give plan=batch\.plan\."):
        attention(x, x, x, plan=batch)
    with pytest.raises(ValueError, match=r"plan is a str; give an AttentionPlan\."):
        attention(x, x, x, plan="causal")


def test_a_second_derivative_is_refused_and_not_left_out():
    attention = build_attention(ContextParallelConfig())
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with pytest.raises(RuntimeError, match="the gradient of attention has none of its own; leave out"):
        torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    (gradient,) = torch.autograd.grad(attention(q, k, v).sum(), q)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("method", ["__call__", "with_lse", "with_largest"])
def test_a_call_is_one_operator_in_the_graph_of_a_compiled_function(method):
    attention = build_attention(ContextParallelConfig())
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    inside = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> object:
        return getattr(attention, method)(q, k, v)

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        inside.extend(str(node.target) for node in graph.graph.nodes if "mindspeed_cp" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    compiled, plain = torch.compile(attend, backend=backend, fullgraph=True)(q, k, v), attend(q, k, v)
    torch.testing.assert_close(compiled, plain)
    assert inside == ["mindspeed_cp.attention"]
