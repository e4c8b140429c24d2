"""Partial states: their algebra, and their reduction over ranks."""

import functools
from itertools import pairwise

import pytest
import torch

from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import (
    State,
    all_reduce_state,
    attention_state,
    chunked_attention,
    merge_state,
    merge_states,
    reduce_scatter_state,
    shared_prefix_attention,
)
from mindspeed_cp.inference.chunks import Shared
from mindspeed_cp.inference.sequences import Spans
from mindspeed_cp.plan import CAUSAL, AttentionPlan
from unit_tests.dense import causal_mask, dense_attention

LN2 = torch.log(torch.tensor(2.0, dtype=torch.float64))


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(num_queries, num_keys, batch=2, heads=4, kv_heads=2):
    return normal(batch, heads, num_queries, 8), *(normal(batch, kv_heads, num_keys, 8, seed=n) for n in (1, 2))


def exact(q, k, v, visible=None):
    return State(*dense_attention(q, k, v, torch.zeros_like(q), visible=visible)[:2])


def assert_equal(found, expected, tolerance=1e-12):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def parts_of(num_keys, cuts):
    """The states of the parts of some keys, and that of all of them."""
    q, k, v = tensors(5, num_keys)
    parts = [slice(*ends) for ends in pairwise((0, *cuts, num_keys))]
    return [attention_state(q, k[:, :, part], v[:, :, part]) for part in parts], exact(q, k, v)


@pytest.mark.parametrize("lse_base", ["e", "2"])
@pytest.mark.parametrize("stacked", [True, False])
def test_states_of_parts_merge_to_the_state_of_all(lse_base, stacked):
    states, whole = parts_of(30, (0, 1, 11, 11))
    if lse_base == "2":
        states, whole = ([State(out, lse / LN2) for out, lse in each] for each in (states, [whole]))
        (whole,) = whole
    outs, lses = zip(*states, strict=True)
    if stacked:
        merged = merge_states(torch.stack(outs, 1), torch.stack(lses, 1), dim=1, lse_base=lse_base)
    else:
        merged = merge_states(outs, lses, lse_base=lse_base)
    assert_equal(merged, whole)


def test_order_and_grouping_of_merges_are_free():
    (a, b, c), whole = parts_of(9, (2, 7))
    assert_equal(merge_state(*merge_state(*c, *a), *b), whole)
    assert_equal(merge_state(*c, *merge_state(*b, *a)), whole)


@pytest.mark.parametrize("lse", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("out", [torch.nan, torch.inf, 7.0])
def test_what_a_kernel_leaves_for_no_keys_changes_nothing(out, lse):
    (state,), _ = parts_of(4, ())
    empty = State(torch.full_like(state.out, out), torch.full_like(state.lse, lse))
    assert_equal(merge_state(*empty, *state), state)
    nothing = State(torch.zeros_like(state.out), torch.full_like(state.lse, -torch.inf))
    assert_equal(merge_state(*empty, *empty), nothing)


SCATTERED = functools.partial(reduce_scatter_state, dim=1)


@pytest.mark.parametrize(
    ("reduced", "backend"),
    [(all_reduce_state, "a2a"), (all_reduce_state, "all_reduce"), (SCATTERED, "a2a"), (SCATTERED, "ag_rs")],
)
def test_ranks_without_keys_change_nothing_whatever_their_kernel_leaves(reduced, backend):
    (state,), _ = parts_of(4, ())
    empty = State(torch.full_like(state.out, torch.nan), torch.full_like(state.lse, torch.nan))
    nothing = State(torch.zeros_like(state.out), torch.full_like(state.lse, -torch.inf))
    for held, expected in (({1: state}, state), ({}, nothing)):
        found = on_ranks(4, lambda rank, group, held=held: reduced(*held.get(rank, empty), group, backend=backend))
        whole = found[0] if reduced is all_reduce_state else [torch.cat(each, 1) for each in zip(*found, strict=True)]
        assert_equal(whole, expected)


def test_merging_has_the_gradients_of_attention_over_all_keys():
    outs, lses = normal(3, 2, 5, 4).requires_grad_(), normal(3, 2, 5, seed=3)
    lses[1] = -torch.inf
    lses[:, 0, 0] = -torch.inf
    lses.requires_grad_()
    live = lses.detach().isfinite()

    def merged(outs, finite):
        out, lse = merge_states(outs, torch.where(live, finite, lses.detach()))
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(merged, (outs, normal(3, 2, 5, seed=4).requires_grad_()))
    out, lse = merge_states(outs, lses)
    gradients = torch.autograd.grad(out.sum() + lse.masked_fill(lse.isinf(), 0.0).sum(), (outs, lses))
    assert all(each.isfinite().all() for each in gradients)


def test_states_of_bf16_are_merged_in_fp32():
    merged = merge_state(*(x.to(torch.bfloat16) for x in (*exact(*tensors(2, 3)), *exact(*tensors(2, 3)))))
    assert {x.dtype for x in merged} == {torch.float32}


def on_ranks(size, function):
    """What it gives on each virtual rank."""
    world = VirtualWorld(size, 20.0)
    return world.run(lambda rank: function(rank, VirtualCommunicator(world, range(size), rank, "states")))


@pytest.mark.parametrize(
    ("reduced", "backend"),
    [(all_reduce_state, "a2a"), (all_reduce_state, "all_reduce"), (SCATTERED, "a2a"), (SCATTERED, "ag_rs")],
)
@pytest.mark.parametrize("size", [1, 2])
def test_reductions_know_both_logarithms_and_have_no_gradients(reduced, backend, size):
    """What comes from others has none: half of a gradient would be wrong, without a word."""
    q, k, v = tensors(3, 4 * size)

    def base_2(rank, group):
        keys = slice(4 * rank, 4 * rank + 4)
        out, lse = attention_state(q, k[:, :, keys], v[:, :, keys])
        return reduced(out.requires_grad_(), lse / LN2, group, backend=backend, lse_base="2")

    found = on_ranks(size, base_2)
    out, lse = found[0] if reduced is all_reduce_state else (torch.cat(each, 1) for each in zip(*found, strict=True))
    assert_equal((out, lse * LN2), exact(q, k, v))
    assert not any(x.requires_grad for state in found for x in state)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("backend", ["a2a", "all_reduce"])
def test_all_reduce_gives_every_rank_the_same_bits_of_attention_over_all_keys(size, backend):
    q, k, v = tensors(3, 4 * size)
    k = 30 * k  # Weights that differ by many orders of magnitude.

    def reduced(rank, group):
        keys = slice(4 * rank, 4 * rank + 4)
        return all_reduce_state(*attention_state(q, k[:, :, keys], v[:, :, keys]), group, backend=backend)

    found = on_ranks(size, reduced)
    assert_equal(found[0], exact(q, k, v))
    assert all(torch.equal(one, other) for state in found for one, other in zip(state, found[0], strict=True))


@pytest.mark.parametrize(
    ("dim", "sizes", "backend"),
    [(1, None, "a2a"), (1, None, "ag_rs"), (0, None, "ag_rs"), (0, [1, 3], "a2a"), (2, [5, 0], "a2a")],
)
def test_reduce_scatter_gives_each_rank_its_share_of_the_queries(dim, sizes, backend):
    q, k, v = tensors(5, 8, batch=4)

    def scattered(rank, group):
        keys = slice(4 * rank, 4 * rank + 4)
        state = attention_state(q, k[:, :, keys], v[:, :, keys])
        return reduce_scatter_state(*state, group, dim=dim, sizes=sizes, backend=backend)

    found = on_ranks(2, scattered)
    assert [state.lse.size(dim) for state in found] == (sizes or [q.size(dim) // 2] * 2)
    assert_equal([torch.cat(each, dim) for each in zip(*found, strict=True)], exact(q, k, v))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda out, lse, group: merge_states((out,), (lse,), lse_base="10"), "lse_base='10' is none; give 'e' or '2'"),
        (lambda out, lse, group: merge_state(out, lse[0], out, lse[0]), "lse is as out without its last dim"),
        (lambda out, lse, group: merge_states((out, out[:1]), (lse, lse)), r"outs are of shapes .* of one shape"),
        (lambda out, lse, group: merge_states((), ()), "outs are of shapes .*: give outs and lses"),
        (lambda out, lse, group: merge_states(out, [lse]), "outs are a tensor: give outs and lses both stacked"),
        (lambda out, lse, group: merge_states(out, lse, dim=3), "no dim 3; give one from -3 to 2"),
        (lambda out, lse, group: reduce_scatter_state(out, lse, group, dim=3), "no dim 3; give one from -3 to 2"),
        (lambda out, lse, group: reduce_scatter_state(out, lse, group, dim=1, sizes=[5, -1]), "do not share out 4"),
        (lambda out, lse, group: all_reduce_state(out, lse, group, backend="tree"), "give 'a2a' or 'all_reduce'"),
        (lambda out, lse, group: reduce_scatter_state(out, lse, group, dim=2), "no 2 equal shares; give sizes"),
        (lambda out, lse, group: reduce_scatter_state(out, lse, group, dim=1, sizes=[1, 1]), "do not share out 4"),
        (
            lambda out, lse, group: reduce_scatter_state(out, lse, group, dim=1, sizes=[1, 3], backend="ag_rs"),
            "use backend='a2a'",
        ),
    ],
)
def test_states_that_do_not_fit_are_refused(call, sentence):
    out, lse = exact(*tensors(3, 3))
    with pytest.raises(ValueError, match=sentence):
        on_ranks(2, lambda rank, group: call(out, lse, group))


# What they are good for on one rank.


@pytest.mark.parametrize(("num_queries", "chunk"), [(12, 5), (3, 4), (1, 100)])
def test_chunked_attention_is_attention(num_queries, chunk):
    q, k, v = tensors(num_queries, 12)
    assert_equal(chunked_attention(q, k, v, chunk=chunk), exact(q, k, v, causal_mask(12)[-num_queries:]))
    assert_equal(chunked_attention(q, k, v, chunk=chunk, causal=False), exact(q, k, v))


def test_chunks_of_no_keys_are_refused():
    q, k, v = tensors(3, 3)
    for chunk in 0, -1:
        with pytest.raises(ValueError, match=f"chunk={chunk} keys at a time: give 1 or more"):
            chunked_attention(q, k, v, chunk=chunk)


def test_shared_prefixes_of_several_levels_are_attention_over_all_of_them():
    q, k, v = tensors(3, 5, batch=4)
    levels = [Shared(normal(groups, 2, 6, 8, seed=7), normal(groups, 2, 6, 8, seed=8)) for groups in (1, 2)]
    repeated = [[x.repeat_interleave(4 // x.size(0), 0) for x in level] for level in levels]
    whole = [torch.cat([*each, own], dim=2) for *each, own in zip(*repeated, (k, v), strict=True)]
    visible = torch.ones(3, 17, dtype=torch.bool).tril(14)
    assert_equal(shared_prefix_attention(q, k, v, levels), exact(q, *whole, visible))
    with pytest.raises(ValueError, match="3 shared prefixes for 4 sequences"):
        shared_prefix_attention(q, k, v, [Shared(k[:3], v[:3])])


def test_shared_prefixes_of_other_values_are_refused():
    q, k, v = tensors(3, 5)
    with pytest.raises(ValueError, match="outs are of shapes"):
        shared_prefix_attention(q, k, v, [Shared(k[:1], v[:1, ..., :4])])


def test_queries_before_all_keys_have_no_state():
    q, k, v = tensors(4, 4)
    plan = AttentionPlan(Spans(((((0, 4),),),)), Spans(((((2, 6),),),)), CAUSAL)
    out, lse = attention_state(q, k, v, plan=plan)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2])) and lse[:, :, :2].isneginf().all()
    assert_equal(State(out[:, :, 2:], lse[:, :, 2:]), exact(q[:, :, 2:], k, v, causal_mask(4)[:2]))
