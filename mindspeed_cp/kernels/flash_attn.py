"""FlashAttention 2 and 3 where their packages are installed: `flash_attn` and `flash_attn_interface`.

Both take and give tensors in the order [B, S, N, D], and log-sum-exps [B, N, S] in fp32, natural logarithm. They are
imported when they are to compute something on a GPU, not before.

Sources: flash_attn/flash_attn_interface.py and hopper/flash_attn_interface.py of Dao-AILab/flash-attention, releases
2.7.0 to 2.8.4, and csrc/flash_attn/flash_api.cpp, hopper/flash_api.cpp. Tested against stand-ins with these signatures,
not on hardware.
"""

import inspect
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from packaging.version import Version
from torch import Tensor

from mindspeed_cp.kernels.cuda import fit, flash_reasons
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

_OLDEST = "2.7"
"""From this release on the functions' arguments are as they are called here."""
_NO_SOFTCAP, _NO_DROPOUT, _NO_ALIBI = 0.0, 0.0, None
_SCALE_OF_FLASH_ATTN_3 = {"_flash_attn_forward": 23, "_flash_attn_backward": 15}
"""Where `softmax_scale` stands among the arguments, from release 2.8.0 on: in 2.7.4 others are left out before it."""


class FlashAttnKernel:
    """The package `flash_attn`: it takes windows; deterministic with torch.use_deterministic_algorithms(True)."""

    name = "flash_attn"

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Why it cannot compute `case`."""
        missing = _import_reasons("flash_attn.flash_attn_interface", case)
        if not missing and case.device_type == "cuda":
            version = import_module("flash_attn").__version__
            if Version(version) < Version(_OLDEST):
                missing = [f"needs flash_attn {_OLDEST} or newer, not {version}"]
        return flash_reasons(case) + _window_reasons(case) + _term_reasons(case) + missing

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel.forward."""
        if terms.segments is not None:
            out, lse, _, state = import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward(
                *(_packed(x) for x in (q, k, v)),
                *terms.segments,
                *(_rate(terms), terms.scale, *_window(terms), terms.softcap or _NO_SOFTCAP, _NO_ALIBI, False),
            )
            return TileOutput(out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0), _kept(state, terms))
        out, lse, _, state = import_module("flash_attn.flash_attn_interface")._flash_attn_forward(
            *(_tokens_first(x) for x in (q, k, v)),
            *(_rate(terms), terms.scale, *_window(terms), terms.softcap or _NO_SOFTCAP, _NO_ALIBI, False),
        )
        return TileOutput(out.transpose(1, 2), lse, _kept(state, terms))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel.backward."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        if terms.segments is not None:
            packed = [_packed(x) for x in (dout, q, k, v, output.out)]
            gradients = [x.new_empty(x.shape) for x in packed[1:4]]
            import_module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward(
                *packed,
                output.lse.squeeze(0).contiguous(),
                *gradients,
                *terms.segments,
                *(
                    _rate(terms),
                    terms.scale,
                    *_window(terms),
                    terms.softcap or _NO_SOFTCAP,
                    _NO_ALIBI,
                    deterministic,
                    *output.state,
                ),
            )
            return TileGradients(*(x.transpose(0, 1).unsqueeze(0) for x in gradients))
        gradients = [_new_tokens_first(x) for x in (q, k, v)]
        import_module("flash_attn.flash_attn_interface")._flash_attn_backward(
            *(_tokens_first(x) for x in (dout, q, k, v, output.out)),
            output.lse.contiguous(),  # Its strides are never looked at.
            *gradients,
            *(
                _rate(terms),
                terms.scale,
                *_window(terms),
                terms.softcap or _NO_SOFTCAP,
                _NO_ALIBI,
                deterministic,
                *output.state,
            ),
        )
        return TileGradients(*(x.transpose(1, 2) for x in gradients))


class FlashAttn3Kernel:
    """The module `flash_attn_interface` that FlashAttention 3 installs, for Hopper GPUs.

    Deterministic with torch.use_deterministic_algorithms(True), up to head size 192.
    """

    name = "flash_attn_3"

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Why it cannot compute `case`."""
        reasons = flash_reasons(case) + cut_window_reasons(case) + term_reasons(case)
        if case.compute_capability is not None and case.compute_capability != (9, 0):
            reasons.append("is for compute capability 9.0 only")
        if case.head_size > 192 and torch.are_deterministic_algorithms_enabled():
            reasons.append(
                f"is not deterministic with head size {case.head_size}, and torch.use_deterministic_algorithms asks "
                "for that"
            )
        missing = _import_reasons("flash_attn_interface", case)
        if not missing and case.device_type == "cuda":
            missing = _flash_attn_3_reasons(import_module("flash_attn_interface"))
        return reasons + missing

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel.forward."""
        causal = terms.window == TRIANGLE
        # By position: its releases name some of the arguments differently, and the earlier ones have no defaults for
        # the 20 (of caches, packed sequences, rotary embeddings and fp8) between the tensors and the scale.
        out, lse, *_ = import_module("flash_attn_interface")._flash_attn_forward(
            *(_tokens_first(x) for x in (q, k, v)), *[None] * 20, terms.scale, causal
        )
        return TileOutput(out.transpose(1, 2), lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel.backward."""
        gradients = [_new_tokens_first(x) for x in (q, k, v)]
        import_module("flash_attn_interface")._flash_attn_backward(
            *(_tokens_first(x) for x in (dout, q, k, v, output.out)),
            output.lse.contiguous(),
            *[None] * 6,  # Packed sequences.
            *gradients,
            *(terms.scale, terms.window == TRIANGLE),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return TileGradients(*(x.transpose(1, 2) for x in gradients))


def _term_reasons(case: TileCase) -> list[str]:
    """Terms that it does not take; its dropout is by coordinates of its own, within a call."""
    reasons = term_reasons(case, Term.SOFTCAP, Term.DROPOUT, Term.KERNEL_DROPOUT)
    if Term.DROPOUT in case.terms:
        reasons.append(
            "draws dropout by coordinates of its own: valid, not the same as at CP = 1; Dropout(by_kernel=True) allows "
            "it"
        )
    if {Term.SOFTCAP, Term.KERNEL_DROPOUT} <= case.terms:
        reasons.append("takes no softcap beside dropout")
    return reasons


def _rate(terms: TileTerms) -> float:
    return terms.dropout.rate if terms.dropout is not None else _NO_DROPOUT


def _kept(state: Tensor, terms: TileTerms) -> tuple[Tensor, ...]:
    """What the backward pass draws the same dropout from."""
    return () if terms.dropout is None else (state,)


def _import_reasons(module: str, case: TileCase) -> list[str]:
    """Why `module` cannot be had; where it would not be used anyway, only whether its package is there."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        return [f"{package} is not installed"]
    if case.device_type != "cuda":
        return []
    try:
        import_module(module)
    except ImportError as error:
        return [f"{module} cannot be imported: {error}"]
    return []


def _flash_attn_3_reasons(module: ModuleType) -> list[str]:
    """Why the functions of `module` cannot be called by position as above: another argument would be the scale."""
    for name, place in _SCALE_OF_FLASH_ATTN_3.items():
        function = getattr(module, name, None)
        if function is None:
            return [f"this flash_attn_interface has no {name}"]
        # Newer releases make a torch.library.custom_op of the function, which takes anything and hands it on.
        arguments = list(inspect.signature(getattr(function, "_init_fn", function)).parameters)
        if arguments[place : place + 1] != ["softmax_scale"]:
            return [
                f"needs FlashAttention 3 of release 2.8.0 or newer: argument {place} of {name} is not softmax_scale"
            ]
    return []


def _window_reasons(case: TileCase) -> list[str]:
    """Windows that its set-up (flash_api.cpp) makes other ones of.

    It drops a right bound that is as large as there are keys, and puts one of as many keys beside a left bound alone.
    Of more queries than keys the first rows then see other keys than they should.
    """
    left, right = case.window
    if case.packed and (left, right) != (None, None) and right != 0:
        return [f"takes packed tiles of a window ({left}, {right}) one by one"]  # It depends on each one's size.
    dropped = right is not None and right >= case.num_keys
    added = left is not None and right is None and case.num_queries > case.num_keys + 1
    if dropped or added:
        return [f"makes another window of ({left}, {right}) on {case.num_queries} queries and {case.num_keys} keys"]
    return []


def _packed(x: Tensor) -> Tensor:
    """[1, N, T, D] as [T, N, D], fit for the kernels."""
    return _tokens_first(x).squeeze(0)


def _window(terms: TileTerms) -> tuple[bool, int, int]:
    """`causal` and the window, as its functions take them: -1 is without bound, and rows are aligned as ours."""
    if terms.window == TRIANGLE:
        return True, -1, -1
    left, right = (-1 if bound is None else bound for bound in terms.window)
    return False, left, right


def _tokens_first(x: Tensor) -> Tensor:
    """[B, N, S, D] as [B, S, N, D], fit for the kernels."""
    return fit(x).transpose(1, 2)


def _new_tokens_first(x: Tensor) -> Tensor:
    """A new tensor [B, S, N, D] for the gradient of `x`."""
    return x.new_empty(x.transpose(1, 2).shape)
