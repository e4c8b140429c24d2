"""Kernels of devices that are not here, run on the CPU over emulated operators."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from mindspeed_cp.kernels import TileCase, TileGradients, TileKernel, TileOutput, TileTerms


@dataclass(frozen=True)
class OnEmulator:
    """A kernel that takes the CPU's tensors for those of its device. To be used within `running`.

    emulator: puts the operators that the kernel calls in place, and takes them away again.
    device_type, compute_capability: what it is told that the tensors are on.
    """

    kernel: TileKernel
    emulator: Callable[[], AbstractContextManager[None]]
    device_type: str
    compute_capability: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return self.kernel.name

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        there = case._replace(device_type=self.device_type, compute_capability=self.compute_capability)
        return self.kernel.unsupported_reasons(there)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        return self.kernel.forward(q, k, v, terms)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        return self.kernel.backward(dout, q, k, v, output, terms)


def running(kernel: TileKernel) -> AbstractContextManager[None]:
    """Within it the kernel can run here: in its emulator, if it needs one."""
    return kernel.emulator() if isinstance(kernel, OnEmulator) else nullcontext()
