"""Autocast is kept out of the kernels' own arithmetic."""

import pytest
import torch

from mindspeed_cp.kernels.precision import autocast_off


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
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
