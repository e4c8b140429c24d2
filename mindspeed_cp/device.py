"""Which kind of accelerator this machine has."""

import torch


def accelerator() -> str | None:
    """Type of the accelerator that Megatron can train on here, "npu" or "cuda"; None on a machine without one.

    Asks for the NPU first: with torch_npu's `transfer_to_npu`, torch.cuda answers in its stead.
    """
    for device_type in ("npu", "cuda"):
        backend = getattr(torch, device_type, None)
        if backend is not None and backend.is_available():
            return device_type
    return None
