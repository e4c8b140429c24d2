"""What a block attention kernel is: the contract that every device's kernel keeps.

Shapes: B batch, N query heads, G key/value heads (G divides N), S query tokens, T key tokens, D key head size, V value
head size. Tensors are indexed in this order and may have any strides.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What q, k and v may be of."""


class MaskKind(Enum):
    """Which keys a query sees."""

    NONE = "none"
    """All of them."""
    TRIANGLE = "triangle"
    """Key j is seen by query i where j <= i; as many keys as queries."""
    ARBITRARY = "arbitrary"
    """What a boolean tensor says."""


@dataclass(frozen=True)
class BlockMask:
    """The mask between the queries and the keys of one block.

    visible: [S, T], [1 or B, 1 or N, S, T] bool, True where the query sees the key; given exactly for ARBITRARY.
    """

    kind: MaskKind
    visible: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.kind is MaskKind.ARBITRARY) != (self.visible is not None):
            raise ValueError(
                f"{self.kind.value}: this kind of mask goes with{'' if self.visible is None else 'out'} a tensor."
            )
        if self.visible is not None and self.visible.dtype != torch.bool:
            raise ValueError(f"a mask is boolean, True where a query sees a key; this one is {self.visible.dtype}.")


class BlockCase(NamedTuple):
    """What a kernel must know to say whether it can compute a block.

    compute_capability: of an NVIDIA GPU, (9, 0) for Hopper; None elsewhere.
    """

    device_type: str
    dtype: torch.dtype
    mask: MaskKind
    num_heads: int
    num_kv_heads: int
    num_queries: int
    num_keys: int
    head_size: int
    value_head_size: int
    compute_capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        """The case in words, for messages."""
        mask = {MaskKind.NONE: "unmasked", MaskKind.TRIANGLE: "causal", MaskKind.ARBITRARY: "masked"}[self.mask]
        sizes = str(self.head_size) + (f" (values {self.value_head_size})" * (self.head_size != self.value_head_size))
        capability = "" if self.compute_capability is None else " {}.{}".format(*self.compute_capability)
        return (
            f"{mask} attention of {self.num_queries} queries over {self.num_keys} keys, {self.num_heads}:"
            f"{self.num_kv_heads} heads of {sizes}, {str(self.dtype).removeprefix('torch.')}, "
            f"{self.device_type}{capability}"
        )

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> "BlockCase":
        """The case of these tensors. Raises ValueError when no kernel takes them, or they do not fit together."""
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        if not (q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3]):
            raise ValueError(f"{shapes}: expected [B, N, S, D], [B, G, T, D] and [B, G, T, V].")
        if q.size(0) != k.size(0) or q.size(3) != k.size(3) or not k.size(1) or q.size(1) % k.size(1):
            raise ValueError(f"{shapes}: batch and head size must agree, and K/V heads divide the query heads.")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(
                f"q, k and v are of dtypes {_names(x.dtype for x in (q, k, v))}: they must be of one; cast them, "
                "k.to(q.dtype) and v.to(q.dtype) for instance."
            )
        if q.dtype not in DTYPES:
            raise ValueError(
                f"q, k and v are of dtype {_names([q.dtype])}: attention is computed in {_names(DTYPES)}; cast them, "
                "q.to(torch.float32) for instance."
            )
        if not q.device == k.device == v.device:
            raise ValueError(
                f"q, k and v are on {q.device}, {k.device} and {v.device}: they must be on one device; move them, "
                "k.to(q.device) and v.to(q.device) for instance."
            )
        if mask.kind is MaskKind.TRIANGLE and q.size(2) != k.size(2):
            raise ValueError(f"{shapes}: a triangle mask needs as many keys as queries.")
        if mask.visible is not None and not _fits(mask.visible, q, k):
            batch, num_heads, *pair = *q.shape[:3], k.size(2)
            pairs = ", ".join(map(str, pair))
            raise ValueError(
                f"a mask of {tuple(mask.visible.shape)} does not fit {shapes}: it must be [S, T] = [{pairs}] or "
                f"[1 or B, 1 or N, S, T] = [1 or {batch}, 1 or {num_heads}, {pairs}]."
            )
        return cls(
            device_type=q.device.type,
            dtype=q.dtype,
            mask=mask.kind,
            num_heads=q.size(1),
            num_kv_heads=k.size(1),
            num_queries=q.size(2),
            num_keys=k.size(2),
            head_size=q.size(3),
            value_head_size=v.size(3),
            compute_capability=torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None,
        )


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _fits(visible: Tensor, q: Tensor, k: Tensor) -> bool:
    *leading, num_queries, num_keys = visible.shape if visible.dim() in (2, 4) else (0, 0, 0, 0)
    return (num_queries, num_keys) == (q.size(2), k.size(2)) and all(
        size in (1, expected) for size, expected in zip(leading, q.shape[:2], strict=False)
    )


class BlockOutput(NamedTuple):
    """What a kernel's forward pass gives.

    out: [B, N, S, V] in the dtype of q, 0 in rows that see no key.
    lse: [B, N, S] log-sum-exp of the scaled scores, natural logarithm, -inf in rows that see no key; fp32, or fp64
        where the inputs are.
    state: what the kernel itself needs for its backward pass beside these (a random state, say).
    """

    out: Tensor
    lse: Tensor
    state: tuple[Tensor, ...] = ()


class BlockGradients(NamedTuple):
    """Gradients of a block's inputs, in their shapes and dtype."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class BlockKernel(Protocol):
    """Exact attention of a block of queries over a block of keys.

    A kernel that cannot honour an argument says so in `unsupported_reasons`; it never leaves one out. `out` and `lse`
    of the backward pass may be those of a row over more keys than this block's: a ring calls it with the merged ones.
    """

    @property
    def name(self) -> str:
        """The name by which users and messages call it."""
        ...

    def unsupported_reasons(self, case: BlockCase) -> list[str]:
        """Every reason why it cannot compute `case`; empty where it can."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> BlockOutput:
        """Attention of q over k and v, scores multiplied by `scale` before the softmax.

        scale: above 0. Fused kernels subtract the largest score before they scale, which with a negative scale is the
        wrong end: a caller folds the sign into q.
        """
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: BlockOutput,
        mask: BlockMask,
        scale: float,
    ) -> BlockGradients:
        """Gradients of q, k and v for the gradient `dout` of the output."""
        ...
