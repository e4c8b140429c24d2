"""Tensors in BNSD order for a kernel that is faster with them, at the price of a copy."""

from dataclasses import dataclass

from torch import Tensor

from mindspeed_cp.kernels.protocol import BlockCase, BlockGradients, BlockKernel, BlockMask, BlockOutput


@dataclass(frozen=True)
class BnsdKernel:
    """A kernel that is handed contiguous [B, N, S, D] tensors, whatever order they were in (--megatron-cp-in-bnsd)."""

    kernel: BlockKernel

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.name

    def unsupported_reasons(self, case: BlockCase) -> list[str]:
        """Those of the kernel itself."""
        return self.kernel.unsupported_reasons(case)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> BlockOutput:
        """See BlockKernel.forward."""
        return self.kernel.forward(q.contiguous(), k.contiguous(), v.contiguous(), mask, scale)

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
        output = output._replace(out=output.out.contiguous(), lse=output.lse.contiguous())
        return self.kernel.backward(
            dout.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), output, mask, scale
        )
