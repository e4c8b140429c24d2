"""Ulysses against dense attention, over virtual and gloo ranks: results, gradients, messages and refusals."""

import itertools

import pytest
import torch

from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.topology import CPTopology
from unit_tests import ulysses_cases as cases
from unit_tests.dense import Result, assert_as_accurate_as, assert_equal_to, causal_mask, dense_attention
from unit_tests.ring_cases import attend_virtually
from unit_tests.ulysses_cases import Case, Shapes

SIZES = (1, 2, 3, 4, 5, 6, 8)

HEADS = {
    "mha": dict(heads=2, kv_heads=2),
    "gqa": dict(heads=4, kv_heads=2, batch=2),
    "mqa_permuted": dict(heads=3, kv_heads=1, batch=2, memory="SBND"),
    "value_head_size": dict(heads=2, kv_heads=1, value_head_size=12),
    "dims_reversed": dict(heads=2, kv_heads=2, batch=2, memory="DSNB"),
}
"""MQA is one K/V head a rank."""

MASKS = ("causal", "full", "2d", "per batch", "per head")
LAYOUTS = ("zigzag", "contiguous")


def heads_in_turn(number: int) -> str:
    """One entry of HEADS after the other: in a table, beside each value of each of its axes."""
    return list(HEADS)[number % len(HEADS)]


VIRTUAL = [
    (size, mask, layout, heads_in_turn(i + j + k))
    for (i, size), (j, mask), (k, layout) in itertools.product(enumerate(SIZES), enumerate(MASKS), enumerate(LAYOUTS))
]
GLOO = [
    (size, MASKS[(i + 2 * k) % len(MASKS)], layout, heads_in_turn(2 * i + k))
    for (i, size), (k, layout) in itertools.product(enumerate(SIZES), enumerate(LAYOUTS))
]


def dense(case: Case, dtype: torch.dtype) -> Result:
    """The oracle's results for the case's inputs, computed in `dtype`."""
    q, k, v, dout, visible = cases.inputs(case)
    if case.mask == "causal":
        visible = causal_mask(q.size(2))
    return dense_attention(*(x.to(dtype) for x in (q, k, v, dout)), visible=visible)


@pytest.mark.parametrize(("size", "mask", "layout", "heads"), VIRTUAL)
def test_ulysses_on_virtual_ranks_equals_dense_attention(size, mask, layout, heads):
    case = Case(size=size, mask=mask, layout=layout, **HEADS[heads])
    assert_equal_to(dense(case, torch.float64), cases.restored(case, attend_virtually(case)))


@pytest.mark.parametrize(("size", "mask", "layout", "heads"), GLOO)
def test_ulysses_on_gloo_ranks_equals_dense_attention(gloo, size, mask, layout, heads):
    case = Case(size=size, mask=mask, layout=layout, **HEADS[heads])
    assert_equal_to(dense(case, torch.float64), cases.restored(case, gloo.run(size, cases.attend, case)))


def test_comparison_with_dense_attention_sees_a_wrong_chunk_order(gloo):
    case = Case(size=3)
    right = [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]  # Member and which of its chunks.
    wrong = [*right[:4], right[5], right[4]]
    exact = dense(case, torch.float64)
    assert_equal_to(exact, cases.restored(case, gloo.run(3, cases.attend_with_chunk_order, case, right)))
    with pytest.raises(AssertionError, match="out: "):
        assert_equal_to(exact, cases.restored(case, gloo.run(3, cases.attend_with_chunk_order, case, wrong)))


@pytest.mark.parametrize("ranks", [[1, 3], [0, 2, 5], [4, 5, 6, 7]])
def test_ulysses_equals_dense_attention_in_any_group_of_ranks(gloo, ranks):
    case = Case(size=len(ranks), mask="per head", heads=2)
    assert_equal_to(dense(case, torch.float64), cases.restored(case, gloo.run(ranks, cases.attend, case)))


def test_attention_without_a_group_spans_all_ranks(gloo):
    case = Case(size=8)
    shards = gloo.run(8, cases.attend_in_default_group, case)
    assert_equal_to(dense(case, torch.float64), cases.restored(case, shards))


def test_attention_takes_groups_built_beforehand(gloo):
    case = Case(size=2)
    shards = gloo.run([2, 6], cases.attend_in_built_groups, case)
    assert_equal_to(dense(case, torch.float64), cases.restored(case, shards))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "mask"), [(2, "per head"), (8, "causal")])
def test_ulysses_is_as_accurate_as_dense_attention_of_the_same_dtype(size, mask, dtype):
    case = Case(size=size, mask=mask, heads=2, tokens=64 // size, head_size=32, value_head_size=32, dtype=dtype)
    result = cases.restored(case, attend_virtually(case))
    assert {x.dtype for x in result} == {dtype}
    assert_as_accurate_as(dense(case, dtype), dense(case, torch.float64), result)


@pytest.mark.parametrize(
    ("size", "heads", "dtype"),
    [
        (2, "gqa", torch.float64),
        (3, "mqa_permuted", torch.bfloat16),
        (8, "value_head_size", torch.float64),
        (8, "mha", torch.bfloat16),
    ],
)
def test_ulysses_sends_exactly_the_formulas_bytes_in_two_all_to_alls_a_pass(gloo, size, heads, dtype):
    case = Case(size=size, mask="full", dtype=dtype, **HEADS[heads])
    sent = cases.Sent(calls=2, bytes=case.formula_bytes)
    one_pass = cases.Count(library=sent, backend=sent.bytes)
    assert gloo.run(size, cases.count_sent, case) == [(one_pass, one_pass)] * size


def test_attention_on_one_rank_sends_nothing(gloo):
    nothing = cases.Count(library=cases.Sent(0, 0), backend=0)
    assert gloo.run(1, cases.count_sent, Case(size=1)) == [(nothing, nothing)]


@pytest.mark.parametrize("mask", ["causal", "per head"])
def test_two_runs_give_the_same_bits(gloo, mask):
    case = Case(size=4, mask=mask, heads=2, head_size=32, value_head_size=32, tokens=16, dtype=torch.bfloat16)
    for first, second in gloo.run(4, cases.attend_twice, case):
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def causal(size: int) -> ContextParallelConfig:
    return ContextParallelConfig(context_parallel_size=size)


def general(size: int) -> ContextParallelConfig:
    return ContextParallelConfig(context_parallel_size=size, attention_mask_type="general")


def shapes(q: tuple[int, int, int, int] = (1, 2, 4, 8), **changed: object) -> Shapes:
    return Shapes(**{"q": q, "k": q, "v": q} | changed)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (
            causal(2),
            shapes((1, 1, 4, 8)),
            "ValueError: q has 1 heads, and the Ulysses degree is 2: each rank wants one at least; use a degree of 1 "
            "or less, or a ring.",
        ),
        (
            causal(2),
            shapes((1, 2, 3, 8)),
            "ValueError: 3 tokens a rank are not a multiple of the 2 chunks it holds; give 4, or "
            "plan=PackedBatch.from_cu_seqlens(...).plan for any number.",
        ),
        (
            causal(2),
            shapes(visible=(4, 8)),
            "ValueError: a causal attention takes no mask tensor: it would be one of the two; build it with "
            "attention_mask_type='general' to use the tensor.",
        ),
    ],
    ids=["query heads", "tokens", "causal and mask"],
)
def test_attention_refuses(gloo, config, given, message):
    assert gloo.run(2, cases.call_error, config, given) == [message] * 2


@pytest.mark.parametrize(
    ("config", "given", "fault"),
    [
        (general(2), shapes(k=(1, 2, 2, 8), v=(1, 2, 2, 8)), "4 tokens and its k 2"),
        (general(2), shapes((2, 2, 4, 8), k=(1, 2, 4, 8), v=(1, 2, 4, 8)), "batch"),
        (general(2), shapes(k=(1, 2, 4, 4)), "head size"),
        (general(2), shapes((1, 2, 4, 8), kv_dtype=torch.float32), "dtype"),
        (general(2), shapes((1, 4, 4, 8), visible=(1, 2, 4, 8)), "mask"),
        (general(2), shapes(visible=(4, 7)), "mask"),
        (general(2), shapes(visible=(2, 8)), "mask"),
    ],
    ids=["tokens", "batch", "head size", "dtype", "heads of the mask", "keys of the mask", "queries of the mask"],
)
def test_attention_refuses_tensors_that_do_not_fit_together(gloo, config, given, fault):
    for message in gloo.run(2, cases.call_error, config, given):
        assert message.startswith("ValueError: ")
        assert fault in message


def test_attention_refuses_a_group_of_another_size(gloo):
    message = (
        "ValueError: the context-parallel group has 2 ranks and the configured topology 4: configure mindspeed_cp and "
        "initialize_model_parallel with the same context_parallel_size."
    )
    assert gloo.run(2, cases.build_error, causal(4)) == [message] * 2


@pytest.mark.parametrize(("size", "built"), [(1, None), (4, CPTopology(ulysses=2))], ids=["size 1", "built groups"])
def test_attention_refuses_a_group_of_another_size_also_for(gloo, size, built):
    refusal = f"ValueError: the context-parallel group has 2 ranks and the configured topology {size}"
    for message in gloo.run(2, cases.build_error, causal(size), built):
        assert message.startswith(refusal)
