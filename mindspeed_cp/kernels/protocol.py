"""What an attention kernel is: the contract that every device's kernel keeps.

Shapes: B batch, N query heads, G key/value heads (G divides N), S query tokens, T key tokens, D key head size, V value
head size. Tensors are indexed in this order and may have any strides.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mindspeed_cp.plan import band_area

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What q, k and v may be of."""


class Window(NamedTuple):
    """FlashAttention's window, aligned bottom right: row a of S sees, of T keys, those from a + (T - S) - left to
    a + (T - S) + right; None is without bound. Every row and every key of a tile takes part, see Note
    [Tiles] in plan/tiles.py.
    """

    left: int | None = None
    right: int | None = None

    def visible(self, num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
        """[S, T] bool, True where a row sees a key."""
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        if self.right is not None:
            visible = visible.tril(num_keys - num_queries + self.right)
        return visible if self.left is None else visible.triu(num_keys - num_queries - self.left)

    def area(self, num_queries: int, num_keys: int) -> int:
        """Pairs of row and key that see each other."""
        shift = num_keys - num_queries
        low = -num_queries if self.left is None else shift - self.left
        high = num_keys if self.right is None else shift + self.right
        return band_area(0, num_queries - 1, 0, num_keys - 1, low, high)


EVERYTHING, TRIANGLE, UPPER_TRIANGLE = Window(None, None), Window(None, 0), Window(0, None)
"""All keys; those up to the diagonal that ends in the last key; and those from it on."""


class Segments(NamedTuple):
    """Several tiles that lie one after another in the tensors of one call.

    queries, keys: [tiles + 1] int32 on the tensors' device, where each begins and the last one ends, as cu_seqlens.
    max_queries, max_keys: of the longest.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int


class Term(Enum):
    """What a kernel may be told to do to the scores beside scale and mask, and the gradients that may be wanted of it.

    `TileCase.terms` names what is; a kernel refuses what it does not know, see `term_reasons`.
    """

    SOFTCAP = "softcap"
    ALIBI = "ALiBi"
    ALIBI_AHEAD = "ALiBi of later keys"
    SLOPE_GRADIENT = "gradient of ALiBi's slopes"
    BIAS = "bias"
    WIDE_BIAS = "bias with more digits than q"
    BIAS_GRADIENT = "gradient of a bias"
    DROPOUT = "dropout by position"
    KERNEL_DROPOUT = "dropout by the kernel"


class Positions(NamedTuple):
    """Where a tile's tokens are: int64, one row for each in the batch of the call, or one for all.

    queries [1 or B, S], keys [1 or B, T]: in the stream of their sample. samples: [1 or B, S], which sample that is.
    """

    queries: Tensor
    keys: Tensor
    samples: Tensor


class DropoutTerms(NamedTuple):
    """rate: of the probabilities that are dropped. For dropout by position, key: of the generator, see philox.py, and
    heads: [N] int64, by which numbers it knows the tile's heads.
    """

    rate: float
    key: tuple[int, int]
    heads: Tensor


class TermGradients(Protocol):
    """Takes in what a kernel's backward pass has found for terms, in the dtype of sums."""

    def add_slopes(self, gradient: Tensor) -> None:
        """Add to the gradient of `alibi_slopes`, [N]."""
        ...

    def add_bias(self, gradient: Tensor) -> None:
        """Add to the gradient of `bias`, in its shape."""
        ...


@dataclass(frozen=True, eq=False)
class TileTerms:
    """What a kernel is told of a tile beside its queries, keys and values.

    scale: factor on the scores, above 0: fused kernels subtract the largest score before they scale, which with a
        negative one is the wrong end; a caller folds the sign into q.
    window: who sees whom, in each of the segments where there are some.
    visible: [S, T], [1 or B, 1 or N, S, T] bool, True where the query sees the key; then it says all of it, and the
        window is EVERYTHING.
    segments: the tiles in tensors [1, N, S, D], if there are several.

    Beside these the terms that `TileCase.terms` names; the score of query i and key j, in this order, is

        s = scale * (q_i . k_j);  s = softcap * tanh(s / softcap);  s += bias_ij - slope * |position_i - position_j|

    positions: where the tokens are, for what depends on it. softcap: above 0. alibi_slopes: [N]. bias: floating,
    [1 or B, 1 or N, S, T]. dropout: of the probabilities; the log-sum-exp is that without it. terms: all of this by
    name, and which gradients are wanted. gradients: takes these in, in the backward pass.
    """

    scale: float
    window: Window = EVERYTHING
    visible: Tensor | None = None
    segments: Segments | None = None
    positions: Positions | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    dropout: DropoutTerms | None = None
    terms: frozenset[Term] = frozenset()
    gradients: TermGradients | None = None

    def __post_init__(self) -> None:
        if self.visible is None:
            return
        if self.window != EVERYTHING:
            raise ValueError(
                f"a mask tensor beside {self.window}: it says all of who sees whom, or nothing; leave out one."
            )
        if self.visible.dtype != torch.bool:
            raise ValueError(f"a mask is boolean, True where a query sees a key; this one is {self.visible.dtype}.")

    def part(self, samples: slice, heads: slice) -> "TileTerms":
        """Those of some samples and heads."""
        return replace(
            self,
            visible=part_of(self.visible, samples, heads),
            bias=part_of(self.bias, samples, heads),
            alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes[heads],
            positions=self.positions and Positions(*(x[samples] if x.size(0) > 1 else x for x in self.positions)),
            dropout=self.dropout and self.dropout._replace(heads=self.dropout.heads[heads]),
        )


def part_of(x: Tensor | None, samples: slice, heads: slice) -> Tensor | None:
    """Some samples and heads of [S, T] or [1 or B, 1 or N, S, T], which may be the same for all of either."""
    if x is None or x.dim() == 2:
        return x
    x = x[samples] if x.size(0) > 1 else x
    return x[:, heads] if x.size(1) > 1 else x


class TileCase(NamedTuple):
    """What a kernel must know to say whether it can compute a tile.

    num_heads, num_kv_heads: of queries, and of keys and values. num_queries, num_keys: rows and columns of the tile.
    head_size, value_head_size: of queries and keys, and of values.
    compute_capability: of an NVIDIA GPU, (9, 0) for Hopper; None elsewhere. masked: whether a tensor says who sees
    whom. packed: whether there are several tiles one after another; queries and keys are then those of the longest.
    terms: what else it is told.
    """

    device_type: str
    dtype: torch.dtype
    window: Window
    num_heads: int
    num_kv_heads: int
    num_queries: int
    num_keys: int
    head_size: int
    value_head_size: int
    compute_capability: tuple[int, int] | None = None
    masked: bool = False
    packed: bool = False
    terms: frozenset[Term] = frozenset()

    def __str__(self) -> str:
        """The case in words, for messages."""
        named = {EVERYTHING: "unmasked", TRIANGLE: "causal"}
        mask = "masked" if self.masked else named.get(self.window, "windowed ({}, {})".format(*self.window))
        sizes = str(self.head_size) + (f" (values {self.value_head_size})" * (self.head_size != self.value_head_size))
        capability = "" if self.compute_capability is None else " {}.{}".format(*self.compute_capability)
        terms = "".join(f", {term.value}" for term in Term if term in self.terms)
        return (
            f"{mask} attention {'of tiles up to ' if self.packed else 'of '}{self.num_queries} queries over "
            f"{self.num_keys} keys, {self.num_heads}:{self.num_kv_heads} heads of {sizes}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device_type}{capability}{terms}"
        )

    def of_piece(self, pieces: int) -> "TileCase":
        """The case of one of so many pieces of the heads."""
        return self._replace(num_heads=self.num_heads // pieces, num_kv_heads=self.num_kv_heads // pieces)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> "TileCase":
        """The case of these tensors. Raises ValueError when no kernel takes them, or they do not fit together."""
        _check_tensors(q, k, v, terms.visible)
        return cls(
            device_type=q.device.type,
            dtype=q.dtype,
            window=terms.window,
            num_heads=q.size(1),
            num_kv_heads=k.size(1),
            num_queries=q.size(2),
            num_keys=k.size(2),
            head_size=q.size(3),
            value_head_size=v.size(3),
            compute_capability=torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None,
            masked=terms.visible is not None,
            packed=terms.segments is not None,
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> None:
    """Raise ValueError when no kernel takes these tensors, or they do not fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3]):
        raise ValueError(f"{shapes}: expected [B, N, S, D], [B, G, T, D] and [B, G, T, V]; give them so.")
    if q.size(0) != k.size(0) or q.size(3) != k.size(3) or not k.size(1) or q.size(1) % k.size(1):
        raise ValueError(
            f"{shapes}: batch and head size must agree, and K/V heads divide the query heads; give k and v so."
        )
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
    if visible is not None and not _fits(visible, q, k):
        batch, num_heads, *pair = *q.shape[:3], k.size(2)
        pairs = ", ".join(map(str, pair))
        raise ValueError(
            f"a mask of {tuple(visible.shape)} does not fit {shapes}: it must be [S, T] = [{pairs}] or "
            f"[1 or B, 1 or N, S, T] = [1 or {batch}, 1 or {num_heads}, {pairs}]."
        )


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _fits(visible: Tensor, q: Tensor, k: Tensor) -> bool:
    *leading, num_queries, num_keys = visible.shape if visible.dim() in (2, 4) else (0, 0, 0, 0)
    return (num_queries, num_keys) == (q.size(2), k.size(2)) and all(
        size in (1, expected) for size, expected in zip(leading, q.shape[:2], strict=False)
    )


class TileOutput(NamedTuple):
    """What a kernel's forward pass gives.

    out: [B, N, S, V], 0 in rows that see no key; in the dtype of q, or of sums (fp32) where the kernel has it anyway.
    lse: [B, N, S] log-sum-exp of the scaled scores, natural logarithm, -inf in rows that see no key; fp32, or fp64
        where the inputs are.
    state: what the kernel itself needs for its backward pass beside these (a random state, say).
    """

    out: Tensor
    lse: Tensor
    state: tuple[Tensor, ...] = ()


class TileGradients(NamedTuple):
    """Gradients of a tile's inputs, in their shapes; in their dtype, or of sums where the kernel has it anyway."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class TileKernel(Protocol):
    """Exact attention of the queries of a tile over its keys.

    A kernel that cannot honour an argument says so in `unsupported_reasons`; it never leaves one out.

    `out` and `lse` of the backward pass are those of a row over all the keys that it sees, of which a tile has some.
    The tiles' gradients then add up to the whole: exp(score - lse) is the probability among all keys, whichever tile it
    is computed in, and the row's dout . out is of all keys too.
    """

    @property
    def name(self) -> str:
        """The name by which users and messages call it."""
        ...

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """Every reason why it cannot compute `case`; empty where it can."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """Attention of q over k and v.

        q: [B, N, S, D], k: [B, G, T, D], v: [B, G, T, V], any strides; with segments B is 1, and S and T are the tokens
        of all tiles. Only for cases without reasons against them: nothing is checked.
        """
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """Gradients of q, k and v for the gradient `dout` [B, N, S, V] of the output.

        output: of the rows over all their keys.
        """
        ...


def term_reasons(case: TileCase, *taken: Term) -> list[str]:
    """Why a kernel that takes these terms and no others cannot compute `case`."""
    return [f"takes no {term.value}" for term in Term if term in case.terms and term not in taken]


def one_at_a_time_reasons(case: TileCase) -> list[str]:
    """Why a kernel that takes one tile a call cannot compute `case`."""
    return ["takes one tile a call"] if case.packed else []


def cut_window_reasons(case: TileCase) -> list[str]:
    """Why a kernel that takes rectangles and lower triangles, one a call, cannot compute `case`."""
    if case.packed:
        return one_at_a_time_reasons(case)
    square = case.num_queries == case.num_keys
    if case.window == EVERYTHING or (case.window == TRIANGLE and square):
        return []
    return ["takes no window ({}, {}) on {} queries and {} keys".format(*case.window, case.num_queries, case.num_keys)]
