"""Which accelerator is found, also where torch.cuda answers in an NPU's stead."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.device import accelerator


@pytest.mark.parametrize(
    ("npu", "cuda", "found"),
    [
        (None, False, None),
        (None, True, "cuda"),
        (False, True, "cuda"),
        (True, False, "npu"),
        pytest.param(True, True, "npu", id="torch.cuda answers for the NPU, as transfer_to_npu has it"),
    ],
)
def test_accelerator_is_the_npu_before_the_gpu(monkeypatch, npu, cuda, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    if npu is not None:
        monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: npu), raising=False)
    assert accelerator() == found
