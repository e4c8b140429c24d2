"""What differs between builds of torch_npu and CANN: defaults, and values of a smaller head size than keys."""

import pytest
import torch

from mindspeed_cp.kernels import TileOutput, TileTerms, Window
from mindspeed_cp.kernels.npu import NpuKernel, NpuMerge
from mindspeed_cp.kernels.protocol import TRIANGLE
from unit_tests.emulated_npu import fake_torch_npu

ARBITRARY, SCALE = torch.tensor([[1, 0, 1, 1]] * 3 + [[0] * 4], dtype=torch.bool), 0.25


def compute(terms: TileTerms, value_head_size: int, memory: str, **build) -> tuple[list[torch.Tensor], list]:
    """Output, log-sum-exp and gradients of a block, and the calls of the operators."""
    generator, kernel = torch.Generator().manual_seed(1), NpuKernel()
    shapes = [(2, heads, 4, size) for heads, size in ((4, 24), (2, 24), (2, value_head_size), (4, value_head_size))]
    q, k, v, dout = (torch.randn(shape, generator=generator) for shape in shapes)
    if memory == "SBND":
        q, k, v, dout = (x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (q, k, v, dout))
    with fake_torch_npu(**build) as calls:
        output = kernel.forward(q, k, v, terms)
        gradients = kernel.backward(dout, q, k, v, output, terms)
    return [output.out, output.lse, *gradients], calls


@pytest.mark.parametrize(
    ("terms", "precision"),
    [
        (TileTerms(SCALE), 0),
        (TileTerms(SCALE, TRIANGLE), 0),
        (TileTerms(SCALE, Window(1, 1)), 0),
        (TileTerms(SCALE, visible=ARBITRARY), 2),
    ],
    ids=["everything", "causal", "window", "mask"],
)
def test_precision_is_the_same_whatever_the_builds_default(terms, precision):
    results, calls = compute(terms, 24, "BNSD", default_precision=1)
    assert [call.arguments["inner_precise"] for call in calls] == [precision] * 2
    assert all(map(torch.equal, results, compute(terms, 24, "BNSD")[0]))


@pytest.mark.parametrize("memory", ["BNSD", "SBND"])
@pytest.mark.parametrize(
    ("cann", "padded"),
    [("8.2.RC1", False), ("8.5.0", False), ("8.1.RC1", True), ("8.2.RC1.alpha001", True), ("", True), (None, True)],
)
def test_narrower_values_are_padded_where_cann_is_not_known_to_take_them(cann, padded, memory):
    terms = TileTerms(SCALE, TRIANGLE)
    results, calls = compute(terms, 16, memory, cann=cann)
    expected, _ = compute(terms, 16, memory)
    for actual, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-6)
    width = 24 if padded else 16
    assert [call.arguments["value"].size(-1) for call in calls] == [width if memory == "BNSD" else 2 * width] * 2


def test_merge_does_not_depend_on_the_default_dtype():
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fake_torch_npu():
            NpuMerge().merge_(out, lse, TileOutput(out + 1, lse.clone()))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(out, torch.full((1, 2, 3, 4), 0.5, dtype=torch.float32))
