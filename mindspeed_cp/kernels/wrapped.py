"""Kernels that stand around another one: its name and its reasons, with something done to tensors on the way."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mindspeed_cp.kernels.protocol import BlockCase, BlockGradients, BlockKernel, BlockMask, BlockOutput


@dataclass(frozen=True)
class WrappedKernel:
    """What all of them share."""

    kernel: BlockKernel

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.name

    def unsupported_reasons(self, case: BlockCase) -> list[str]:
        """Those of the kernel itself."""
        return self.kernel.unsupported_reasons(case)


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Rearranged(WrappedKernel):
    """A kernel that is handed its tensors in another order.

    given: what is done to each tensor [B, N, S, ...] on its way in; the mask is the caller's to rearrange. back: what
    is done to each on its way out.
    """

    given: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor] = _as_it_is

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> BlockOutput:
        """See BlockKernel.forward."""
        out, lse, state = self.kernel.forward(self.given(q), self.given(k), self.given(v), mask, scale)
        return BlockOutput(self.back(out), self.back(lse), state)

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
        output = output._replace(out=self.given(output.out), lse=self.given(output.lse))
        dout, q, k, v = (self.given(x) for x in (dout, q, k, v))
        return BlockGradients(*map(self.back, self.kernel.backward(dout, q, k, v, output, mask, scale)))


def in_bnsd(kernel: BlockKernel) -> Rearranged:
    """The kernel, handed contiguous [B, N, S, D] tensors at the price of copies (--megatron-cp-in-bnsd)."""
    return Rearranged(kernel, Tensor.contiguous)


def _turned(x: Tensor) -> Tensor:
    return x.flip(2)


def turned(kernel: BlockKernel) -> Rearranged:
    """The kernel, handed queries and keys in reverse order at the price of copies: for upper triangles."""
    return Rearranged(kernel, _turned, _turned)
