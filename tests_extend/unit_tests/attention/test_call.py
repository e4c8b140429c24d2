"""What comes before any message: arguments put in order, refused in one line, and compared with the other ranks'."""

import dataclasses
import inspect
import re
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mindspeed_cp.attention import AttentionTerms, Latent, LatentHeads, build_attention
from mindspeed_cp.config import ContextParallelConfig
from unit_tests import call_cases as cases
from unit_tests.call_cases import ALGORITHMS, HYBRID, RING, ULYSSES, Call, plain_call, plain_case
from unit_tests.dense import assert_equal_to, causal_mask, dense_attention
from unit_tests.ulysses_cases import Case, forward_and_backward, inputs, restored

# Ranks that differ.


def with_lengths(case: Case, *lengths: int) -> list[Call]:
    return [plain_call(dataclasses.replace(case, tokens=length)) for length in lengths]


def odd_one(case: Case, **changes: object) -> list[Call]:
    """All ranks come alike but rank 2."""
    calls = [plain_call(case) for _ in range(case.size)]
    calls[2] = calls[2]._replace(**changes)
    return calls


@pytest.mark.parametrize("topology", ALGORITHMS.values(), ids=ALGORITHMS)
def test_shards_of_other_lengths_are_one_error_on_every_rank_that_names_all_lengths(topology):
    case = plain_case(topology)
    errors = cases.virtual_errors(case, with_lengths(case, 6, 6, 6, 4))
    assert len(set(errors)) == 1
    heads = topology.ulysses * case.heads
    assert f"ranks 0 to 2: q (1, {heads}, 6, 8)" in errors[0]
    assert f"rank 3: q (1, {heads}, 4, 8)" in errors[0]
    assert "pad to equal shards" in errors[0]
    assert "\n" not in errors[0]


HEADS_OF_HYBRID = 4
Q = torch.zeros(1, HEADS_OF_HYBRID, 6, 8)


@pytest.mark.parametrize(
    ("changes", "theirs", "its"),
    [
        (dict(q=Q.half(), k=Q.half(), v=Q.half()), "float32", "float16"),
        (dict(q=Q.reshape(6, 4, 1, 8), k=Q.reshape(6, 4, 1, 8), v=Q.reshape(6, 4, 1, 8)), "(1, 4, 6, 8)", "1 tokens"),
        (
            dict(q=Q.reshape(3, 4, 2, 8), k=Q.reshape(3, 4, 2, 8), v=Q.reshape(3, 4, 2, 8)),
            "(1, 4, 6, 8)",
            "(3, 4, 2, 8)",
        ),
        (
            dict(q=Q.reshape(1, 8, 6, 4), k=Q.reshape(1, 8, 6, 4), v=Q.reshape(1, 8, 6, 4)),
            "(1, 4, 6, 8)",
            "(1, 8, 6, 4)",
        ),
        (dict(visible=torch.ones(6, 24, dtype=torch.bool)), "no mask", "a mask (6, 24)"),
        (dict(scale=0.5), "scale 0.35", "scale 0.5"),
        (dict(q=Q.clone().requires_grad_()), "without gradients", "with gradients"),
        (dict(q=Q.int(), k=Q.int(), v=Q.int()), "q (1, 4, 6, 8)", "refused: "),
        (dict(scale=float("nan")), "scale 0.35", "refused: scale is nan"),
        (dict(scale=[1.0]), "scale 0.35", "refused: TypeError"),
        (dict(v=None), "no mask", "refused: AttributeError"),
        (dict(q=Q.to("meta"), k=Q.to("meta"), v=Q.to("meta")), "float32 on cpu", "float32 on meta"),
    ],
    ids=[
        *("dtype", "refused", "batch and tokens", "heads and size", "mask", "scale", "gradients", "integers", "nan"),
        *("type", "nothing", "device"),
    ],
)
def test_one_rank_that_comes_with_something_else_is_named_on_every_rank(changes, theirs, its):
    case = plain_case(HYBRID, mask="full")
    errors = cases.virtual_errors(case, odd_one(case, **changes))
    assert len(set(errors)) == 1
    everyone, one = re.search(r"ranks 0 to 1, 3: (.+); rank 2: (.+); all of them", errors[0]).groups()
    assert theirs in everyone
    assert its in one


def test_ranks_that_all_come_with_the_same_mistake_are_told_it_alone():
    case = plain_case(RING)
    calls = [plain_call(case)._replace(scale=float("inf")) for _ in range(4)]
    message = "scale is inf, and scores are computed up to 3.4e+38; give a finite number, or None for 1 / sqrt(8)."
    assert cases.virtual_errors(case, calls) == [message] * 4


def test_a_rank_that_left_out_a_layer_of_a_micro_batch_is_found_out_at_the_next_agreement():
    assert cases.errors_after_a_layer_is_left_out(plain_case(ULYSSES), culprit=1) == (
        ["ranks 0, 2 to 3: q", "rank 1: q", "call 3", "call 2"]
    )


def test_a_length_that_changes_within_a_micro_batch_on_one_rank_is_no_result_on_any(gloo, tmp_path):
    timeout = timedelta(seconds=3)
    errors = gloo.run_on_all(2, cases.change_length_in_a_micro_batch, plain_case(cases.CPTopology(inner=2)), timeout)
    assert all("RuntimeError" in error for error in errors), errors


def test_an_attention_pickled_within_a_micro_batch_agrees_again(gloo):
    assert gloo.run(2, cases.messages_after_pickling, plain_case(cases.CPTopology(ulysses=2))) == [
        2,
        2,
    ]


def test_groups_built_for_different_set_ups_are_one_error_on_every_rank(gloo):
    errors = gloo.run(2, cases.build_with_overlap_on_one_rank, cases.CPTopology(inner=2))
    assert len(set(errors)) == 1
    assert "overlap=False" in errors[0] and "overlap=True" in errors[0]


@pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters, reason="this torch orders the ranks of any group"
)
@pytest.mark.parametrize("topology", [HYBRID, cases.DOUBLE], ids=["hybrid", "double ring"])
def test_a_group_in_another_order_than_the_worlds_is_attended_in_its_own_order(gloo, topology):
    case = plain_case(topology, dtype=torch.float64, overlap=True)
    shards = gloo.run(8, cases.attend_in_an_unsorted_group, case, [2, 0, 3, 1])
    q, k, v, dout, _ = inputs(case)
    exact = dense_attention(q, k, v, dout, visible=causal_mask(q.size(2)))
    in_order = sorted((rank, shard) for rank, shard in shards if shard is not None)
    assert_equal_to(exact, restored(case, [shard for _, shard in in_order]))


@pytest.mark.parametrize("topology", [ULYSSES, HYBRID], ids=["ulysses", "hybrid"])
def test_a_length_that_changes_on_one_rank_at_the_second_batch_stops_that_batch_on_all_ranks_and_no_other(
    gloo, topology
):
    case = plain_case(topology)
    results = gloo.run_on_all(4, cases.change_length_at_the_second_batch, case, 1)
    for first, second, third in results:
        assert (first, third) == ("nothing", "nothing")
        assert "rank 1: q" in second
        assert second == results[0][1]


def test_agreement_costs_a_message_of_8_bytes_to_each_other_rank_for_each_call():
    assert cases.sent_to_agree(plain_case(RING), 3, once=False) == [(3 * 3, 3 * 3 * 8)] * 4


def test_layers_of_one_micro_batch_may_agree_once_for_all_of_them():
    assert cases.sent_to_agree(plain_case(RING), 3, once=True) == [(3, 3 * 8)] * 4


def test_megatrons_layers_agree_once_a_micro_batch_and_a_length_that_changes_in_the_second_stops_all_ranks():
    case = plain_case(RING)
    usual, changed = with_lengths(case, 6, 6, 6, 6), with_lengths(case, 6, 4, 6, 6)
    for first, second, third, sent in cases.errors_in_micro_batches(case, [usual, changed, usual]):
        assert first == third == "nothing then nothing"
        assert second.count("rank 1: q (1, 2, 4, 8)") == 2
        # To 3 others: one digest in the first and the third; in each layer of the second a digest and the words.
        assert sent == f"{3 * (1 + 2 * 2 + 1)} messages"


# Ranks that do not come.


@pytest.mark.parametrize(
    ("topology", "overlap", "phase", "named"),
    [
        (RING, True, "backward", {3: "ring rank 2", 1: "ring rank 2"}),
        (HYBRID, True, "forward", {0: "ring rank 1"}),
        (ULYSSES, False, "forward", dict.fromkeys((0, 1, 3), "rank 2 of the group")),
        (RING, False, "before", dict.fromkeys((0, 1, 3), "rank 2 of the group of 4 did not come to this call")),
    ],
    ids=["ring backward", "hybrid forward", "ulysses forward", "before a call"],
)
def test_a_rank_that_is_stopped_is_reported_within_the_groups_timeout(gloo, tmp_path, topology, overlap, phase, named):
    case, timeout = plain_case(topology, overlap=overlap), timedelta(seconds=3)
    errors = gloo.run_on_all(4, cases.stop_one, case, 2, phase, timeout, str(tmp_path), timeout_s=100.0)
    assert "nothing" not in errors
    for rank, name in named.items():
        assert name in errors[rank]


# Autocast.


def under_autocast(case: Case, dtype: torch.dtype) -> list[object]:
    def on_rank(attention, rank):
        with torch.autocast("cpu", dtype):
            return forward_and_backward(rank, case, attention)

    return cases.run_virtually(case, on_rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["causal", "2d"])
@pytest.mark.parametrize("topology", ALGORITHMS.values(), ids=ALGORITHMS)
def test_results_under_autocast_are_those_without_it_to_the_bit(topology, mask, dtype):
    case = plain_case(topology, mask=mask, dtype=dtype, overlap=True)
    for plain, autocast in zip(cases.attend(case), under_autocast(case, torch.bfloat16), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(plain, autocast, strict=True))


def test_mixed_types_under_autocast_are_cast_as_torchs_own_attention_casts_them():
    alone = build_attention(ContextParallelConfig())
    q, k, v, dout = (x.float() for x in inputs(Case(size=1, heads=2, kv_heads=2, tokens=16))[:4])
    exact = dense_attention(*(x.double() for x in (q, k, v, dout)), visible=causal_mask(16))
    q, k, v = q.requires_grad_(), k.requires_grad_(), v.bfloat16().requires_grad_()
    errors = []
    with torch.autocast("cpu", torch.bfloat16):
        for attend in (alone, lambda *x: F.scaled_dot_product_attention(*x, is_causal=True)):
            out = attend(q, k, v)
            gradients = torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))
            assert out.dtype == torch.bfloat16
            assert [x.dtype for x in gradients] == [torch.float32, torch.float32, torch.bfloat16]
            results = zip((out, *gradients), (exact.out, exact.dq, exact.dk, exact.dv), strict=True)
            errors.append([(x.double() - y).norm().item() for x, y in results])
    assert all(ours <= 1.1 * torchs for ours, torchs in zip(*errors, strict=True))


def test_mixed_types_without_autocast_are_refused_with_a_way_out():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"of dtypes .* cast them"):
        build_attention(ContextParallelConfig())(q, q, q.bfloat16())


# Arguments.


@pytest.mark.parametrize("scale", [0.0, -0.5, torch.tensor(0.25)], ids=["0", "below 0", "a tensor"])
@pytest.mark.parametrize("topology", ALGORITHMS.values(), ids=ALGORITHMS)
def test_any_finite_scale_is_exact(topology, scale):
    case = plain_case(topology, dtype=torch.float64)

    def on_rank(attention, rank):
        return forward_and_backward(rank, case, lambda q, k, v, visible: attention(q, k, v, scale=scale))

    shards = cases.run_virtually(case, on_rank)
    q, k, v, dout, _ = inputs(case)
    exact = dense_attention(q, k, v, dout, visible=causal_mask(q.size(2)), scale=float(scale))
    assert_equal_to(exact, restored(case, shards))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_0_weighs_all_keys_alike_in_every_kernel_of_the_cpu(dtype):
    q = torch.randn(1, 2, 8, 16, dtype=dtype)
    out = build_attention(ContextParallelConfig())(q, q, q, scale=0.0)
    means = q.float().cumsum(dim=2) / torch.arange(1, 9).view(1, 1, 8, 1)
    torch.testing.assert_close(out.float(), means, rtol=0, atol=1e-2 if dtype is torch.bfloat16 else 1e-6)


X = torch.zeros(1, 2, 4, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Call(X, X, X, scale=torch.ones((), requires_grad=True)), "multiply q by it, and give scale=1.0"),
        (Call(X, X, X, scale=torch.ones(3)), "scale is a tensor of (3,)"),
        (Call(X.long(), X.long(), X.long()), "int64"),
        (Call(X.bool(), X.bool(), X.bool()), "bool"),
        (Call(X.cfloat(), X.cfloat(), X.cfloat()), "complex64"),
        (Call(X, X, X, visible=torch.ones(4, 3, dtype=torch.bool)), "a mask of (4, 3) is not one for this rank's 4"),
        (
            Call(X, X, X, visible=torch.ones(2, 4, 4, dtype=torch.bool)),
            "a mask of (2, 4, 4) is not one for this rank's",
        ),
        (Call(X, X, X, visible=torch.ones(1, 3, 4, 4, dtype=torch.bool)), "give [4, 4] or [1 or 1, 1 or 2, 4, 4]"),
        (Call(X, X, X, visible=torch.zeros(4, 4)), "a mask is boolean, True where a query sees a key"),
        (Call(X, X, X, visible=torch.ones(4, 4, dtype=torch.bool, device="meta")), "a mask is on meta and q on cpu"),
        (Call(X[..., :0], X[..., :0], X), "one head and a head size of 1 at least"),
        (Call(X, X[:, :0], X[:, :0]), "one head and a head size of 1 at least"),
    ],
    ids=lambda value: None if isinstance(value, Call) else value,
)
def test_arguments_that_would_come_out_wrong_are_refused(call, message):
    attention = build_attention(ContextParallelConfig(attention_mask_type="general"))
    assert message in cases.error_of(attention, call)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"tokens": 0}], ids=["no sample", "no token"])
@pytest.mark.parametrize("topology", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_batch_of_nothing_gives_an_empty_result_with_gradients(topology, empty):
    case = plain_case(topology, value_head_size=12, **empty)
    for shard in cases.attend(case):
        heads = topology.ulysses * case.heads
        assert shard.out.shape == shard.dv.shape == (case.batch, heads, case.tokens, 12)
        assert shard.dq.shape == shard.dk.shape == (case.batch, heads, case.tokens, 8)


def test_weights_and_parameters_of_a_batch_of_nothing_have_gradients_of_0():
    """Data-parallel reducers wait for the gradient of every parameter."""
    attention, heads = build_attention(ContextParallelConfig()), LatentHeads(latent=6, unshared=6)
    up, sinks = (x.requires_grad_() for x in (torch.full((2, 14, 6), torch.inf), torch.zeros(2)))
    latent = Latent(torch.zeros(0, 4, 8), heads.expand, (up,))
    out = attention.of_latent(torch.zeros(0, 2, 4, 8), latent, terms=AttentionTerms(sinks=sinks))
    for parameter, gradient in zip((up, sinks), torch.autograd.grad(out.sum(), (up, sinks)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(parameter))


# Programs around it.


def test_a_module_that_holds_an_attention_can_be_copied_and_within_its_job_pickled(gloo):
    for copied, loaded, error in gloo.run(2, cases.copies, plain_case(cases.CPTopology(ulysses=2))):
        assert copied
        assert loaded
        assert "of ranks [0, 1], which this job does not have; save the module's state_dict instead" in error


def test_a_mesh_of_one_dimension_is_its_group_and_one_of_several_is_refused_with_the_name_to_use(gloo):
    for same, error in gloo.run(8, cases.mesh_errors, plain_case(ULYSSES)):
        assert same
        assert "a DeviceMesh of 2 dimensions ('dp', 'cp') and sizes (2, 4) is not one" in error
        assert "mesh['cp']" in error


def test_a_compiled_model_runs_with_changing_lengths():
    attention = build_attention(ContextParallelConfig())

    def model(x):
        return attention(x.sin(), x.cos(), x) * 2.0

    compiled = torch.compile(model, backend="eager", dynamic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of torch's own about its compiler.
        for length in (4, 6, 10):
            x = torch.randn(1, 2, length, 8, requires_grad=True)
            expected, actual = model(x), compiled(x)
            torch.testing.assert_close(actual, expected)
            (gradient,) = torch.autograd.grad(actual.sum(), x)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])
