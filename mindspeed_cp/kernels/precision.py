"""Arithmetic in the precision that a kernel asks for, whatever torch.autocast its caller is in."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_cp.kernels.protocol import BlockGradients, BlockMask, BlockOutput
from mindspeed_cp.kernels.wrapped import WrappedKernel


def autocast_off(device_type: str) -> AbstractContextManager[object]:
    """Within it, operations on tensors of `device_type` keep the dtypes they are given.

    Autocast would run a kernel's fp32 products in bf16 or fp16, and only in the pass that it is on in: mostly the
    forward pass, not the backward. Off already, or of a device that autocast does not know, it costs one look.
    """
    return torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else nullcontext()


def autocast_is_on(device_type: str) -> bool:
    """Whether torch.autocast is on for tensors of `device_type`; never for a device that it does not know."""
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:  # Autocast knows no such device ("meta"), or torch does not ("npu" without torch_npu).
        return False


@dataclass(frozen=True)
class OutsideAutocast(WrappedKernel):
    """A kernel that gives under autocast what it gives without: kernels themselves need not think of it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> BlockOutput:
        """See BlockKernel.forward."""
        with autocast_off(q.device.type):
            return self.kernel.forward(q, k, v, mask, scale)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: BlockOutput,
        mask: BlockMask,
        scale: float,
    ) -> BlockGradients:
        """See BlockKernel.backward."""
        with autocast_off(q.device.type):
            return self.kernel.backward(dout, q, k, v, output, mask, scale)
