"""Kernels that stand around another one: its name and its reasons, with something done to tensors on the way."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from mindspeed_cp.kernels.protocol import (
    TRIANGLE,
    Term,
    TileCase,
    TileGradients,
    TileKernel,
    TileOutput,
    TileTerms,
    term_reasons,
)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _as_they_are(terms: TileTerms) -> TileTerms:
    return terms


@dataclass(frozen=True)
class Rearranged:
    """A kernel that is handed its tensors in another order.

    given: what is done to each tensor [B, N, S, ...] on its way in. back: what is done to each on its way out. told:
    what becomes of the terms; a mask is not rearranged.
    """

    kernel: TileKernel
    given: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor] = _as_it_is
    told: Callable[[TileTerms], TileTerms] = _as_they_are

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.name

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Those of the kernel itself."""
        return self.kernel.unsupported_reasons(case)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel.forward."""
        out, lse, state = self.kernel.forward(self.given(q), self.given(k), self.given(v), self.told(terms))
        return TileOutput(self.back(out), self.back(lse), state)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel.backward."""
        output = output._replace(out=self.given(output.out), lse=self.given(output.lse))
        dout, q, k, v = (self.given(x) for x in (dout, q, k, v))
        return TileGradients(*map(self.back, self.kernel.backward(dout, q, k, v, output, self.told(terms))))


def in_bnsd(kernel: TileKernel) -> Rearranged:
    """The kernel, handed contiguous [B, N, S, D] tensors at the price of copies (--megatron-cp-in-bnsd)."""
    return Rearranged(kernel, Tensor.contiguous)


def _turned(x: Tensor) -> Tensor:
    return x.flip(2)


def _of_lower(terms: TileTerms) -> TileTerms:
    return replace(terms, window=TRIANGLE)


@dataclass(frozen=True)
class Turned(Rearranged):
    """A kernel for squares in which a query sees its own key and later ones, UPPER_TRIANGLE.

    It is handed queries and keys in reverse order, at the price of copies: then they are its lower triangle.
    """

    given: Callable[[Tensor], Tensor] = _turned
    back: Callable[[Tensor], Tensor] = _turned
    told: Callable[[TileTerms], TileTerms] = _of_lower

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Those of the kernel itself for a lower triangle; what belongs to positions is not put in reverse order."""
        return self.kernel.unsupported_reasons(case._replace(window=TRIANGLE)) + term_reasons(case, Term.SOFTCAP)
