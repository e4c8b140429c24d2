"""Ring, double ring and hybrid against dense attention: results, accuracy, messages, memory, failures and names."""

import dataclasses
import itertools
import re
from unittest import mock

import pytest
import torch

from mindspeed_cp.attention import compose_attention
from mindspeed_cp.attention.sums import MergedOutput, TokenSum
from mindspeed_cp.attention.terms import TermsOfTiles
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.kernels import KernelRegistry
from mindspeed_cp.layouts import EqualChunks
from mindspeed_cp.plan import FULL, AttentionPlan
from mindspeed_cp.program import Phase, program
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.sharding import SequenceLayout
from mindspeed_cp.testing import rank_pool
from mindspeed_cp.testing.rank_pool import RankFailure
from mindspeed_cp.topology import CPTopology
from unit_tests import ring_cases as cases
from unit_tests.dense import assert_equal_to
from unit_tests.ring_cases import attend_virtually, case_on, dense, grid_id, grid_name, grids
from unit_tests.ulysses_cases import Case, Shard, restored

HEADS = {
    "mha": dict(heads=2, kv_heads=2, memory="SBND"),
    "gqa": dict(heads=4, kv_heads=2, batch=2),
    "mqa_value_head_size": dict(heads=3, kv_heads=1, batch=2, value_head_size=12, memory="DSNB"),
}
"""Heads of each Ulysses rank."""

RING_4, RING_8 = CPTopology(inner=4), CPTopology(inner=8)
DOUBLE_2X2, DOUBLE_2X4, DOUBLE_4X2 = (CPTopology(outer=o, inner=i) for o, i in ((2, 2), (2, 4), (4, 2)))
HYBRID_4, HYBRID_8 = CPTopology(inner=2, ulysses=2), CPTopology(outer=2, inner=2, ulysses=2)


def assert_same_bits(*runs: Shard) -> None:
    for run in runs[1:]:
        for x, y in zip(runs[0], run, strict=True):
            assert torch.equal(x, y)


# Results.


GRIDS = [each for size in range(1, 9) for each in grids(size)]
IN_TURN = [
    (topology, ("causal", "full", "per head")[number % 3], list(HEADS)[number // 3 % len(HEADS)])
    for number, topology in enumerate(GRIDS)
]
"""Every grid, with one mask and one kind of heads after the other."""
GLOO_IN_TURN = [pytest.param(*each, marks=[pytest.mark.slow] * (number % 5 > 0)) for number, each in enumerate(IN_TURN)]
"""Over processes a fifth of them by default: each grid runs on virtual ranks too."""


@pytest.mark.parametrize(("topology", "mask", "heads"), GLOO_IN_TURN, ids=grid_id)
def test_every_grid_of_gloo_ranks_equals_dense_attention_with_the_same_bits_in_every_run_and_with_overlap(
    gloo, topology, mask, heads
):
    case = case_on(topology, mask=mask, **HEADS[heads])
    runs = gloo.run_on_all(case.size, cases.attend_every_way, case)
    for shards in runs:
        assert len(shards) == 4
        assert_same_bits(*shards)
    assert_equal_to(dense(case), restored(case, [shards[0] for shards in runs]))


@pytest.mark.parametrize(
    ("topology", "mask", "heads"),
    [
        pytest.param(*each, marks=[] if each in IN_TURN else [pytest.mark.slow])
        for each in itertools.product(GRIDS, ("causal", "full", "per head"), HEADS)
    ],
    ids=grid_id,
)
def test_every_grid_of_virtual_ranks_equals_dense_attention_with_every_mask_and_heads(topology, mask, heads):
    case = case_on(topology, mask=mask, **HEADS[heads])
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))


QUICK_GRIDS = (CPTopology(inner=9), CPTopology(outer=3, inner=3), CPTopology(outer=2, inner=3, ulysses=2))


@pytest.mark.parametrize(
    "topology",
    [
        pytest.param(each, marks=[] if each in QUICK_GRIDS else [pytest.mark.slow])
        for size in range(9, 17)
        for each in grids(size)
    ],
    ids=grid_name,
)
def test_every_grid_of_up_to_16_virtual_ranks_equals_dense_attention(topology):
    case = case_on(topology, tokens=4, batch=2, head_size=4, value_head_size=6, overlap=True)
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))


@pytest.mark.parametrize(
    ("layout", "mask"),
    [
        *(("contiguous", mask) for mask in ("causal", "full", "2d", "per batch", "per head")),
        *(("zigzag", mask) for mask in ("2d", "per batch")),
    ],
)
@pytest.mark.parametrize("topology", [CPTopology(inner=3), CPTopology(outer=2, inner=3), HYBRID_8], ids=grid_name)
def test_virtual_ranks_equal_dense_attention_with_other_layouts_and_masks(topology, layout, mask):
    case = case_on(topology, mask=mask, layout=layout, tokens=4, heads=2, batch=2, overlap=True)
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))


@pytest.mark.parametrize(
    "topology",
    [
        CPTopology(inner=8, ulysses=8),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (CPTopology(inner=64), CPTopology(outer=8, inner=8))),
    ],
    ids=grid_name,
)
def test_64_virtual_ranks_equal_dense_attention(topology):
    case = case_on(topology, tokens=2, head_size=4, value_head_size=4)
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))


@pytest.mark.parametrize("topology", [RING_4, DOUBLE_2X2, HYBRID_4], ids=grid_name)
def test_virtual_ranks_have_the_bits_of_gloo_ranks(gloo, topology):
    case = case_on(topology, heads=2, dtype=torch.bfloat16, head_size=32, value_head_size=32)
    shards = gloo.run_on_all(case.size, cases.attend_in_own_groups, case)
    for real, virtual in zip(shards, attend_virtually(case), strict=True):
        assert_same_bits(real, virtual)


@pytest.mark.parametrize(
    ("topology", "mask"),
    [(RING_4, "causal"), (DOUBLE_2X2, "per head"), (CPTopology(outer=3, inner=2), "causal"), (HYBRID_8, "full")],
    ids=grid_id,
)
def test_a_ring_in_pieces_of_the_heads_equals_dense_attention_with_the_same_bits_with_overlap(topology, mask):
    case = case_on(topology, mask=mask, heads=4, kv_heads=2, pieces=2, value_head_size=12)
    shards = attend_virtually(case)
    assert_equal_to(dense(case), restored(case, shards))
    for shard, overlapped in zip(shards, attend_virtually(dataclasses.replace(case, overlap=True)), strict=True):
        assert_same_bits(shard, overlapped)


def test_comparison_with_dense_attention_sees_a_wrong_owner():
    case, columns = case_on(RING_4, mask="2d"), TermsOfTiles.columns
    with (
        mock.patch.object(TermsOfTiles, "columns", lambda told, owner, call: columns(told, (owner + 1) % 4, call)),
        pytest.raises(AssertionError, match="out: "),
    ):
        assert_equal_to(dense(case), restored(case, attend_virtually(case)))


# Accuracy.


def accuracy_case(size: int, outer: int) -> Case:
    """The same whole tensors for every size."""
    options = dict(tokens=1024 // size, head_size=32, value_head_size=32, dtype=torch.bfloat16)
    return Case(size=size, outer=outer, inner=size // outer, **options)


def relative_errors(case: Case) -> dict[str, float]:
    """Root mean square of the error against fp64, relative to that of the exact values."""
    exact, actual = dense(case), restored(case, attend_virtually(case))
    return {
        name: ((value.double() - getattr(exact, name)).norm() / getattr(exact, name).norm()).item()
        for name, value in actual._asdict().items()
    }


def assert_no_less_accurate(many: dict[str, float], two: dict[str, float]) -> None:
    for name, error in many.items():
        assert error <= 1.2 * two[name], f"{name}: error {error:.2e}, with two ranks {two[name]:.2e}"


@pytest.mark.parametrize(
    ("ranks", "outer"), [(16, 1), *(pytest.param(64, outer, marks=pytest.mark.slow) for outer in (1, 8))]
)
def test_bf16_is_as_accurate_on_many_ranks_as_on_2(ranks, outer):
    assert_no_less_accurate(relative_errors(accuracy_case(ranks, outer)), relative_errors(accuracy_case(2, 1)))


@pytest.mark.slow
def test_comparison_with_2_ranks_sees_an_output_that_is_rounded_at_every_merge():
    merge = MergedOutput.merge

    def rounded(self: MergedOutput, *args: object) -> None:
        merge(self, *args)
        out = self._accumulator().out
        out.copy_(out.bfloat16())

    with mock.patch.object(MergedOutput, "merge", rounded):
        many = relative_errors(accuracy_case(32, 1))
    with pytest.raises(AssertionError, match="out: error"):
        assert_no_less_accurate(many, relative_errors(accuracy_case(2, 1)))


@pytest.mark.slow
def test_comparison_with_2_ranks_sees_gradients_that_are_summed_in_bf16():
    add = TokenSum.add

    def rounded(self: TokenSum, *args: object) -> None:
        add(self, *args)
        if self._total is not None:
            self._total.copy_(self._total.bfloat16())

    with mock.patch.object(TokenSum, "add", rounded):
        many = relative_errors(accuracy_case(32, 1))
    two = relative_errors(accuracy_case(2, 1))
    for name in ("dq", "dk", "dv"):
        with pytest.raises(AssertionError, match=f"{name}: error"):
            assert_no_less_accurate({name: many[name]}, two)


# Messages.


def block_bytes(case: Case) -> int:
    """One block of K/V that a rank of the ring holds."""
    tokens, width = case.topology.ulysses * case.tokens, case.head_size + case.value_head_size
    return tokens * case.batch * case.kv_heads * width * case.dtype.itemsize


@pytest.mark.parametrize(
    ("topology", "overlap", "heads", "dtype"),
    [
        (CPTopology(inner=2), True, "mha", torch.bfloat16),
        (CPTopology(inner=5), False, "gqa", torch.float64),
        (CPTopology(inner=5), True, "mqa_value_head_size", torch.bfloat16),
        (RING_8, False, "mqa_value_head_size", torch.float64),
        (RING_8, True, "gqa", torch.float64),
    ],
    ids=grid_id,
)
def test_ring_sends_a_block_less_than_ranks_and_as_many_gradients(topology, overlap, heads, dtype):
    case = case_on(topology, mask="full", overlap=overlap, dtype=dtype, **HEADS[heads])
    others = (case.size - 1, (case.size - 1) * block_bytes(case))
    for forward, backward in cases.passes(case):
        assert (forward.sent("inner"), forward.sent("outer"), forward.sent("gradients")) == (others, (0, 0), (0, 0))
        assert (backward.sent("inner"), backward.sent("outer"), backward.sent("gradients")) == (others, (0, 0), others)


@pytest.mark.parametrize("topology", [DOUBLE_2X2, DOUBLE_2X4, DOUBLE_4X2, CPTopology(outer=3, inner=3)], ids=grid_name)
def test_double_ring_sends_a_block_to_another_inner_ring_once_for_each_other_inner_ring(topology):
    case, block = case_on(topology, mask="full", overlap=True), block_bytes(case_on(topology))
    across, within = topology.outer - 1, topology.outer * (topology.inner - 1)
    for forward, backward in cases.passes(case):
        for each in (forward, backward):
            assert each.sent("inner") == (within, within * block)
            assert each.sent("outer") == (across, across * block)
        assert backward.sent("gradients") == (across + within, (across + within) * block)
        for each, kinds in ((forward, ["outer"]), (backward, ["outer", "gradients"])):
            crossing = [m for m in each.messages if m.source // topology.inner != m.to // topology.inner]
            assert sorted(m.kind for m in crossing) == sorted(kinds * across)
            assert {m.bytes for m in crossing} == {block}


def touched(case: Case, query_owners: list[int], key_owner: int) -> float:
    """The part of a rank's keys that some ranks' queries see under the causal mask."""
    size = case.topology.ring_size
    held = {rank: [rank] if case.layout == "contiguous" else [rank, 2 * size - 1 - rank] for rank in range(size)}
    latest = max(chunk for rank in query_owners for chunk in held[rank])
    return sum(chunk <= latest for chunk in held[key_owner]) / len(held[key_owner])


def expected_gradients(case: Case, rank: int) -> list[float]:
    """The parts of a block that a rank of the ring sends home, in any order."""
    inner, first = case.inner, rank // case.inner * case.inner
    others = [owner for owner in range(case.topology.ring_size) if owner % inner != rank % inner]
    parts = [touched(case, [rank], owner) for owner in others]
    for owner in range(rank % inner, case.topology.ring_size, inner):
        if owner != rank:
            parts.append(touched(case, list(range(first, first + inner)), owner))
    return sorted(part for part in parts if part)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    "topology", [CPTopology(inner=2), CPTopology(inner=5), DOUBLE_2X4, DOUBLE_4X2, HYBRID_8], ids=grid_name
)
def test_causal_gradients_that_are_sent_are_the_touched_ones(topology, layout):
    case, block = case_on(topology, layout=layout, overlap=True), block_bytes(case_on(topology))
    ring_size = topology.ring_size
    for rank, (_, backward) in enumerate(cases.passes(case)):
        ring_rank = rank // topology.ulysses
        sent = sorted(m.bytes / block for m in backward.messages if m.kind == "gradients")
        assert sent == expected_gradients(case, ring_rank)
        assert backward.sent("gradients") == (len(sent), sum(sent) * block)
        if layout == "zigzag" and topology.outer == 1:
            assert sum(sent) == ring_rank / 2 + (ring_size - 1 - ring_rank)
        assert sum(sent) <= ring_size - 1


@pytest.mark.parametrize(
    ("topology", "heads"),
    [(HYBRID_4, "mha"), (HYBRID_8, "gqa"), (CPTopology(inner=3, ulysses=4), "mqa_value_head_size")],
    ids=grid_id,
)
def test_hybrid_sends_what_ulysses_sends_and_blocks_of_the_heads_that_a_rank_then_has(topology, heads):
    case = case_on(topology, mask="full", dtype=torch.bfloat16, **HEADS[heads])
    blocks = (topology.ring_size - 1, (topology.ring_size - 1) * block_bytes(case))
    for forward, backward in cases.passes(case):
        assert forward.sent("ulysses") == backward.sent("ulysses") == (2, case.formula_bytes)
        for each in (forward, backward):
            assert tuple(a + b for a, b in zip(each.sent("inner"), each.sent("outer"), strict=True)) == blocks
        assert backward.sent("gradients") == blocks


def mib(topology: CPTopology, heads: int, kv_heads: int, k_size: int = 128, v_size: int = 128) -> tuple[float, float]:
    """MiB that a rank sends in the forward and in the backward pass of full attention: 131072 tokens in bf16."""
    degree, tokens = topology.ulysses, 131072 // topology.size
    shards = EqualChunks(topology.ring_size, tokens * degree)
    plan, schedule = AttentionPlan(shards, shards, FULL), RingSchedule(topology.outer, topology.inner)
    sent = [program(plan, schedule, 0, phase).sent().total() for phase in (Phase.FORWARD, Phase.BACKWARD)]
    shard = tokens * (heads * (k_size + v_size) + kv_heads * (k_size + v_size)) * 2
    ulysses = shard * (degree - 1) / degree
    forward, backward = (ulysses + each * kv_heads // degree * (k_size + v_size) * 2 for each in sent)
    return forward / 2**20, backward / 2**20


@pytest.mark.parametrize(
    ("topology", "shape", "expected"),
    [
        (RING_8, (32, 32), (1792, 3584)),
        (DOUBLE_2X4, (32, 32), (1792, 3584)),
        (CPTopology(ulysses=8), (32, 32), (448, 448)),
        (CPTopology(inner=2, ulysses=4), (32, 32), (640, 896)),
        (RING_8, (32, 8), (448, 896)),
        (CPTopology(ulysses=8), (32, 8), (280, 280)),
        (CPTopology(inner=2, ulysses=4), (32, 8), (304, 368)),
        (CPTopology(inner=16), (64, 8), (480, 960)),
        (CPTopology(inner=2, ulysses=8), (64, 8), (284, 316)),
        (RING_8, (128, 128, 192, 128), (8960, 17920)),
        (CPTopology(ulysses=8), (128, 128, 192, 128), (2240, 2240)),
        (CPTopology(inner=2, ulysses=4), (128, 128, 192, 128), (3200, 4480)),
    ],
    ids=grid_id,
)
def test_worked_examples_of_bytes(topology, shape, expected):
    assert mib(topology, *shape) == expected


# Memory.


@pytest.mark.parametrize(
    ("topology", "heads", "dtype"),
    [
        (CPTopology(), "mha", torch.float64),
        (CPTopology(ulysses=4), "gqa", torch.bfloat16),
        (CPTopology(ulysses=4), "mqa_value_head_size", torch.float64),
        (RING_8, "mqa_value_head_size", torch.bfloat16),
        (RING_8, "mha", torch.float64),
        (DOUBLE_2X4, "gqa", torch.float64),
        (HYBRID_8, "mha", torch.bfloat16),
        (HYBRID_8, "mqa_value_head_size", torch.float64),
    ],
    ids=grid_id,
)
def test_backward_keeps_q_k_v_out_and_lse_once(topology, heads, dtype):
    case = case_on(topology, dtype=dtype, **HEADS[heads])
    numbers = (case.heads + case.kv_heads) * (case.head_size + case.value_head_size)
    lse_bytes = case.heads * max(4, dtype.itemsize)
    expected = case.batch * topology.ulysses * case.tokens * (numbers * dtype.itemsize + lse_bytes)
    assert cases.saved_bytes(case) == [expected] * case.size


@pytest.mark.parametrize(
    ("outer", "inner", "blocks", "with_overlap"),
    [(1, 2, 1, 1), (1, 3, 2, 2), (1, 16, 2, 2), (2, 2, 2, 2), (4, 2, 3, 3), (2, 4, 3, 3), (4, 4, 3, 4)],
)
def test_blocks_beside_a_ranks_own_do_not_grow_with_the_ring(outer, inner, blocks, with_overlap):
    case = Case(size=outer * inner, outer=outer, inner=inner, tokens=2, mask="full")
    assert cases.most_blocks(case) == blocks
    assert cases.most_blocks(dataclasses.replace(case, overlap=True)) == with_overlap


# Failures.


def test_a_rank_that_dies_in_mid_ring_fails_the_others_with_the_step_and_the_peer(gloo, tmp_path):
    case, culprit = case_on(RING_4, tokens=64), 2
    with (
        mock.patch.object(rank_pool, "GRACE_S", 30.0),
        pytest.raises(RankFailure, match="rank 2 died with exit code 7"),
    ):
        gloo.run_on_all(4, cases.die_in_mid_ring, case, culprit, str(tmp_path))
    steps = {
        3: "ring forward step [23]",
        0: "ring (forward|backward) step [123]",
        1: "ring (forward|backward) step [123]",
    }
    for rank, step in steps.items():
        explanation = (
            rf"{step} of 4, block of ring rank \d: K/V exchange failed "
            rf"\(from ring rank {(rank - 1) % 4}, to {(rank + 1) % 4}\): .+"
        )
        assert re.fullmatch(explanation, (tmp_path / str(rank)).read_text(), re.DOTALL)


WAITED = "virtual rank {} waited 3.0 s for rank {} in ring"
KV_LOST = "K/V exchange failed (from ring rank {}, to {}): " + WAITED
GRADIENTS_LOST = "dK/dV exchange failed (from ring rank {}, to {}): " + WAITED


@pytest.mark.parametrize(
    ("phase", "errors"),
    [
        (
            "forward",
            [
                f"ring forward step 3 of 4, block of ring rank 1: {KV_LOST.format(3, 1, 0, 3)}",
                f"ring backward step 1 of 4, block of ring rank 0: {KV_LOST.format(0, 2, 1, 0)}",
                "left",
                f"ring forward step 2 of 4, block of ring rank 1: {KV_LOST.format(2, 0, 3, 2)}",
            ],
        ),
        (
            "backward",
            [
                f"ring backward step 2 of 4, block of ring rank 2: {GRADIENTS_LOST.format(2, 2, 0, 2)}",
                f"ring backward step 1 of 4, block of ring rank 0: {GRADIENTS_LOST.format(2, 0, 1, 2)}",
                "left",
                f"ring backward step 2 of 4, block of ring rank 1: {KV_LOST.format(2, 0, 3, 2)}",
            ],
        ),
    ],
)
def test_a_rank_that_leaves_while_it_computes_step_1_is_missed_where_its_next_message_is_needed(phase, errors):
    assert cases.errors_of_virtual_ranks(case_on(RING_4), 2, phase) == errors


# Names in profiles.


@pytest.mark.parametrize(
    ("topology", "overlap", "kind", "owners_of_rank_1", "gradients_leave_at"),
    [
        (CPTopology(inner=3), False, "ring", [1, 0, 2], [1, 2]),
        (DOUBLE_2X2, True, "double ring", [1, 0, 3, 2], [1, 2, 3]),
        (HYBRID_4, False, "ring", [0, 1], [1]),
    ],
    ids=["ring", "double ring", "hybrid"],
)
def test_profile_names_each_step_its_owner_and_what_travels(
    gloo, topology, overlap, kind, owners_of_rank_1, gradients_leave_at
):
    case, size = case_on(topology, overlap=overlap), topology.ring_size
    names = gloo.run_on_all(topology.size, cases.profiled_names, case)[1]
    steps = {
        phase: [f"{kind} {phase} step {n} of {size}, block of ring rank {o}" for n, o in enumerate(owners_of_rank_1)]
        for phase in ("forward", "backward")
    }
    expected = steps["forward"] + steps["backward"] + steps["backward"][:1]  # The own block's second part.
    expected += [f"{step}: send K/V on" for phase in steps.values() for step in phase[1:]]
    expected += [f"{steps['backward'][n]}: send dK/dV home" for n in gradients_leave_at]
    if topology.ulysses > 1:
        expected += [f"Ulysses: exchange {way}" for way in ("heads for tokens", "tokens for heads")] * 2
    expected += ["ring: wait for K/V"] * 2 * (size - 1) + ["ring: wait for dK/dV"] * (size - 1)
    assert names == sorted(expected)


# Order of the dims, refusals.


@pytest.mark.parametrize("topology", [RING_4, DOUBLE_2X2, HYBRID_4], ids=grid_name)
def test_bnsd_flag_hands_the_kernel_contiguous_tensors_and_changes_no_result(topology):
    case = case_on(topology, heads=2, kv_heads=2, batch=2, memory="SBND")
    views, contiguous = cases.RecordingKernel(), cases.RecordingKernel()
    without = attend_virtually(case, KernelRegistry((views,)))
    with_flag = attend_virtually(dataclasses.replace(case, bnsd=True), KernelRegistry((contiguous,)))
    # Three tensors forward and six backward for each tile; the own one is done in three parts backward.
    assert len(views.contiguous) == len(contiguous.contiguous) == topology.size * (9 * topology.ring_size + 12)
    assert all(contiguous.contiguous)
    assert not all(views.contiguous)
    for x, y in zip(without, with_flag, strict=True):
        for name, value in y._asdict().items():
            torch.testing.assert_close(value, getattr(x, name), rtol=0, atol=1e-14)


def test_ring_refuses_tokens_that_are_no_chunks():
    q = torch.zeros(1, 1, 3, 4)
    with pytest.raises(
        ValueError, match=re.escape("3 tokens a rank are not a multiple of the 2 chunks it holds; give 4, ")
    ):
        cases.virtual_attention(case_on(RING_4), VirtualWorld(4), 0).check(q, q, q)


def test_attention_refuses_a_layout_of_other_ranks():
    layout = SequenceLayout(size=2)
    with pytest.raises(ValueError, match="and a topology of 4; give SequenceLayout"):
        compose_attention(case_on(RING_4).config, rank=0, ulysses=None, ring=None, layout=layout)
