"""A call with terms: what is refused, what ranks agree on, kernels, bytes, and a sample over gloo."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from mindspeed_cp.attention import AttentionTerms, Dropout, RingCommunicators, build_attention, local_attention
from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.comm import ContextParallelGroups
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.topology import CPTopology
from unit_tests.attention.test_every_plan import layout
from unit_tests.call_cases import ALGORITHMS, run_virtually
from unit_tests.dealt import contiguous
from unit_tests.dense import assert_equal_to
from unit_tests.plan_cases import PlanCase
from unit_tests.ring_cases import case_on
from unit_tests.term_cases import Found, TermCase, attend, attend_virtually, dense, restored

EVERYTHING = ("sinks", "softcap", "alibi", "bias", "dropout")


def case_on_grid(topology: CPTopology, heads: tuple[int, int] = (8, 2), **changed: object) -> TermCase:
    plan = PlanCase(layout("zigzag", topology.size, [[5, 1, 13, 1, 5]]), topology)
    return replace(TermCase(plan, heads, EVERYTHING), **changed)


# Over gloo.


def attend_over_gloo(group: dist.ProcessGroup, case: TermCase) -> Found:
    topology = case.plan.topology
    groups = ContextParallelGroups.build(topology, group, overlap=False)
    ulysses, ring = groups.along(topology)
    found = attend(case, groups.rank, ulysses, None if ring is None else RingCommunicators(*ring))
    dist.barrier(group)
    return found


@pytest.mark.parametrize("heads", [(8, 2), (7, 1)], ids=["few K/V heads", "odd heads"])
def test_every_term_over_gloo_gives_the_bits_of_virtual_ranks(gloo, heads):
    case = case_on_grid(CPTopology(inner=2, ulysses=4), heads)
    for over_gloo, virtual in zip(gloo.run_on_all(8, attend_over_gloo, case), attend_virtually(case), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(over_gloo, virtual, strict=True))


# Accuracy.


@pytest.mark.slow
def test_bf16_with_every_term_is_as_accurate_on_64_ranks_as_on_2():
    def relative_errors(size: int) -> dict[str, float]:
        # Half of the pairs of ranks see nothing of each other, and the last rank merges as often as there are ranks.
        plan = PlanCase(contiguous([512 // size] * size), CPTopology(inner=size))
        case = TermCase(plan, (4, 2), EVERYTHING, dtype=torch.bfloat16)
        exact, actual = dense(case), restored(case, attend_virtually(case))
        return {
            name: ((value.double() - getattr(exact, name)).norm() / getattr(exact, name).norm()).item()
            for name, value in actual._asdict().items()
            if name in ("out", "dq", "dk", "dv", "dbias")
        }

    few = relative_errors(2)
    for name, error in relative_errors(64).items():
        # Partial dK/dV are rounded on their way home: the square root of 2 at most, of roundings of one size.
        assert error <= 1.3 * few[name], f"{name}: error {error:.2e}, with two ranks {few[name]:.2e}"


# Kernels.


@pytest.mark.parametrize("told", [("alibi",), ("bias", "alibi"), ("bias of all", "mask")], ids="+".join)
def test_the_flash_kernel_of_the_cpu_adds_bias_and_alibi(told):
    plan = PlanCase(layout("zigzag", 3, [[25]]), CPTopology(inner=3))
    case = TermCase(plan, (4, 2), told, kernels=("cpu_flash",), value_head_size=8, learnt=False)
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))


def test_alibi_of_a_long_sequence_keeps_its_digits_in_bfloat16():
    q, k, v = (torch.randn(1, 2, 512, 16, dtype=torch.bfloat16, generator=torch.manual_seed(1)) for _ in range(3))
    terms = AttentionTerms(alibi_slopes=torch.tensor([0.37, 0.011]))
    _, lse = local_attention(causal=True).with_lse(q, k, v, terms=terms)
    _, exact = local_attention(causal=True).with_lse(*(x.double() for x in (q, k, v)), terms=terms)
    assert (lse - exact).abs().max() < 1e-4


# Calls.


def errors(terms_of) -> set[str]:
    batch = PackedBatch.from_cu_seqlens([0, 10, 16], 4)

    def on_rank(attention, rank):
        x = torch.zeros(1, 4, 4, 8)
        with pytest.raises(ValueError) as error:
            attention(x, x, x, plan=batch.plan, terms=terms_of(rank))
        return str(error.value)

    return set(run_virtually(case_on(ALGORITHMS["ring"]), on_rank))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (AttentionTerms(softcap=0.0), "softcap=0.0 is no finite number above 0; give one, or None for no softcap."),
        (AttentionTerms(sinks=torch.zeros(3)), "sinks are (3,), and q has 4 heads; give one for each, [N]."),
        (AttentionTerms(alibi_slopes=torch.tensor([1.0, torch.nan, 0, 0])), "give finite numbers."),
        (AttentionTerms(bias=torch.zeros(1, 1, 4, 12)), "takes [1 or 1, 1 or 4, 4, 16]; shard its rows as q"),
    ],
    ids=["softcap", "sinks", "slopes", "bias"],
)
def test_terms_that_do_not_fit_one_rank_are_refused_on_all(terms, message):
    (said,) = errors(lambda rank: terms if rank == 1 else None)
    assert message in said


def test_dropout_of_another_seed_on_one_rank_is_refused_on_all():
    (said,) = errors(lambda rank: AttentionTerms(dropout=Dropout(rate=0.1, seed=rank // 3)))
    assert "ranks 0 to 2: " in said
    assert "seed=1" in said


def test_a_term_that_no_kernel_takes_is_refused_with_all_reasons():
    config = ContextParallelConfig(context_parallel_kernels=("cpu_flash", "npu"))
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match=r"softcap\n  not cpu_flash: takes no softcap\n  not npu: runs on"):
        build_attention(config)(x, x, x, terms=AttentionTerms(softcap=1.0))


# Costs.


def operations(terms: AttentionTerms | None) -> int:
    q = torch.randn(1, 2, 8, 8).requires_grad_()
    attention = local_attention(causal=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(q, q, q, terms=terms).sum().backward()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def test_terms_that_are_not_used_cost_no_operation():
    operations(None)  # What is made once.
    assert operations(AttentionTerms(dropout=Dropout(rate=0.0, seed=1))) == operations(AttentionTerms())
    assert operations(AttentionTerms()) == operations(None)


def test_kv_heads_below_the_degree_are_sent_once_to_each_that_reads_them():
    """Eight query heads of one K/V head: each of four ranks sends the three others 2 of q and 1 of k and of v."""
    size, tokens, batch, (key, value) = 4, 6, 1, (8, 12)

    def on_rank(attention, rank):
        q, k, v = (torch.zeros(batch, n, tokens, d) for n, d in ((8, key), (1, key), (1, value)))
        attention(q, k, v)
        return attention.attention.attention.communicator.traffic.bytes_sent["all_to_all"]

    there, back = (size - 1) * tokens * (2 * key + key + value), (size - 1) * tokens * 2 * value
    assert run_virtually(case_on(ALGORITHMS["ulysses"]), on_rank) == [4 * (there + back)] * size
