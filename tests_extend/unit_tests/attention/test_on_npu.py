"""Every algorithm with the NPU's kernel, on the emulator of its operators: results, gradients, layouts and calls."""

from dataclasses import replace

import pytest
import torch

from mindspeed_cp.kernels import KernelRegistry
from mindspeed_cp.kernels.npu import NpuKernel, NpuMerge
from mindspeed_cp.topology import CPTopology
from unit_tests.dense import Result, assert_as_accurate_as, causal_mask, dense_attention
from unit_tests.emulated_npu import Call, fake_torch_npu
from unit_tests.emulation import OnEmulator
from unit_tests.ring_cases import attend_virtually, case_on, dense, grid_name
from unit_tests.ulysses_cases import Case, inputs, restored

ON_NPU = KernelRegistry((OnEmulator(NpuKernel(), fake_torch_npu, "npu"),))
HEADS = {
    "mha": dict(heads=2, kv_heads=2, memory="SBND"),
    "gqa": dict(heads=4, kv_heads=2, batch=2),
    "mqa_value_head_size": dict(heads=3, kv_heads=1, batch=2, head_size=12, value_head_size=8, memory="DSNB"),
}


def attend(case: Case, **build: bool) -> list[Call]:
    """Check the case against dense attention, and give what was called."""
    with fake_torch_npu(**build) as calls:
        actual = restored(case, attend_virtually(case, ON_NPU))
    exact = dense(case)
    if case.dtype is torch.float32:  # Of so few numbers the errors are too few to compare.
        for name, value in actual._asdict().items():
            torch.testing.assert_close(value.double(), getattr(exact, name), rtol=0, atol=1e-5, msg=f"{name}: error")
    else:
        assert_as_accurate_as(same_dtype(case), exact, actual)
    return calls


def same_dtype(case: Case) -> Result:
    """Dense attention in the case's own dtype."""
    q, k, v, dout, visible = inputs(case)
    return dense_attention(q, k, v, dout, visible=causal_mask(q.size(2)) if case.mask == "causal" else visible)


ULYSSES, RING, DOUBLE = CPTopology(ulysses=3), CPTopology(inner=4), CPTopology(outer=2, inner=2)
HYBRID, HYBRID_DOUBLE = CPTopology(inner=2, ulysses=2), CPTopology(outer=2, inner=2, ulysses=2)

# The kernel sees tiles, not grids: each algorithm with some masks, each mask and order of dims with some algorithms.
IN_TURN = [
    (topology, mask, list(HEADS)[(i + j) % len(HEADS)], bool((i + j) % 2))
    for i, topology in enumerate((CPTopology(), ULYSSES, RING, DOUBLE, HYBRID, HYBRID_DOUBLE))
    for j, mask in enumerate(("causal", "full", "2d", "per batch", "per head"))
    if (i + j) % 5 < 2
]


@pytest.mark.parametrize(
    ("topology", "mask", "heads", "bnsd"),
    IN_TURN,
    ids=[f"{grid_name(t)}-{mask}-{heads}-{'BNSD' if bnsd else 'SBH'}" for t, mask, heads, bnsd in IN_TURN],
)
def test_every_algorithm_is_as_accurate_as_dense_attention(topology, mask, heads, bnsd):
    case = case_on(topology, mask=mask, dtype=torch.float32, tokens=8, bnsd=bnsd, overlap=True, **HEADS[heads])
    calls = attend(case)
    assert {call.op for call in calls} == {"npu_fusion_attention", "npu_fusion_attention_grad"}
    if bnsd:
        assert {call.arguments["input_layout"] for call in calls} == {"BNSD"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topology", [RING, DOUBLE, HYBRID], ids=grid_name)
def test_half_precision_is_as_accurate_as_dense_attention(topology, dtype):
    sizes = dict(tokens=64, heads=4, kv_heads=2, head_size=32, value_head_size=32)
    attend(case_on(topology, dtype=dtype, memory="SBND", **sizes))


@pytest.mark.parametrize("topology", [RING, DOUBLE], ids=grid_name)
def test_a_ring_hands_over_megatrons_own_order_without_a_copy(topology):
    """Its q lies in memory as SBH, and what travels as well."""
    case = case_on(topology, dtype=torch.float32, heads=2, kv_heads=2, batch=2, tokens=8, memory="SBND")
    assert {call.arguments["input_layout"] for call in attend(case)} == {"SBH"}


def test_a_causal_ring_uses_the_compressed_mask_for_triangles_and_none_elsewhere():
    with fake_torch_npu() as calls:
        attend_virtually(case_on(RING, dtype=torch.float32, tokens=8), ON_NPU)
    modes = [(call.op, call.arguments["sparse_mode"], call.arguments["atten_mask"] is None) for call in calls]
    # The backward pass does the own block as a rectangle and two triangles.
    for op, triangles, rectangles in (("npu_fusion_attention", 1, 3), ("npu_fusion_attention_grad", 2, 4)):
        assert modes.count((op, 2, False)) == 4 * triangles
        assert modes.count((op, 0, True)) == 4 * rectangles
    assert len(modes) == 40


@pytest.mark.parametrize("mask", ["causal", "per head"])
def test_builds_of_before_the_newer_arguments_compute_the_same(mask):
    case = case_on(HYBRID, mask=mask, dtype=torch.float32, tokens=8, heads=2, kv_heads=2)
    attend(case, old_schemas=True, ring_update=False)


@pytest.mark.parametrize("mask", ["causal", "per head"])
@pytest.mark.parametrize("topology", [RING, DOUBLE, HYBRID], ids=grid_name)
def test_rings_that_merge_with_the_npus_operator_are_as_exact(monkeypatch, topology, mask):
    monkeypatch.setattr(NpuMerge, "unsupported_reasons", lambda self, device_type, dtype: [])
    calls = attend(case_on(topology, mask=mask, dtype=torch.float32, tokens=8, heads=2, kv_heads=2, memory="SBND"))
    merges = [call for call in calls if call.op == "npu_ring_attention_update"]
    assert len(merges) == topology.size * (topology.ring_size - 1)


def test_comparison_sees_a_lost_scale(monkeypatch):
    case = case_on(CPTopology(inner=2), dtype=torch.float32, tokens=8)
    forward = NpuKernel.forward
    monkeypatch.setattr(
        NpuKernel, "forward", lambda self, q, k, v, terms: forward(self, q, k, v, replace(terms, scale=1.0))
    )
    with pytest.raises(AssertionError, match="out: error"):
        attend(case)
