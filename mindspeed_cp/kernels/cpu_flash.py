"""Flash attention on CPUs: torch's own operator, which tiles the scores instead of holding them."""

import torch
from torch import Tensor

from mindspeed_cp.kernels.protocol import BlockCase, BlockGradients, BlockMask, BlockOutput
from mindspeed_cp.layout import MaskKind


class CpuFlashKernel:
    """`aten::_scaled_dot_product_flash_attention_for_cpu`, which gives the log-sum-exp and takes grouped queries."""

    name = "cpu_flash"

    def unsupported_reasons(self, case: BlockCase) -> list[str]:
        """Why it cannot compute `case`."""
        reasons = []
        if case.device_type != "cpu":
            reasons.append(f"runs on the CPU, not on {case.device_type}")
        if case.mask is MaskKind.ARBITRARY:
            reasons.append("takes no arbitrary mask")
        if case.head_size != case.value_head_size:
            reasons.append(f"needs one head size, not {case.head_size} for keys and {case.value_head_size} for values")
        return reasons

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> BlockOutput:
        """See BlockKernel.forward."""
        causal = mask.kind is MaskKind.TRIANGLE
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return BlockOutput(out, lse)

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
        causal = mask.kind is MaskKind.TRIANGLE
        return BlockGradients(
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, q, k, v, output.out, output.lse, 0.0, causal, scale=scale
            )
        )
