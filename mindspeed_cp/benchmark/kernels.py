"""Kernels for benchmarks: one that waits instead of computing, and one that times another."""

import time

import torch
from torch import Tensor

from mindspeed_cp.kernels import TileCase, TileGradients, TileKernel, TileOutput, TileTerms

_SPIN_S = 0.0005
"""A sleep ends late by less than this."""


def block_flops(case: TileCase, batch: int, backward: bool = False) -> float:
    """Floating-point operations of a tile: two matrix products, five in the backward pass, of what is seen."""
    return _of_area(case, batch * case.window.area(case.num_queries, case.num_keys), backward)


def _flops(q: Tensor, k: Tensor, v: Tensor, terms: TileTerms, backward: bool = False) -> float:
    """Those of a call, of one tile or of several."""
    case = TileCase.of(q, k, v, terms)
    if terms.segments is None:
        return block_flops(case, q.size(0), backward)
    sizes = zip(terms.segments.queries.diff().tolist(), terms.segments.keys.diff().tolist(), strict=True)
    return _of_area(case, sum(terms.window.area(*size) for size in sizes), backward)


def _of_area(case: TileCase, area: int, backward: bool) -> float:
    scores = case.num_heads * area
    keys, values = 2 * scores * case.head_size, 2 * scores * case.value_head_size
    return 3 * keys + 2 * values if backward else keys + values


class EmulatedKernel:
    """An accelerator of so many floating-point operations a second: it waits for as long as that one would compute.

    It takes what FlashAttention 2 takes: windows, and several tiles in one call.

    Results are zeros, without a meaning; shapes, dtypes and memory are those of a real kernel.
    """

    name = "emulated"

    def __init__(self, flops_per_s: float) -> None:
        self.flops_per_s = flops_per_s

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Why it cannot tell how long `case` takes."""
        return ["does not know how much of an arbitrary mask is work"] if case.masked else []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """Zeros, after as long as that accelerator would take."""
        start = time.perf_counter()
        out = q.new_zeros(*q.shape[:3], v.size(3))
        lse = torch.zeros(q.shape[:3], device=q.device)
        self._wait(start, _flops(q, k, v, terms))
        return TileOutput(out, lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """Zeros, after as long as that accelerator would take."""
        start = time.perf_counter()
        gradients = TileGradients(*(x.new_zeros(x.shape) for x in (q, k, v)))
        self._wait(start, _flops(q, k, v, terms, backward=True))
        return gradients

    def _wait(self, start: float, flops: float) -> None:
        wait_until(start + flops / self.flops_per_s)


def wait_until(moment: float) -> None:
    """Return when time.perf_counter() reaches `moment`; the last bit of it keeps a core busy."""
    if (left := moment - time.perf_counter() - _SPIN_S) > 0:
        time.sleep(left)
    while time.perf_counter() < moment:
        pass


class TimedKernel:
    """A kernel whose time and work are added up in `seconds` and `flops`."""

    def __init__(self, kernel: TileKernel) -> None:
        self.kernel = kernel
        self.seconds = self.flops = 0.0

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.name

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Those of the kernel itself."""
        return self.kernel.unsupported_reasons(case)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """What the kernel gives; its time and work are added up."""
        start = time.perf_counter()
        output = self.kernel.forward(q, k, v, terms)
        self._add(start, _flops(q, k, v, terms))
        return output

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """What the kernel gives; its time and work are added up."""
        start = time.perf_counter()
        gradients = self.kernel.backward(dout, q, k, v, output, terms)
        self._add(start, _flops(q, k, v, terms, backward=True))
        return gradients

    def _add(self, start: float, flops: float) -> None:
        self.seconds += time.perf_counter() - start
        self.flops += flops
