"""The NPU's merge, on the emulator of its operator, against the definition."""

import pytest
import torch

from mindspeed_cp.kernels import choose_merge_kernel
from mindspeed_cp.kernels.merge import TorchMerge
from mindspeed_cp.kernels.npu import NpuMerge
from unit_tests import merge_cases as cases
from unit_tests.emulated_npu import fake_torch_npu
from unit_tests.merge_cases import Case

CASES = {
    "bf16": Case(),
    "fp16": Case(dtype=torch.float16),
    "fp32": Case(dtype=torch.float32),
    "one query": Case(queries=1),
    "later queries, in memory as SBND": Case(memory="SBNV", skipped=35, queries=35),
    "lse as BSN": Case(memory="BSNV", lse_memory="BSN"),
    "block expanded": Case(expanded=True),
}


@pytest.mark.parametrize("name", CASES)
def test_npu_merge_is_the_definition_also_for_rows_that_have_seen_no_key(name):
    with fake_torch_npu():
        before, actual = cases.merge(NpuMerge(), CASES[name])
    _, expected = cases.merge(TorchMerge(), CASES[name])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # Both leave the margins as they are.
    assert not torch.equal(actual.out, before.out)


def test_npu_merge_goes_before_plain_torch_where_the_build_has_the_operator():
    with fake_torch_npu():
        assert choose_merge_kernel("npu", torch.bfloat16).name == "npu"
    with fake_torch_npu(ring_update=False):
        assert choose_merge_kernel("npu", torch.bfloat16).name == "torch"
        assert NpuMerge().unsupported_reasons("npu", torch.bfloat16) == [
            "this build of torch_npu has no npu_ring_attention_update"
        ]


@pytest.mark.parametrize(
    ("device_type", "dtype", "reasons"),
    [
        ("cpu", torch.float32, ["runs on the NPU, not on cpu"]),
        ("npu", torch.float32, ["torch_npu is not installed"]),
        ("npu", torch.float64, ["torch_npu is not installed", "takes no float64"]),
    ],
)
def test_npu_merge_refuses_with_every_reason(device_type, dtype, reasons):
    assert NpuMerge().unsupported_reasons(device_type, dtype) == reasons
