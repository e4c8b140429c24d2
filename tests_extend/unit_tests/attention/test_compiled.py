"""Attention in torch.compile(fullgraph=True): what the eager call gives, in one graph for every plan."""

import copy
import gc
import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mindspeed_cp.attention import AttentionTerms, build_attention
from mindspeed_cp.attention.operators import num_kept
from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.handles import owner_of, with_handle
from mindspeed_cp.plan import AttentionPlan, Band
from mindspeed_cp.sharding import SequenceLayout
from mindspeed_cp.testing.rank_pool import LIMIT_S
from mindspeed_cp.topology import CPTopology
from unit_tests.attention.test_recomputation import Rank
from unit_tests.call_cases import ALGORITHMS
from unit_tests.compiled_cases import DOCUMENTS, Graphs, Layer, Results, Step, both, on_virtual_ranks, over_gloo
from unit_tests.pairwise import pairwise
from unit_tests.ring_cases import case_on
from unit_tests.ulysses_cases import Case


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_the_same(results: list[Results], rtol: float = 1e-12, atol: float = 1e-12) -> None:
    for plain, compiled in results:
        for actual, expected in zip(compiled, plain, strict=True):
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_stride=False)


def case_of(name: str, **options: object) -> Case:
    degree = ALGORITHMS[name].ulysses
    return case_on(ALGORITHMS[name], heads=4 // degree, **options)


def test_one_graph_serves_every_plan_and_every_algorithm_of_a_kind():
    layer, graphs = Layer(), Graphs()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    counts = []
    for name in ("ulysses", "hybrid", "ring", "double ring"):
        for documents in DOCUMENTS:
            assert_the_same(on_virtual_ranks(case_of(name), layer, compiled, Step(documents)))
            counts.append(len(graphs.operators))
    first, ring = counts[0], counts[4]
    # Ranks that come at the same time may each compile it.
    assert counts == [first] * 4 + [ring] * 4 and first <= 4 and ring <= 8
    assert all(operators == ["mindspeed_cp.attention"] for operators in graphs.operators)
    assert num_kept() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    pairwise(
        {
            "algorithm": list(ALGORITHMS),
            "told": [(), ("sinks", "softcap"), ("slopes", "dropout"), ("off by one",)],
            "wanted": ["__call__", "with_lse", "with_largest"],
            "plan": [Step(), Step(DOCUMENTS[1]), Step(DOCUMENTS[0], "balanced", (6, 0))],
            "biased": [False, True],
            "scale": [None, -0.3],
            "kept": [None, "full", "half"],
        }
    ),
    ids=lambda row: f"{row['algorithm']}, {', '.join(row['told'])}, {row['wanted']}",
)
def test_a_compiled_call_is_the_eager_one(row):
    kept = row["kept"] if row["algorithm"] != "ulysses" else None
    layer = Layer(told=row["told"], wanted=row["wanted"], scale=row["scale"])
    compiled = torch.compile(layer, backend=Graphs(), fullgraph=True)
    step = replace(row["plan"], biased=row["biased"])
    assert_the_same(on_virtual_ranks(case_of(row["algorithm"], kv_cache_policy=kept), layer, compiled, step))
    assert num_kept() == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ulysses", "ring", "hybrid", "double ring"])
def test_every_dtype_is_compiled_and_deterministic_where_that_is_asked_for(name):
    layer = Layer()
    compiled = torch.compile(layer, backend=Graphs(), fullgraph=True)
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):  # The others test fp64.
            torch._dynamo.reset()  # There is a limit to what one function is compiled for.
            step = Step(DOCUMENTS[1], dtype=dtype)
            first, second = (on_virtual_ranks(case_of(name), layer, compiled, step) for _ in range(2))
            assert_the_same(first, 0.0, 0.0)
            again = zip(first, second, strict=True)
            assert all(map(torch.equal, one, other) for a, b in again for one, other in [(a.compiled, b.compiled)])
    finally:
        torch.use_deterministic_algorithms(False)


def test_numbers_that_change_from_step_to_step_are_compiled_for_twice_at_most():
    layer, graphs = Layer(told=("dropout",)), Graphs()
    compiled, attention = torch.compile(layer, backend=graphs, fullgraph=True), build_attention(ContextParallelConfig())
    for micro_batch, length in enumerate((24, 30, 18, 42)):
        plan, x, _ = Step([0, 7, length], length=length).on(0, 1, layer)
        assert_the_same([both(layer, compiled, attention, plan, x, None, micro_batch)])
    assert len(graphs.operators) == 2


def save_attention(_: object, function: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    ours = function is torch.ops.mindspeed_cp.attention.default
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("name", ["ulysses", "ring"])
def test_a_policy_that_names_the_operator_keeps_a_recomputed_layer_from_sending(name):
    case = case_on(ALGORITHMS[name], tokens=4, head_size=4, value_head_size=4)
    contexts = partial(create_selective_checkpoint_contexts, save_attention)

    def on_rank(rank: int, around: bool) -> tuple[int, list[Tensor]]:
        here = Rank(case, world, rank, None)
        block = here.block(lambda sinks: AttentionTerms(sinks=sinks))
        x = here.inputs[0]
        out = checkpoint(block, x, use_reentrant=False, context_fn=contexts) if around else block(x)
        found = torch.autograd.grad(out.square().sum(), (x, here.weight, here.sinks))
        return here.sent, list(found)

    world = VirtualWorld(case.size, LIMIT_S)
    plain, kept = world.run(partial(on_rank, around=False)), world.run(partial(on_rank, around=True))
    for (sent, gradients), (sent_again, with_policy) in zip(plain, kept, strict=True):
        assert sent_again == sent
        torch.testing.assert_close(with_policy, gradients, rtol=1e-12, atol=1e-12)
    gc.collect()
    assert num_kept() == 0


def test_a_policy_takes_a_plan_that_no_compiled_function_was_told_of():
    x = torch.randn(1, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    shards, attention = SequenceLayout(size=1).of(6), build_attention(ContextParallelConfig())
    contexts = partial(create_selective_checkpoint_contexts, save_attention)
    found = []
    for around in (partial(checkpoint, use_reentrant=False, context_fn=contexts), lambda block, x: block(x)):
        plan = AttentionPlan(shards, shards, (Band(2, 0),))
        out = around(lambda x, plan=plan: attention(x.sin(), x, x, plan=plan).cos(), x)
        found.append(torch.autograd.grad(out.sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def called(x: Tensor, plan: AttentionPlan | None = None) -> Tensor:
    out: Tensor = torch.compile(build_attention(ContextParallelConfig()), backend="aot_eager", fullgraph=True)(
        x, x, x, plan=plan
    )
    return out


def test_a_forward_pass_is_kept_for_as_long_as_its_graph():
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    before = num_kept()
    out = called(x)
    assert num_kept() == before + 1
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert num_kept() == before
    out = called(x)
    del out
    assert num_kept() == before
    with torch.no_grad():
        called(x)
    assert num_kept() == before


def test_what_a_policy_has_kept_goes_with_a_graph_that_is_dropped():
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    attention, before = build_attention(ContextParallelConfig()), num_kept()
    contexts = partial(create_selective_checkpoint_contexts, save_attention)
    out = checkpoint(lambda x: attention(x.sin(), x, x).cos(), x, use_reentrant=False, context_fn=contexts)
    assert num_kept() == before + 1
    del out
    gc.collect()
    assert num_kept() == before


def test_a_second_derivative_of_the_operator_is_refused():
    x = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    attention = build_attention(ContextParallelConfig())
    contexts = partial(create_selective_checkpoint_contexts, save_attention)
    out = checkpoint(lambda x: attention(x, x, x), x, use_reentrant=False, context_fn=contexts)
    with pytest.raises(RuntimeError, match="the gradient of attention has none of its own; leave out"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_a_batch_that_was_copied_or_unpickled_has_a_plan_of_its_own():
    x = torch.randn(1, 2, 9, 8)
    batch = PackedBatch.from_cu_seqlens([0, 4, 9], 1)
    expected = called(x, batch.plan)
    for other in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert not torch.equal(other.plan.handle, batch.plan.handle)
        torch.testing.assert_close(called(x, other.plan), expected)


def test_a_plan_without_a_handle_is_refused_with_the_way_out():
    batch, x = PackedBatch.from_cu_seqlens([0, 4, 9], 1), torch.randn(1, 2, 9, 8)
    plan = AttentionPlan(batch.layout, batch.layout)
    with pytest.raises(Exception, match=r"an AttentionPlan without a handle; give plan=batch\.plan"):
        called(x, plan)
    torch.testing.assert_close(called(x, with_handle(plan)), called(x, batch.plan))


def test_a_handle_of_another_process_is_none_of_this_one():
    with pytest.raises(RuntimeError, match="the handle of an attention or a plan that is not in this process"):
        owner_of(torch.tensor(7))


@pytest.mark.slow
def test_inductor_over_processes_gives_what_the_eager_call_gives(gloo):
    for topology in (CPTopology(ulysses=2), CPTopology(inner=2)):
        case = case_on(topology, heads=4 // topology.ulysses)
        for results, num_graphs in gloo.run_on_all(2, over_gloo, case, Layer(), "inductor"):
            assert_the_same(results)
            assert num_graphs == 1
