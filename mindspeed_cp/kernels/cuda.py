"""Fused attention on NVIDIA GPUs with what torch itself ships: its flash, cuDNN and memory-efficient kernels.

Shapes: B batch, N query heads, G key/value heads, S queries, T keys, D key head size, V value head size.

The operators are those behind torch.nn.functional.scaled_dot_product_attention, which chooses among them and makes the
tensors fit before it calls them; both are done here. Their backward passes take `out` and `lse` as arguments, and so
those of a row over all the keys of a ring.

Sources: PyTorch's transformers/cuda/{sdp_utils.cpp, attention.cu, attention_backward.cu, flash_attn/flash_api.cpp,
mem_eff_attention/kernel_{forward,backward}.h} and cudnn/MHA.cpp. Tested against an emulator of what is written there,
not on hardware.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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

_ALIGNMENT = 16
"""Bytes that the kernels read at once."""
_CUDNN_LENGTHS = 128
_OLDEST_CUDNN, _OLDEST_CUDNN_ON = 91501, {(10, 7): 92500}
"""The oldest cuDNN that is used, and where it has to be a newer one. 91501 is 9.15.1."""
_LSE_ROWS = 32
_BIAS_COLUMNS = 16


class CudaFlashKernel:
    """`aten::_scaled_dot_product_flash_attention`, torch's copy of FlashAttention 2; it takes grouped queries.

    Deterministic with torch.use_deterministic_algorithms(True): the operator asks for that itself.
    """

    name = "cuda_flash"

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Why it cannot compute `case`."""
        reasons = flash_reasons(case) + cut_window_reasons(case) + term_reasons(case)
        if not torch.backends.cuda.is_flash_attention_available():
            reasons.append("this torch is built without it")
        return reasons

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel.forward."""
        causal = terms.window == TRIANGLE
        out, lse, _, _, _, _, *random_state, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            fit(q), fit(k), fit(v), 0.0, causal, scale=terms.scale
        )
        return TileOutput(out, lse, tuple(random_state))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel.backward."""
        causal = terms.window == TRIANGLE
        return TileGradients(
            *torch.ops.aten._scaled_dot_product_flash_attention_backward(
                *(dout, fit(q), fit(k), fit(v), output.out),
                output.lse.contiguous(),  # Its strides are never looked at.
                *(None, None, q.size(2), k.size(2), 0.0, causal),
                *output.state,
                scale=terms.scale,
            )
        )


class CudnnKernel:
    """`aten::_scaled_dot_product_cudnn_attention`; takes grouped queries and another head size for values.

    From cuDNN 9.15.1 on, as torch's own choice has it: with earlier ones training on H100 has diverged or had wrong
    gradients (pytorch/pytorch#138522, #139298, #150700), and the backward pass reads outside its tensors
    (pytorch/pytorch#169849). Wheels of torch 2.6 to 2.9 bring 9.1 to 9.10. Compute capability 10.7 has no plan before
    9.25 (pytorch/pytorch#192843).
    It computes lengths that are multiples of 128 and no others: releases up to 9.26 have given NaN for some of these
    (pytorch/pytorch#196678, NVIDIA/cudnn-frontend#1072).
    """

    name = "cuda_cudnn"

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Why it cannot compute `case`."""
        reasons = fused_reasons(case) + cut_window_reasons(case) + term_reasons(case)
        largest = max(case.head_size, case.value_head_size)
        if largest > 128:
            reasons.append(f"takes head sizes up to 128, not {largest}")
        if case.num_queries % _CUDNN_LENGTHS or case.num_keys % _CUDNN_LENGTHS:
            reasons.append(
                f"is used for multiples of {_CUDNN_LENGTHS} queries and keys only, not for {case.num_queries} and "
                f"{case.num_keys}"
            )
        if case.device_type == "cuda":
            reasons += _cudnn_reasons(_OLDEST_CUDNN_ON.get(case.compute_capability or (0, 0), _OLDEST_CUDNN))
        if torch.are_deterministic_algorithms_enabled():
            reasons.append("is not deterministic, and torch.use_deterministic_algorithms asks for that")
        return reasons

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel.forward."""
        causal = terms.window == TRIANGLE
        out, lse, _, _, _, _, *random_state, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            fit(q), fit(k), fit(v), None, True, 0.0, causal, scale=terms.scale
        )
        # The backward pass wants a log-sum-exp of as many dims as the forward gives: [B, N, S, 1] or [B, N, S].
        as_given = lse.new_empty((0,) * lse.dim())
        return TileOutput(out, lse.reshape(q.shape[:3]), (*random_state, as_given))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel.backward."""
        causal = terms.window == TRIANGLE
        q = fit(q)
        *random_state, as_given = output.state
        return TileGradients(
            *torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                *(_fit_in_order_of(q, dout), q, fit(k), fit(v), _fit_in_order_of(q, output.out)),
                output.lse.contiguous().view(*output.lse.shape, *[1] * (as_given.dim() - output.lse.dim())),
                *random_state,
                *(None, None, None, q.size(2), k.size(2), 0.0, causal),
                scale=terms.scale,
            )
        )


class EfficientKernel:
    """`aten::_scaled_dot_product_efficient_attention`, from xformers: fp32 as well, older GPUs, masks, and a bias.

    A mask is an additive bias in the dtype of q, of the mask's own shape. Rows that see no key are told apart here,
    since releases differ in what they give for them: the forward pass sees them unmasked and throws the result away,
    the backward pass sees them masked with a log-sum-exp of 0, where exp(-inf - 0) is 0. The gradient of a bias comes
    in the dtype of q, for each sample and head.
    """

    name = "cuda_efficient"

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Why it cannot compute `case`."""
        reasons = gpu_reasons(case, oldest=(5, 0))
        dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
        if case.compute_capability is None or case.compute_capability >= (8, 0):
            dtypes += (torch.bfloat16,)
        if case.dtype not in dtypes:
            reasons.append(f"takes {_names(dtypes)} here, not {_names([case.dtype])}")
        taken = term_reasons(case, Term.BIAS, Term.BIAS_GRADIENT)
        return reasons + _head_size_reasons(case) + cut_window_reasons(case) + taken

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel.forward."""
        bias, dead = _bias(terms, q, k.size(2)), None
        if bias is not None:
            dead = (bias == -torch.inf).all(dim=-1, keepdim=True)
            bias = _for_all(bias.masked_fill_(dead, 0.0), q)
        out, lse, *random_state = torch.ops.aten._scaled_dot_product_efficient_attention(
            *(fit(q), _for_each_query_head(k, q), _for_each_query_head(v, q), bias, True, 0.0),
            bias is None and terms.window == TRIANGLE,
            scale=terms.scale,
        )
        lse = lse[:, :, : q.size(2)]
        if dead is not None:
            out, lse = out.masked_fill(dead, 0.0), lse.masked_fill(dead.squeeze(-1), -torch.inf)
        return TileOutput(out, lse, tuple(random_state))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel.backward."""
        bias, learnt = _bias(terms, q, k.size(2)), Term.BIAS_GRADIENT in terms.terms
        lse = output.lse.masked_fill(output.lse == -torch.inf, 0.0)
        lse = F.pad(lse, (0, -lse.size(2) % _LSE_ROWS), value=torch.inf)  # As its forward pass does.
        dq, dk, dv, dbias = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            *(dout, fit(q), _for_each_query_head(k, q), _for_each_query_head(v, q)),
            None if bias is None else _for_all(bias, q),
            # Of the strides of `out` it reads two, and takes it that a token's heads follow each other.
            fit(output.out.transpose(1, 2).contiguous()).transpose(1, 2),
            lse.contiguous(),
            *output.state,
            *(0.0, [True, True, True, learnt], bias is None and terms.window == TRIANGLE),
            scale=terms.scale,
        )
        if learnt and terms.bias is not None and terms.gradients is not None:
            terms.gradients.add_bias(dbias.float().sum_to_size(terms.bias.shape))
        return TileGradients(dq, _sum_of_groups(dk, k), _sum_of_groups(dv, v))


def _for_each_query_head(x: Tensor, q: Tensor) -> Tensor:
    """[B, G, T, D] as [B, N, T, D]: a view where there is one K/V head for all or for each, else a copy."""
    repeats = q.size(1) // x.size(1)
    return fit(x).unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _sum_of_groups(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient [B, N, T, D] of what `_for_each_query_head` gives, as that of `x`."""
    if gradient.size(1) == x.size(1):
        return gradient
    summed: Tensor = gradient.unflatten(1, (x.size(1), -1)).sum(dim=2)
    return summed


def _bias(terms: TileTerms, q: Tensor, num_keys: int) -> Tensor | None:
    """A new tensor, [S, T] or of four dims: the bias, and -inf where a key is not seen; None where neither is there.

    Its rows start at multiples of 16 numbers, as SDPA's own. Beside a bias it says a triangle too.
    """
    seen, shapes = terms.visible, []
    if terms.bias is not None:
        shapes.append(terms.bias.shape)
        seen = terms.window.visible(q.size(2), num_keys, q.device) if terms.window == TRIANGLE else seen
    if seen is not None:
        shapes.append(seen.shape)
    if not shapes:
        return None
    shape = torch.broadcast_shapes(*shapes)
    bias = q.new_zeros(*shape[:-1], num_keys + -num_keys % _BIAS_COLUMNS)[..., :num_keys]
    if terms.bias is not None:
        bias.copy_(terms.bias)
    return bias if seen is None else bias.masked_fill_(~seen, -torch.inf)


def _for_all(bias: Tensor, q: Tensor) -> Tensor:
    """[B, N, S, T], a view."""
    return bias.expand(*q.shape[:3], -1)


def fit(x: Tensor) -> Tensor:
    """`x` as the kernels read it: heads dense in memory, each at a multiple of 16 bytes. A copy only if need be."""
    step = _ALIGNMENT // x.element_size()
    dense = x.stride(-1) == 1 and all(stride > 0 and stride % step == 0 for stride in x.stride()[:-1])
    return x if dense and x.data_ptr() % _ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def _fit_in_order_of(q: Tensor, x: Tensor) -> Tensor:
    """`x` [B, N, S, V], dense and with its dims in memory as those of q: as cuDNN's forward pass gives `out`.

    Its backward pass may take that for granted: releases of torch look up the plan that they built by the strides of q,
    k and v alone, and use it for whatever strides `out` and `dout` have. Under Megatron it is no copy.
    """
    outermost_first = sorted(range(4), key=q.stride, reverse=True)
    inverse = [outermost_first.index(dim) for dim in range(4)]
    return fit(x.permute(outermost_first).contiguous()).permute(inverse)


def _cudnn_reasons(oldest: int) -> list[str]:
    """Why the cuDNN that torch runs with, which need not be the one that it was built with, cannot be used."""
    try:
        version = torch.backends.cudnn.version()
    except RuntimeError as error:
        return [f"torch cannot use this cuDNN: {str(error).splitlines()[0]}"]
    needed = f"needs cuDNN {oldest // 10000}.{oldest // 100 % 100}.{oldest % 100} or newer"
    if version is None:
        return [f"{needed}, and torch finds none"]
    return [f"{needed}, not the {version} that torch finds"] if version < oldest else []


def flash_reasons(case: TileCase) -> list[str]:
    """Why FlashAttention 2 and 3 cannot compute `case`, whoever ships them."""
    reasons = fused_reasons(case)
    if case.head_size != case.value_head_size:
        reasons.append(f"needs one head size, not {case.head_size} for keys and {case.value_head_size} for values")
    if case.head_size > 256:
        reasons.append(f"takes head sizes up to 256, not {case.head_size}")
    capability = case.compute_capability or (8, 0)
    small = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    if small and 192 < case.head_size <= 224:
        reasons.append(
            f"has no backward pass for head size {case.head_size} on compute capability {_dotted(capability)}"
        )
    return reasons


def fused_reasons(case: TileCase) -> list[str]:
    """What all kernels for half precision without a mask tensor refuse."""
    reasons = gpu_reasons(case, oldest=(8, 0))
    if case.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"takes bfloat16 and float16, not {_names([case.dtype])}")
    if case.masked:
        reasons.append("takes no arbitrary mask")
    return reasons + _head_size_reasons(case)


def gpu_reasons(case: TileCase, oldest: tuple[int, int]) -> list[str]:
    """Why the device is not one for these kernels."""
    if case.device_type != "cuda":
        return [f"runs on NVIDIA GPUs, not on {case.device_type}"]
    if torch.version.hip is not None:
        return ["runs on NVIDIA GPUs, and this torch is built for AMD's"]
    if case.compute_capability is not None and case.compute_capability < oldest:
        return [f"needs compute capability {_dotted(oldest)} or above, not {_dotted(case.compute_capability)}"]
    return []


def _head_size_reasons(case: TileCase) -> list[str]:
    """Heads have to start at multiples of 16 bytes."""
    step = _ALIGNMENT // case.dtype.itemsize
    return [
        f"takes head sizes that are multiples of {step}, not {size}"
        for size in dict.fromkeys((case.head_size, case.value_head_size))
        if size % step
    ]


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def _names(dtypes: list[torch.dtype] | tuple[torch.dtype, ...]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
