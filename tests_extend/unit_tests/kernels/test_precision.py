"""Autocast is kept out of the kernels' own arithmetic."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention import local_attention
from mindspeed_cp.kernels import KERNELS, add_
from mindspeed_cp.kernels.merge import TorchMerge
from mindspeed_cp.kernels.npu import NpuMerge
from mindspeed_cp.kernels.precision import autocast_off
from unit_tests import merge_cases
from unit_tests.emulated_npu import fake_torch_npu

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("low", LOW, ids=str)
def test_products_keep_their_dtype_within_autocast_off_alone(low):
    x = torch.ones(2, 2)
    with torch.autocast("cpu", low):
        with autocast_off("cpu"):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == low


@pytest.mark.parametrize("device_type", ["cuda", "npu", "meta", "privateuseone"])
def test_autocast_of_one_device_is_left_alone_by_another(device_type):
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16), autocast_off(device_type):
        assert (x @ x).dtype == torch.bfloat16


def attention() -> list[Tensor]:
    """Output, log-sum-exp and gradients of grouped queries in fp32."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 4, 32, 64), (1, 2, 32, 64), (1, 2, 32, 48), (1, 4, 32, 48)]
    q, k, v, dout = (torch.randn(shape, generator=generator) for shape in shapes)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = local_attention(causal=True, kernels=KERNELS.only(["reference"])).with_lse(q, k, v, scale=0.125)
    return [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]


def merged(kernel: TorchMerge | NpuMerge) -> list[Tensor]:
    with fake_torch_npu():
        return list(merge_cases.merge(kernel, merge_cases.Case())[1])


def added() -> list[Tensor]:
    total = torch.full((1, 2, 3, 4), 1 / 3)
    add_(total, torch.full((1, 2, 3, 4), 1 / 7))
    return [total]


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(attention, id="reference"),
        pytest.param(lambda: merged(TorchMerge()), id="merge"),
        pytest.param(lambda: merged(NpuMerge()), id="npu merge"),
        pytest.param(added, id="add_"),
    ],
)
def test_a_kernel_gives_the_same_bits_and_dtypes_under_autocast(compute: Callable[[], list[Tensor]], low):
    without = compute()
    with torch.autocast("cpu", low):
        within = compute()
    assert [x.dtype for x in within] == [x.dtype for x in without]
    assert all(map(torch.equal, within, without))
