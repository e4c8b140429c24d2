"""Merging on Ascend NPUs in one operation, where this build of torch_npu has it.

Shapes: B batch, N query heads, S query tokens, V value head size.

The operator merges (out, largest score, sum) with a block's, see Note [NPU statistics] in npu.py: of a row whose
log-sum-exp is known, (lse, 1) says the same, and log(sum) + largest is the merged one.

Source: npu_ring_attention_update in Ascend/op-plugin. Tested against an emulator of what is documented, not on
hardware.
"""

import torch
from torch import Tensor

from mindspeed_cp.kernels.npu import DEAD_BELOW, eightfold, missing
from mindspeed_cp.kernels.protocol import BlockOutput

_OPERATOR = "npu_ring_attention_update"


class NpuMerge:
    """`torch_npu.npu_ring_attention_update`, on SBH tensors."""

    name = "npu"

    def unsupported_reasons(self, device_type: str, dtype: torch.dtype) -> list[str]:
        """Why it cannot merge blocks of this dtype on this device."""
        if device_type != "npu":
            return [f"runs on the NPU, not on {device_type}"]
        reasons = missing(_OPERATOR)
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            reasons.append(f"merges bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}")
        return reasons

    def merge_(self, out: Tensor, lse: Tensor, block: BlockOutput) -> None:
        """See MergeKernel.merge_."""
        import torch_npu

        one = torch.ones((*lse.shape, 8), device=lse.device)
        merged, largest, total = torch_npu.npu_ring_attention_update(
            *(_sbh(out), _finite(lse), one),
            *(_sbh(block.out.to(out.dtype)), _finite(block.lse), one),
            input_layout="SBH",
        )
        out.copy_(merged.unflatten(2, (out.size(1), -1)).permute(1, 2, 0, 3))
        largest, total = largest[..., 0], total[..., 0]
        lse.copy_((largest + total.log()).masked_fill(largest <= DEAD_BELOW, -torch.inf))


def _sbh(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3).contiguous().flatten(2)


def _finite(lse: Tensor) -> Tensor:
    """[B, N, S] as the operator takes it; the lowest number there is for rows that have seen no key."""
    return eightfold(lse.clamp_min(torch.finfo(torch.float32).min))
