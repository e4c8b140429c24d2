"""Arithmetic in the precision that a kernel asks for, whatever torch.autocast its caller is in."""

from contextlib import AbstractContextManager, nullcontext

import torch


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
