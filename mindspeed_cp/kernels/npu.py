"""Flash attention and merging on Ascend NPUs: torch_npu's fused attention, its gradient, and its ring update.

Shapes: B batch, N query heads, G key/value heads, S queries, T keys, D key head size, V value head size.

Note [NPU statistics]
    The operator gives each row's largest score and the sum of exp(score - largest), in fp32 and eight times over:
    [B, N, S, 8]. Both enter its gradient only as exp(score - largest) / sum, so that (lse, 1) says the same of a row as
    (largest, sum), and says it of a row over all the keys of a ring just as well. Rows that see no key have sentinels
    there: largest is the lowest fp32 number, and their lse would be finite; and the gradient, which fills masked scores
    with that number, would find them all visible. They are therefore told apart here: lse is -inf after the forward
    pass, and 0 before the backward, where exp(lowest - 0) is 0.

Sources: the operators' documentation and tests in Ascend/op-plugin, CANN's ops-transformer; MindSpeed and ms-swift call
them likewise. Tested against an emulator of what is documented, not on hardware.
"""

import functools
import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import InvalidVersion, Version
from torch import Tensor

from mindspeed_cp.kernels.protocol import (
    EVERYTHING,
    TRIANGLE,
    TileCase,
    TileGradients,
    TileOutput,
    TileTerms,
    one_at_a_time_reasons,
    term_reasons,
)

_DEAD_BELOW = -1e38
"""A row whose largest score is below this sees no key: it is -3.4e38 there, whatever the operator was told of such."""
_COMPRESSED_SIZE = 2048
_ALL_VISIBLE, _ANY_MASK, _LEFT_UP_CAUSAL, _BAND = 0, 1, 2, 4
"""Sparse modes: what a mask means. A band is aligned bottom right, as our windows."""
_UNBOUNDED = 2**31 - 1
_PRECISE, _HANDLE_DEAD_ROWS = 0, 2
"""inner_precise: the second computes rows that see no key as such. 1, the default in CANN 7.0, may compute in fp16."""
_NARROWER_VALUES_SINCE = Version("8.2rc1")
"""The CANN since which values may have a smaller head size than keys."""
_LARGEST_HEAD, _MOST_HEADS = 512, 256


class NpuKernel:
    """`torch_npu.npu_fusion_attention` and its gradient, on SBH or BNSD tensors, whichever needs no copy.

    Values of a smaller head size than keys (multi-latent attention) go in as they are from CANN 8.2.RC1 on. Before, and
    where torch_npu cannot say which CANN it is, they are padded with zeros: that costs copies, but is exact, while the
    reference, the only other kernel of this device, holds all scores.
    """

    name = "npu"

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Why it cannot compute `case`."""
        if case.device_type != "npu":
            return [f"runs on the NPU, not on {case.device_type}"]
        reasons = _missing("npu_fusion_attention") + one_at_a_time_reasons(case) + term_reasons(case)
        if case.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            reasons.append(f"takes no {str(case.dtype).removeprefix('torch.')}")
        if case.value_head_size > case.head_size:
            reasons.append(f"needs values no wider than keys, not {case.value_head_size} over {case.head_size}")
        if case.head_size > _LARGEST_HEAD:
            reasons.append(f"takes head sizes up to {_LARGEST_HEAD}, not {case.head_size}")
        if case.num_heads > _MOST_HEADS:
            reasons.append(f"takes up to {_MOST_HEADS} heads, not {case.num_heads}")
        return reasons

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel.forward."""
        import torch_npu

        layout = _Layout.of(q, k, v)
        out, largest, total, *_ = torch_npu.npu_fusion_attention(
            *(layout.pack(x) for x in (q, k, v)),
            q.size(1),
            layout.name,
            scale=terms.scale,
            **_mask_options(terms, q, k.size(2)),
        )
        out = layout.unpack(out, q.size(1), v.size(3))
        lse = _log_sum_exp(largest, total)
        if terms.visible is not None:  # Only a mask tensor can have rows that see no key.
            out = out.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
        return TileOutput(out, lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel.backward."""
        import torch_npu

        layout = _Layout.of(q, k, v)
        lse = output.lse.float()
        lse = _eightfold(lse.masked_fill(lse == -torch.inf, 0.0))
        # Its length has grown over the releases: dq, dk and dv come first in all of them.
        dq, dk, dv = torch_npu.npu_fusion_attention_grad(
            *(layout.pack(x) for x in (q, k, v, dout)),
            q.size(1),
            layout.name,
            softmax_max=lse,
            softmax_sum=torch.ones_like(lse),
            attention_in=layout.pack(output.out),
            scale_value=terms.scale,
            **_mask_options(terms, q, k.size(2)),
        )[:3]
        return TileGradients(*(layout.unpack(x, y.size(1), y.size(3)) for x, y in ((dq, q), (dk, k), (dv, v))))


class NpuMerge:
    """`torch_npu.npu_ring_attention_update` where this build has it, on SBH tensors and in one operation.

    Of a row whose log-sum-exp is known, (lse, 1) says what (largest, sum) does, see Note [NPU statistics].
    """

    name = "npu"

    def unsupported_reasons(self, device_type: str, dtype: torch.dtype) -> list[str]:
        """Why it cannot merge blocks of this dtype on this device."""
        if device_type != "npu":
            return [f"runs on the NPU, not on {device_type}"]
        reasons = _missing("npu_ring_attention_update")
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            reasons.append(f"takes no {str(dtype).removeprefix('torch.')}")
        return reasons

    def merge_(self, out: Tensor, lse: Tensor, block: TileOutput) -> None:
        """See MergeKernel.merge_."""
        import torch_npu

        layout, one = _Layout("SBH"), lse.new_ones((*lse.shape, 8))
        lowest = torch.finfo(torch.float32).min
        merged, largest, total = torch_npu.npu_ring_attention_update(
            *(layout.pack(out), _eightfold(lse.clamp_min(lowest)), one),
            *(layout.pack(block.out.to(out.dtype)), _eightfold(block.lse.clamp_min(lowest)), one),
            input_layout=layout.name,
        )
        out.copy_(layout.unpack(merged, out.size(1), out.size(3)))
        lse.copy_(_log_sum_exp(largest, total))


def _missing(operator: str) -> list[str]:
    """Why torch_npu's `operator` cannot be had; empty where it can."""
    if "torch_npu" not in sys.modules and find_spec("torch_npu") is None:
        return ["torch_npu is not installed"]
    import torch_npu

    return [] if hasattr(torch_npu, operator) else [f"this build of torch_npu has no {operator}"]


def _log_sum_exp(largest: Tensor, total: Tensor) -> Tensor:
    """[B, N, S] from statistics [B, N, S, 8]; -inf in rows that see no key."""
    largest, total = largest[..., 0], total[..., 0]
    return (largest + total.log()).masked_fill(largest <= _DEAD_BELOW, -torch.inf)


def _eightfold(statistic: Tensor) -> Tensor:
    """[B, N, S] as the operators take it: [B, N, S, 8]."""
    return statistic.unsqueeze(-1).expand(*statistic.shape, 8).contiguous()


def _takes_narrower_values() -> bool:
    """Whether this CANN is known to take values of a smaller head size than keys."""
    import torch_npu

    # Older builds do not have it, and CANN before 8.1.RC1 answers "". What "8.2.RC1.alpha001" can do is not said.
    cann_version = getattr(getattr(getattr(torch_npu, "npu", None), "utils", None), "get_cann_version", None)
    try:
        return cann_version is not None and Version(cann_version()) >= _NARROWER_VALUES_SINCE
    except InvalidVersion:
        return False


class _Layout(NamedTuple):
    """How the operator gets tensors: in the order SBH [S, B, N * D] or BNSD, with heads of `head_size` at least."""

    name: str
    head_size: int = 0

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> "_Layout":
        """BNSD where all of them lie in memory like that, else SBH, which is Megatron's own order."""
        as_it_is = k.size(3) == v.size(3) or _takes_narrower_values()
        name = "BNSD" if all(x.is_contiguous() for x in (q, k, v)) else "SBH"
        return cls(name, 0 if as_it_is else k.size(3))

    def pack(self, x: Tensor) -> Tensor:
        """[B, N, S, D] for the operator; a view where the tensor lies in memory in this order and is not padded."""
        x = x if self.name == "BNSD" else x.permute(2, 0, 1, 3)
        x = x if x.size(3) >= self.head_size else F.pad(x, (0, self.head_size - x.size(3)))
        return x.contiguous() if self.name == "BNSD" else x.contiguous().flatten(2)

    def unpack(self, x: Tensor, num_heads: int, head_size: int) -> Tensor:
        """What `pack` gives, as [B, N, S, D] again, without the padding."""
        x = x if self.name == "BNSD" else x.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3)
        return x[..., :head_size]


def _mask_options(terms: TileTerms, q: Tensor, num_keys: int) -> dict[str, Any]:
    """Arguments that say the mask: for the operator True is masked."""
    if terms.visible is None:
        if terms.window == EVERYTHING:
            return {"sparse_mode": _ALL_VISIBLE, "inner_precise": _PRECISE}
        compressed = {"atten_mask": _compressed_mask(q.device), "inner_precise": _PRECISE}
        if terms.window == TRIANGLE and q.size(2) == num_keys:
            return {"sparse_mode": _LEFT_UP_CAUSAL, **compressed}
        left, right = (_UNBOUNDED if bound is None else bound for bound in terms.window)
        return {"sparse_mode": _BAND, "pre_tockens": left, "next_tockens": right, **compressed}
    masked = ~terms.visible
    if masked.dim() == 4 and masked.size(1) > 1:
        masked = masked.expand(q.size(0), -1, -1, -1)  # It takes no mask of all heads for a batch in common.
    return {"sparse_mode": _ANY_MASK, "atten_mask": masked.contiguous(), "inner_precise": _HANDLE_DEAD_ROWS}


@functools.cache
def _compressed_mask(device: torch.device) -> Tensor:
    """The triangle that stands for a causal mask of any size."""
    size = (_COMPRESSED_SIZE, _COMPRESSED_SIZE)
    return torch.ones(size, dtype=torch.bool, device=device).triu(diagonal=1)
