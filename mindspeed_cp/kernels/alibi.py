"""ALiBi by kernels that have none: as columns of queries and keys.

Shapes: B batch, N query heads, G key/value heads, S queries, T keys, D key head size, V value head size.

Note [ALiBi in columns]
    Where no query sees a later key, the penalty for distance falls apart. With `last` the position of any key,

        -m |i - j|  =  m (j - last)  -  m (i - last).

    The second part is the same for all keys of a row: it is taken off the row's log-sum-exp, and nothing else knows of
    it. The first is a product: m / scale in columns of the query, j - last in columns of the key. bfloat16 has 8 binary
    digits, so last - j is written in 3 digits of base 256, up to 16M tokens, and m / scale as a sum of 3 numbers. Their
    9 products are exact, and a kernel adds them in fp32, as it would add a penalty.

    So it is exact over gaps and in any tile. FlashAttention's own ALiBi takes distances from places in a call: it has
    those of a square for a rectangle of a ring, whose keys all come before its queries, and would do for triangles
    alone.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_cp.kernels.protocol import Term, TileCase, TileGradients, TileKernel, TileOutput, TileTerms

_COLUMNS = 16
"""As many as kernels read heads by; 9 of them are used."""
_DIGITS, _BASE, _PARTS = 3, 256, 3


@dataclass(frozen=True)
class AlibiInColumns:
    """A kernel that takes ALiBi for keys that are not later than their queries; all else as it is."""

    kernel: TileKernel

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.name

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Those of the kernel itself, for heads with these columns where there is ALiBi."""
        if Term.ALIBI not in case.terms:
            return self.kernel.unsupported_reasons(case)
        value_head_size = case.value_head_size + _COLUMNS * (case.value_head_size == case.head_size)
        wider = case._replace(head_size=case.head_size + _COLUMNS, value_head_size=value_head_size)
        reasons = self.kernel.unsupported_reasons(wider._replace(terms=case.terms - {Term.ALIBI}))
        if case.dtype not in (torch.bfloat16, torch.float32):
            reasons.append("takes ALiBi in columns of bfloat16 and float32")
        if Term.SOFTCAP in case.terms:
            reasons.append("takes no softcap beside ALiBi")
        return reasons

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel.forward."""
        if terms.alibi_slopes is None:
            return self.kernel.forward(q, k, v, terms)
        out, lse, state = self.kernel.forward(*_with_columns(q, k, v, terms), _without_alibi(terms))
        return TileOutput(out[..., : v.size(3)], lse - _of_rows(terms), state)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel.backward."""
        if terms.alibi_slopes is None:
            return self.kernel.backward(dout, q, k, v, output, terms)
        wide = _with_columns(q, k, v, terms)
        more = wide[2].size(3) - v.size(3)
        out = TileOutput(_padded(output.out, more), output.lse + _of_rows(terms), output.state)
        grads = self.kernel.backward(_padded(dout, more), *wide, out, _without_alibi(terms))
        return TileGradients(*(grad[..., : x.size(3)] for grad, x in zip(grads, (q, k, v), strict=True)))


def _without_alibi(terms: TileTerms) -> TileTerms:
    return replace(terms, alibi_slopes=None, terms=terms.terms - {Term.ALIBI})


def _with_columns(q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and, where a kernel may want one head size, values, each with more columns."""
    assert terms.positions is not None and terms.alibi_slopes is not None, "ALiBi is about positions"
    parts, rest = [], terms.alibi_slopes.float() / terms.scale
    for _ in range(_PARTS):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    behind = terms.positions.keys.amax(dim=1, keepdim=True) - terms.positions.keys
    digits = [behind // _BASE**place % _BASE for place in range(_DIGITS)]
    used = slice(q.size(3), q.size(3) + _PARTS * _DIGITS)
    wide_q, wide_k = _padded(q, _COLUMNS), _padded(k, _COLUMNS)
    # Each part of a slope meets each digit; the digit's weight goes with the part.
    wide_q[..., used] = torch.stack([part * _BASE**place for part in parts for place in range(_DIGITS)], -1)[:, None]
    wide_k[..., used] = -torch.stack(digits * _PARTS, dim=-1)[:, None].to(k.dtype)
    return wide_q, wide_k, _padded(v, _COLUMNS) if v.size(3) == k.size(3) else v


def _padded(x: Tensor, columns: int) -> Tensor:
    return F.pad(x, (0, columns))


def _of_rows(terms: TileTerms) -> Tensor:
    """m (i - last), [1 or B, N, S] in fp32."""
    assert terms.positions is not None and terms.alibi_slopes is not None, "ALiBi is about positions"
    queries, keys, _ = terms.positions
    return terms.alibi_slopes.float()[:, None] * (queries - keys.amax(dim=1, keepdim=True))[:, None]
