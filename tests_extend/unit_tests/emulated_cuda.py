"""The operators that the kernels for NVIDIA GPUs call, on the CPU: torch's fused attention, and FlashAttention 2 and 3.

They take what the real ones take, give tensors of the same shapes, dtypes and strides, and refuse what those refuse, or
would silently read wrongly. They compute in fp32 and round once. Sources: those that kernels/cuda.py and
kernels/flash_attn.py name. test_cuda.py holds shapes and dtypes against torch's own.

Shapes: B batch, N query heads, G key/value heads, S queries, T keys, D key head size, V value head size.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """torch's operators take CPU tensors, both packages can be imported, and torch is built for NVIDIA GPUs."""
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("aten", "IMPL") as library:
        for operator in (flash, flash_backward, cudnn, cudnn_backward, efficient, efficient_backward):
            kind, _, backward = operator.__name__.partition("_")
            name = f"_scaled_dot_product_{kind}_attention" + ("_backward" if backward else "")
            library.impl(name, operator, "CPU")
        patch.setattr(torch.version, "hip", None)
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        patch.setattr(torch.backends.cudnn, "version", lambda: 92000)
        for name, module in packages().items():
            patch.setitem(sys.modules, name, module)
        yield


def packages() -> dict[str, ModuleType]:
    """Stand-ins for the packages, by the names under which they are imported."""
    package, functions, successor = (
        ModuleType(name) for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn_interface")
    )
    package.__version__ = "2.8.3"
    functions._flash_attn_forward, functions._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    functions._flash_attn_varlen_forward = _flash_attn_varlen_forward
    functions._flash_attn_varlen_backward = _flash_attn_varlen_backward
    successor._flash_attn_forward, successor._flash_attn_backward = _flash_attn_3_forward, _flash_attn_3_backward
    modules = {module.__name__: module for module in (package, functions, successor)}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, loader=None)
    return modules


# torch's operators, on [B, N, S, D].


def flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    check_flash(query, key, value, is_causal)
    require(dropout_p == 0 and not return_debug_mask and scale is not None, "is called with other options")
    out, lse = attend(query, key, value, is_causal, scale)
    rng_state, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    debug_mask = query.new_empty(0)
    out = torch.empty_like(query).copy_(out)
    return out, lse, None, None, query.size(2), key.size(2), rng_state, unused, debug_mask


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    check_flash(query, key, value, is_causal)
    check_backward(grad_out, query, value, out, logsumexp)
    require(cum_seq_q is None and cum_seq_k is None, "a cum_seq would mean packed sequences")
    require((max_q, max_k) == (query.size(2), key.size(2)), "max_q or max_k is wrong")
    require(philox_seed.dtype == philox_offset.dtype == torch.uint64, "the random state is not the forward pass's")
    require(dropout_p == 0 and scale is not None, "is called with other options")
    return gradients(grad_out, query, key, value, out, logsumexp, is_causal, scale)


def cudnn(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
    scale=None,
):  # fmt: skip
    check_cudnn(query, key, value)
    require(attn_bias is None and compute_log_sumexp and dropout_p == 0, "is called with other options")
    require(not return_debug_mask and scale is not None, "is called with other options")
    out, lse = attend(query, key, value, is_causal, scale)
    out = torch.empty_strided(out.shape, strides_as(query, out), dtype=out.dtype).copy_(out)
    lse = lse.unsqueeze(-1) if TORCH >= (2, 9) else lse
    seed, offset = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
    return out, lse, None, None, query.size(2), key.size(2), seed, offset, None


def cudnn_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
    max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    check_cudnn(query, key, value)
    require(logsumexp.dim() == (4 if TORCH >= (2, 9) else 3), "the log-sum-exp is not as the forward pass gives it")
    logsumexp = logsumexp.squeeze(-1) if TORCH >= (2, 9) else logsumexp
    check_backward(grad_out, query, value, out, logsumexp)
    strides = strides_as(query, out)
    require(out.stride() == grad_out.stride() == strides, "the plan was made for other strides")
    require(attn_bias is cum_seq_q is cum_seq_k is None, "is called with other options")
    require((max_q, max_k) == (query.size(2), key.size(2)), "max_q or max_k is wrong")
    require(philox_seed.dtype == philox_offset.dtype == torch.long, "the random state is not the forward pass's")
    require(dropout_p == 0 and scale is not None, "is called with other options")
    return gradients(grad_out, query, key, value, out, logsumexp, is_causal, scale)


def efficient(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):  # fmt: skip
    check_efficient(query, key, value, attn_bias, is_causal)
    require(compute_log_sumexp and dropout_p == 0 and scale is not None, "is called with other options")
    out, lse = attend(query, key, value, is_causal, scale, attn_bias)
    lse = torch.nn.functional.pad(lse, (0, -lse.size(2) % 32), value=torch.inf)
    seed, offset = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
    return tokens_outside_heads(out), lse, seed, offset


def efficient_backward(
    grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p, grad_input_mask,
    is_causal=False, *, scale=None,
):  # fmt: skip
    check_efficient(query, key, value, attn_bias, is_causal)
    queries = query.size(2)
    padded = queries + -queries % 32
    require(logsumexp.shape == (*query.shape[:2], padded), f"a log-sum-exp of {padded} rows is read")
    require(logsumexp.stride()[1:] == (padded, 1), "the log-sum-exp's rows are not dense")
    require((logsumexp[:, :, queries:] == torch.inf).all(), "rows past the last query count with exp(score - lse)")
    check_backward(grad_out_, query, value, out, logsumexp[:, :, :queries].contiguous())
    check_aligned(out, "out")
    require(
        queries == 1 or out.stride(2) == out.size(1) * out.size(3),
        "out's stride from token to token is taken to be N * V",
    )
    require(philox_seed.dtype == philox_offset.dtype == torch.long, "the random state is not the forward pass's")
    require(dropout_p == 0 and list(grad_input_mask[:3]) == [True] * 3, "is called with other options")
    lse = logsumexp[:, :, :queries]
    dq, dk, dv = gradients(grad_out_, query, key, value, out, lse, is_causal, scale, attn_bias)
    dbias = None
    if grad_input_mask[3]:
        require(attn_bias is not None, "there is no bias to give the gradient of")
        dbias = gradient_of_scores(grad_out_, query, key, value, out, lse, is_causal, scale, attn_bias).to(query.dtype)
    return tokens_outside_heads(dq), tokens_outside_heads(dk), tokens_outside_heads(dv), dbias


# The packages' functions, on [B, S, N, D].


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax, rng_state=None,
):  # fmt: skip
    require(alibi_slopes is None and not return_softmax, "is called with other options")
    require(not (softcap and dropout_p), "Softcapping does not support dropout for now")
    tensors = [x.transpose(1, 2) for x in (q, k, v)]
    check_flash(*tensors)
    hidden = hidden_by(causal, window_size_left, window_size_right, q.size(1), k.size(1))
    rng_state = torch.randint(2**31, (2,)) if rng_state is None else rng_state
    keep = kept_by(rng_state, dropout_p, tensors[0], k.size(1))
    out, lse = attend(*tensors, hidden, softmax_scale, softcap=softcap, keep=keep)
    return torch.empty_like(q).copy_(out.transpose(1, 2)), lse, q.new_empty(0), rng_state


def kept_by(rng_state: Tensor, rate: float, q: Tensor, num_keys: int) -> Tensor | None:
    """What dropout multiplies the probabilities of a call with: the state and places in the call say what is drawn."""
    if not rate:
        return None
    generator = torch.Generator().manual_seed(int(rng_state.sum()))
    return (torch.rand(*q.shape[:3], num_keys, generator=generator) >= rate) / (1 - rate)


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    require(alibi_slopes is None and isinstance(deterministic, bool), "is called with other options")
    require(not dropout_p or rng_state is not None, "draws dropout anew where it is given no state")
    hidden = hidden_by(causal, window_size_left, window_size_right, q.size(1), k.size(1))
    keep = kept_by(rng_state, dropout_p, q.transpose(1, 2), k.size(1))
    write_gradients(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, hidden, softcap, keep)
    return softmax_lse.new_empty(*softmax_lse.shape[:2], q.size(1) + -q.size(1) % 128)


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None, zero_tensors=False,
):  # fmt: skip
    out, lse = torch.empty_like(q), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)
    options = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    rng_state = torch.randint(2**31, (2,))
    parts = segments(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    for number, (rows, keys) in enumerate(parts):
        part = [x.unsqueeze(0) for x in (q[rows], k[keys], v[keys])]
        one, of_one, *_ = _flash_attn_forward(*part, *options, return_softmax, rng_state + number)
        out[rows], lse[:, rows] = one.squeeze(0), of_one.squeeze(0)
    return out, lse, q.new_empty(0), rng_state


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    require(softmax_lse.shape == (q.size(1), q.size(0)) and softmax_lse.is_contiguous(), "lse is not [N, T]")
    options = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    parts = segments(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    for number, (rows, keys) in enumerate(parts):
        dout_, q_, out_, dq_ = (x[rows].unsqueeze(0) for x in (dout, q, out, dq))
        k_, v_, dk_, dv_ = (x[keys].unsqueeze(0) for x in (k, v, dk, dv))
        lse = softmax_lse[:, rows].unsqueeze(0).contiguous()
        state = None if rng_state is None else rng_state + number
        _flash_attn_backward(dout_, q_, k_, v_, out_, lse, dq_, dk_, dv_, *options, deterministic, state)


def segments(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """The rows and keys of each sequence."""
    for x, ends, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        require(x.dim() == 3 and ends.dtype == torch.int32, "takes [T, N, D] and int32 cu_seqlens")
        require(ends[0] == 0 and ends[-1] == x.size(0), "cu_seqlens do not cover the tokens")
        require(ends.diff().max() == longest, "max_seqlen is not the longest sequence")
    both = zip(
        *(map(slice, ends[:-1], ends[1:]) for ends in (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())), strict=True
    )
    return list(both)


def hidden_by(causal: bool, left: int, right: int, num_queries: int, num_keys: int) -> Tensor:
    """Which keys FlashAttention 2 hides: csrc/flash_attn/flash_api.cpp changes the window before it is used."""
    left, right = (-1 if bound >= num_keys else bound for bound in (left, right))
    right = 0 if causal and num_queries > 1 else right
    if left < 0 <= right:
        left = num_keys
    if right < 0 <= left:
        right = num_keys
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    distance = torch.arange(num_keys) - torch.arange(num_queries)[:, None] - (num_keys - num_queries)
    if right >= 0:
        hidden |= distance > right
    if left >= 0:
        hidden |= -distance > left
    return hidden


def _flash_attn_3_forward(
    q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
    max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
    v_descale, softmax_scale, causal, window_size=(-1, -1),
):  # fmt: skip
    unused = (k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q)
    unused += (max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary)
    require(all(x is None for x in (*unused, q_descale, k_descale, v_descale)), "is called with other options")
    require(window_size == (-1, -1), "is called with other options")
    out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, softmax_scale, causal, -1, -1, 0.0, None, False)
    return out, lse, None, None


def _flash_attn_3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq,
    dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    unused = (cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k)
    require(all(x is None for x in unused) and window_size == (-1, -1), "is called with other options")
    require(softcap == sm_margin == 0 and isinstance(deterministic, bool), "is called with other options")
    require(not (deterministic and q.size(3) > 192), "Deterministic backward not supported for hdim 256.")
    hidden = hidden_by(causal, -1, -1, q.size(1), k.size(1))
    write_gradients(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, hidden, softcap)
    return softmax_lse.new_empty(*softmax_lse.shape[:2], q.size(1) + -q.size(1) % 128)


def write_gradients(dout, q, k, v, out, lse, dq, dk, dv, scale, hidden, softcap=0.0, keep=None):
    tensors = [x.transpose(1, 2) for x in (q, k, v)]
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    check_flash(*tensors)
    check_backward(dout, tensors[0], tensors[2], out, lse)
    check_aligned(dout, "dout")
    check_aligned(out, "out")
    results = gradients(dout, *tensors, out, lse, hidden, scale, softcap=softcap, keep=keep)
    for gradient, x, result in zip((dq, dk, dv), (q, k, v), results, strict=True):
        require(gradient.shape == x.shape and gradient.dtype == x.dtype, "dq, dk or dv has another shape or dtype")
        check_aligned(gradient, "dq, dk or dv")
        gradient.copy_(result.transpose(1, 2))


# What they refuse.


def require(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_aligned(x: Tensor, name: str) -> None:
    step = 16 // x.element_size()
    require(x.stride(-1) == 1, f"{name} must have a contiguous last dimension")
    require(all(stride % step == 0 for stride in x.stride()[:-1]), f"{name}'s strides are not aligned")
    require(x.data_ptr() % 16 == 0, f"{name} does not start at a multiple of 16 bytes")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    require(q.dtype in dtypes and q.dtype == k.dtype == v.dtype, f"takes no {q.dtype}, or dtypes differ")
    require(q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3], "shapes differ")
    require(q.size(0) == k.size(0) and q.size(3) == k.size(3), "batch or head sizes differ")
    require(q.size(1) % k.size(1) == 0, "key/value heads must divide query heads")
    for name, x in (("query", q), ("key", k), ("value", v)):
        check_aligned(x, name)
        require(x.size(3) % (16 // x.element_size()) == 0, f"{name}'s head size is not aligned")


def check_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> None:
    check_inputs(q, k, v, HALF)
    require(q.size(3) == v.size(3) <= 256, "needs one head size of at most 256")
    require(not causal or q.size(2) == k.size(2), "a causal mask would be aligned to the bottom right")


def check_cudnn(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_inputs(q, k, v, HALF)
    require(max(q.size(3), v.size(3)) <= 128, "head_dim should be no more than 128")
    require(q.size(2) > 1 and k.size(2) > 1, "does not support sequences of one token")


def check_efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> None:
    check_inputs(q, k, v, (torch.float32, *HALF))
    require(q.size(1) == k.size(1), "needs as many key/value heads as query heads")
    if bias is not None:
        require(bias.dtype == q.dtype, "invalid dtype for bias - should match query's dtype")
        require(bias.shape == (*q.shape[:3], k.size(2)), "attn_bias: wrong shape")
        check_aligned(bias, "attn_bias")
        require(not causal, "is called with both masks")


def check_backward(dout: Tensor, q: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    shape = (*q.shape[:3], v.size(3))
    require(dout.shape == out.shape == shape, f"dout and out should be {shape}")
    require(dout.dtype == out.dtype == q.dtype, "dout and out must have the same dtype as query")
    require(lse.dtype == torch.float32 and lse.shape == q.shape[:3], "the log-sum-exp has another dtype or shape")
    require(lse.is_contiguous(), "the log-sum-exp is read as if it were contiguous")


# What they compute.


def attend(q, k, v, causal, scale, bias=None, softcap=0.0, keep=None) -> tuple[Tensor, Tensor]:
    """Output in the dtype of q and log-sum-exp in fp32. causal: or a tensor [S, T] of what is hidden. keep: a factor on
    each probability.
    """
    scores = scores_of(q, k, causal, scale, bias, softcap)
    lse = scores.logsumexp(dim=-1)
    require((lse > -torch.inf).all(), "releases differ in what they give for rows that see nothing")
    probs = scores.softmax(dim=-1) if keep is None else scores.softmax(dim=-1) * keep
    return (probs @ per_query_head(v, q)).to(q.dtype), lse


def gradients(
    dout, q, k, v, out, lse, causal, scale, bias=None, softcap=0.0, keep=None
) -> tuple[Tensor, Tensor, Tensor]:
    scores = scores_of(q, k, causal, scale, bias, softcap)
    probs = (scores - lse.unsqueeze(-1)).exp()
    keys, values, dout = per_query_head(k, q), per_query_head(v, q), dout.float()
    delta = (dout * out.float()).sum(dim=-1, keepdim=True)
    keep = 1.0 if keep is None else keep
    dscores = probs * (keep * (dout @ values.mT) - delta) * scale
    if softcap:
        dscores = dscores * (1 - (scores.masked_fill(scores.isinf(), 0.0) / softcap) ** 2)
    dk, dv = dscores.mT @ q.float(), (probs * keep).mT @ dout
    dk, dv = (x.unflatten(1, (k.size(1), -1)).sum(dim=2) for x in (dk, dv))
    return (dscores @ keys).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def gradient_of_scores(dout, q, k, v, out, lse, causal, scale, bias) -> Tensor:
    """That of what is added to them, [B, N, S, T] in fp32."""
    probs = (scores_of(q, k, causal, scale, bias) - lse.unsqueeze(-1)).exp()
    delta = (dout.float() * out.float()).sum(dim=-1, keepdim=True)
    return probs * (dout.float() @ per_query_head(v, q).mT - delta)


def scores_of(q, k, causal, scale, bias, softcap=0.0) -> Tensor:
    scores = q.float() @ per_query_head(k, q).mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if isinstance(causal, Tensor):
        return scores.masked_fill(causal, -torch.inf)
    if causal:
        return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores if bias is None else scores + bias


def per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.float().repeat_interleave(q.size(1) // x.size(1), dim=1)


def strides_as(q: Tensor, x: Tensor) -> tuple[int, ...]:
    """Those of a dense tensor in the shape of x whose dims lie in memory in the order of those of q."""
    outermost_first = sorted(range(4), key=q.stride, reverse=True)
    return x.permute(outermost_first).contiguous().permute([outermost_first.index(dim) for dim in range(4)]).stride()


def tokens_outside_heads(x: Tensor) -> Tensor:
    """[B, N, S, D] that lies in memory as [B, S, N, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
