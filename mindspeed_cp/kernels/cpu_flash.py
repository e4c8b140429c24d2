"""Flash attention on CPUs: torch's own operator, which works through the scores instead of holding them."""

import torch
from packaging.version import Version
from torch import Tensor

from mindspeed_cp.kernels.bias import added_to_scores
from mindspeed_cp.kernels.protocol import (
    TRIANGLE,
    Term,
    TileCase,
    TileGradients,
    TileOutput,
    TileTerms,
    cut_window_reasons,
    term_reasons,
)

_TORCH = Version(torch.__version__)


class CpuFlashKernel:
    """`aten::_scaled_dot_product_flash_attention_for_cpu`, which gives the log-sum-exp and takes grouped queries."""

    name = "cpu_flash"

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Why it cannot compute `case`."""
        reasons = []
        if case.device_type != "cpu":
            reasons.append(f"runs on the CPU, not on {case.device_type}")
        if case.head_size != case.value_head_size:
            reasons.append(f"needs one head size, not {case.head_size} for keys and {case.value_head_size} for values")
        # Seen with torch 2.6: it writes outside its buffers.
        if case.num_heads != case.num_kv_heads and Version("2.13") > _TORCH:
            reasons.append("takes no grouped queries before torch 2.13")
        taken = Term.ALIBI, Term.ALIBI_AHEAD, Term.BIAS, Term.WIDE_BIAS
        return reasons + cut_window_reasons(case) + term_reasons(case, *taken)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel.forward."""
        q, k, v = (_with_dense_heads(x) for x in (q, k, v))
        added = _bias(terms, q)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, _is_causal(terms), attn_mask=added, scale=terms.scale
        )
        if added is not None:  # Rows that see no key have a log-sum-exp of 0 here; a bias may be -inf, too.
            lse = lse.masked_fill((added == -torch.inf).all(dim=-1), -torch.inf)
        return TileOutput(out, lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel.backward."""
        dout, q, k, v = (_with_dense_heads(x) for x in (dout, q, k, v))
        # exp(-inf - lse) is 0 in rows that see no key, if their log-sum-exp is a number.
        added = _bias(terms, q)
        lse = output.lse if added is None else output.lse.masked_fill(output.lse == -torch.inf, 0.0)
        return TileGradients(
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(dout, q, k, v, output.out.to(q.dtype), lse, 0.0, _is_causal(terms)),
                attn_mask=added,
                scale=terms.scale,
            )
        )


def _is_added(terms: TileTerms) -> bool:
    """Whether something is added to the scores, but for a mask."""
    return terms.bias is not None or terms.alibi_slopes is not None


def _is_causal(terms: TileTerms) -> bool:
    """Whether the operator is to mask by itself: not beside a tensor that is added."""
    return terms.window == TRIANGLE and not _is_added(terms)


def _bias(terms: TileTerms, q: Tensor) -> Tensor | None:
    """What the operator adds to the scores, with four dims: the mask, in the dtype of q, and what else is added.

    The latter in fp32, as the scores are: distances of a long sequence have more digits than bfloat16.
    """
    if not _is_added(terms):
        if terms.visible is None:
            return None
        visible = terms.visible.expand(q.size(0), 1 if terms.visible.dim() == 2 else -1, -1, -1)
        return q.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    added = added_to_scores(terms, torch.promote_types(q.dtype, torch.float32))
    seen = terms.visible
    if terms.window == TRIANGLE:
        seen = terms.window.visible(added.size(2), added.size(3), q.device)
    added = added if seen is None else added.where(seen, -torch.inf)
    return added.expand(q.size(0), -1, -1, -1)


def _with_dense_heads(x: Tensor) -> Tensor:
    """`x` with the numbers of a head next to each other in memory: the operator takes that for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()
