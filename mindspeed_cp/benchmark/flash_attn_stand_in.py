"""Modules in the place of flash_attn's, by the names of its 2.8, that give tensors of the right shapes.

What a peer's attention holds around its kernel can then be counted where there is no GPU.

Shapes: B batch, S tokens, N heads, D head size.
"""

import sys
import types
from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Have `import flash_attn` find them."""
    package = types.ModuleType("flash_attn")
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface.__dict__.update(
        _flash_attn_forward=_forward,
        _flash_attn_backward=_backward,
        _flash_attn_varlen_forward=_forward,
        _flash_attn_varlen_backward=_backward,
    )
    package.__dict__.update(
        __version__="2.8.3",
        flash_attn_func=lambda q, k, v, *_, **__: _Local.apply(q, k, v),
        flash_attn_interface=interface,
    )
    sys.modules.update({"flash_attn": package, "flash_attn.flash_attn_interface": interface})
    # What ring_flash_attn has for transformers, which is not counted and need not be installed.
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.__dict__.update(substitute_hf_flash_attn=None, update_ring_flash_attn_params=None)
    sys.modules["ring_flash_attn.adapters"] = adapters


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """out [B, S, N, D] and lse [B, N, S], as flash_attn gives them: peers read this signature."""
    rows = q.size(0), q.size(2), q.size(1)
    return q.new_zeros((*q.shape[:3], v.size(3))), q.new_zeros(rows, dtype=torch.float32), None, None


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    """Gradients would be written into dq, dk and dv."""


class _Local(torch.autograd.Function):
    """Attention of one rank."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse, _, _ = _forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x) for x in ctx.saved_tensors[:3])
