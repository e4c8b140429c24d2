"""Flash attention on CPUs: torch's own operator, which tiles the scores instead of holding them."""

import torch
from packaging.version import Version
from torch import Tensor

from mindspeed_cp.kernels.protocol import BlockCase, BlockGradients, BlockMask, BlockOutput, MaskKind

_TORCH = Version(torch.__version__)


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
        # Seen with torch 2.6: it writes outside its buffers.
        if case.num_heads != case.num_kv_heads and Version("2.13") > _TORCH:
            reasons.append("takes no grouped queries before torch 2.13")
        return reasons

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> BlockOutput:
        """See BlockKernel.forward."""
        causal = mask.kind is MaskKind.TRIANGLE
        q, k, v = (_with_dense_heads(x) for x in (q, k, v))
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
        dout, q, k, v = (_with_dense_heads(x) for x in (dout, q, k, v))
        return BlockGradients(
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout, q, k, v, output.out, output.lse, 0.0, causal, scale=scale
            )
        )


def _with_dense_heads(x: Tensor) -> Tensor:
    """`x` with the numbers of a head next to each other in memory: the operator takes that for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()
