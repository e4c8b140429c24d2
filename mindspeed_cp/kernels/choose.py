"""The choice of a kernel: the first, in order of preference, that can compute the case at hand."""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from mindspeed_cp.kernels.alibi import AlibiInColumns
from mindspeed_cp.kernels.cpu_flash import CpuFlashKernel
from mindspeed_cp.kernels.cuda import CudaFlashKernel, CudnnKernel, EfficientKernel
from mindspeed_cp.kernels.flash_attn import FlashAttn3Kernel, FlashAttnKernel
from mindspeed_cp.kernels.merge import MergeKernel, TorchMerge
from mindspeed_cp.kernels.npu import NpuKernel, NpuMerge
from mindspeed_cp.kernels.protocol import TileCase, TileKernel
from mindspeed_cp.kernels.reference import ReferenceKernel
from mindspeed_cp.kernels.triton_merge import TritonMerge
from mindspeed_cp.kernels.wrapped import in_bnsd

MERGE_KERNELS: tuple[MergeKernel, ...] = (TritonMerge(), NpuMerge(), TorchMerge())
"""All kernels that merge, the preferred first."""

_LOGGER = logging.getLogger(__name__)
_Kernel = TypeVar("_Kernel", TileKernel, MergeKernel)


@dataclass(frozen=True, eq=False)
class KernelRegistry:
    """Kernels to choose from.

    kernels: in order of preference.
    first_on: names of kernels that go before all others on GPUs of a compute capability, in their order.
    """

    kernels: tuple[TileKernel, ...]
    first_on: Mapping[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)
    _announced: set[tuple[str, TileCase]] = field(default_factory=set, repr=False)
    _derived: "dict[tuple[str, ...] | None, KernelRegistry]" = field(default_factory=dict, init=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels' names."""
        return tuple(kernel.name for kernel in self.kernels)

    def choose(self, case: TileCase) -> TileKernel:
        """The first kernel that can compute `case`; the log says, once for each kind of case, why it is that one.

        Raises NotImplementedError with every kernel's reasons when none can.
        """
        kernel, _ = self._first_able(case)
        if kernel is None:
            raise NotImplementedError(self.explain(case))
        self.announce(kernel, case)
        return kernel

    def announce(self, kernel: TileKernel, case: TileCase) -> None:
        """Say in the log that `kernel` computes a case, and why not each that is preferred to it.

        Once for cases that differ in their numbers of tokens alone: a sequence that grows has a new one at each step.
        """
        kind = kernel.name, case._replace(num_queries=0, num_keys=0)
        if kind in self._announced:
            return
        self._announced.add(kind)
        if _LOGGER.isEnabledFor(logging.INFO):
            before = itertools.takewhile(lambda each: each.name != kernel.name, self.in_order(case))
            refusals = (_refusal(each, each.unsupported_reasons(case)) for each in before)
            _LOGGER.info("\n".join([f"{kernel.name} computes {case}", *refusals]))

    def explain(self, case: TileCase) -> str:
        """Which kernel computes `case`, and why not each that is preferred to it; every refusal where none does."""
        kernel, refusals = self._first_able(case)
        answer = f"no attention kernel can compute {case}" if kernel is None else f"{kernel.name} computes {case}"
        return "\n".join([answer, *refusals])

    def only(self, names: Iterable[str]) -> "KernelRegistry":
        """The kernels of these names, in this order on every device. Raises ValueError for one that is not there."""
        by_name = {kernel.name: kernel for kernel in self.kernels}
        names = tuple(names)
        for name in names:
            if name not in by_name:
                raise ValueError(f"there is no attention kernel {name!r}; there are {', '.join(self.names)}.")
        # The same registry for each layer that asks: what is made of a plan is made once for a registry.
        return self._derived.setdefault(names, KernelRegistry(tuple(by_name[name] for name in names)))

    def in_bnsd(self) -> "KernelRegistry":
        """The same kernels, each handed contiguous BNSD tensors."""
        made = KernelRegistry(tuple(in_bnsd(kernel) for kernel in self.kernels), self.first_on)
        return self._derived.setdefault(None, made)

    def alone(self, kernel: TileKernel) -> "KernelRegistry":
        """One of them, or one that stands around it, as the only choice; the log has said why."""
        return KernelRegistry((kernel,), _announced=self._announced)

    def in_order(self, case: TileCase) -> tuple[TileKernel, ...]:
        """The kernels, the preferred first, on the device of `case`."""
        first = self.first_on.get(case.compute_capability, ()) if case.compute_capability else ()
        if not first:
            return self.kernels
        rank = {name: place for place, name in enumerate(first)}
        return tuple(sorted(self.kernels, key=lambda kernel: rank.get(kernel.name, len(first))))

    def _first_able(self, case: TileCase) -> tuple[TileKernel | None, list[str]]:
        return _first_able(self.in_order(case), lambda kernel: kernel.unsupported_reasons(case))


def choose_merge_kernel(
    device_type: str, dtype: torch.dtype, kernels: Sequence[MergeKernel] = MERGE_KERNELS
) -> MergeKernel:
    """The first of `kernels` that can merge blocks of this dtype on this device.

    Raises NotImplementedError with every kernel's reasons when none can.
    """
    kernel, refusals = _first_able(kernels, lambda kernel: kernel.unsupported_reasons(device_type, dtype))
    if kernel is None:
        raise NotImplementedError("\n".join([f"no kernel can merge blocks of {dtype} on {device_type}", *refusals]))
    return kernel


def _first_able(
    kernels: Sequence[_Kernel], reasons_of: Callable[[_Kernel], list[str]]
) -> tuple[_Kernel | None, list[str]]:
    """The first kernel without a reason against it, and a line for each one before it."""
    refusals: list[str] = []
    for kernel in kernels:
        reasons = reasons_of(kernel)
        if not reasons:
            return kernel, refusals
        refusals.append(_refusal(kernel, reasons))
    return None, refusals


def _refusal(kernel: TileKernel | MergeKernel, reasons: Iterable[str]) -> str:
    return f"  not {kernel.name}: {'; '.join(reasons)}"


KERNELS = KernelRegistry(
    (
        AlibiInColumns(FlashAttnKernel()),
        AlibiInColumns(CudaFlashKernel()),
        AlibiInColumns(FlashAttn3Kernel()),
        AlibiInColumns(CudnnKernel()),
        AlibiInColumns(EfficientKernel()),
        AlibiInColumns(NpuKernel()),
        CpuFlashKernel(),
        ReferenceKernel(),
    ),
    first_on={(9, 0): ("cuda_cudnn", "flash_attn_3"), (10, 0): ("cuda_cudnn",), (10, 3): ("cuda_cudnn",)},
)
"""All kernels. The reference comes last: it computes everything, and holds all scores of a block.

cuDNN goes before FlashAttention 2 where torch's own scaled_dot_product_attention has it first in builds for CUDA 12 and
for CUDA 13 alike: on compute capabilities 9.0, 10.0 and 10.3, with cuDNN above 9.15.0 (check_prefer_cudnn_attention in
its transformers/cuda/sdp_utils.cpp). Releases that had it first with older ones took that back, see CudnnKernel. The
PyTorch 2.5 release blog measures it to be up to 75 % faster than FlashAttention 2 on H100. FlashAttention 3, built for
Hopper, comes next there: 1.5 to 2 times as fast as 2 (arXiv:2407.08608).
"""
