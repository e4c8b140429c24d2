"""What attention is told beside queries, keys and values, and who sees whom.

Shapes: B batch, N query heads, S query tokens of this rank, T keys of all ranks.

A term is a field here and of `TileTerms`. Kernels say themselves which they take (`TileKernel.unsupported_reasons`),
and its mathematics are in one file: sinks.py, kernels/bias.py, kernels/philox.py, kernels/reference.py. Here terms are
checked, and cut for tiles.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.kernels import Dropout, Term, TileTerms, Window
from mindspeed_cp.kernels.calls import Call
from mindspeed_cp.kernels.places import of_sample, part
from mindspeed_cp.kernels.protocol import EVERYTHING, DropoutTerms, Positions, TermGradients, part_of
from mindspeed_cp.kernels.reference import largest_scores
from mindspeed_cp.plan import AttentionPlan, total_tokens

Tensors = tuple[Tensor | None, ...]


def default_scale(head_size: int) -> float:
    """The factor on the scores where none is given: 1 / sqrt(D)."""
    return 1.0 / math.sqrt(head_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionTerms:
    """What a model asks of its attention, beside a scale and who sees whom.

    sinks: a score for each head that takes part in the softmax and has no value, [N] floating; a number for all heads,
        0.0 for off-by-one softmax. Learnable.
    softcap: c, above 0: scaled scores become c * tanh(score / c), before bias and mask.
    alibi_slopes: m, [N] floating: -m * |i - j| is added to the score of positions i and j. Learnable.
    bias: [1 or B, 1 or N, S, T] floating, added to the scores: the rows of this rank's queries, in their order, with T
        the keys of all ranks in the order of the stream. Learnable.
    dropout: of the probabilities; see there.

    Gradients of these parameters are this rank's part of them, as those of every weight: data-parallel reducers, which
    take in the context-parallel ranks, add them up. Without such a reducer, `build_attention(reduce_parameters=True)`.
    """

    sinks: Tensor | float | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    dropout: Dropout | None = None


@dataclass(frozen=True, eq=False)
class Terms(AttentionTerms):
    """All terms of the scores.

    scale: factor on them, above 0. visible: the mask's rows for this rank's queries, [S, T] or [1 or B, 1 or N, S, T]
    bool with T the tokens of the whole sequence in order, True where a query sees a key that the plan lets it see.
    largest: whether the largest score of each head is asked back.
    """

    scale: float
    visible: Tensor | None = None
    largest: bool = False

    @classmethod
    def of(cls, asked: AttentionTerms | None, scale: float, visible: Tensor | None = None) -> "Terms":
        """Those of a call."""
        if asked is None:
            return cls(scale, visible)
        return cls(scale, visible, **{field.name: getattr(asked, field.name) for field in fields(asked)})

    @property
    def tensors(self) -> Tensors:
        """Those of its parts that are tensors, in the order that `with_tensors` takes."""
        return self.visible, self._sinks, self.alibi_slopes, self.bias

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> "Terms":
        """These terms with other tensors."""
        visible, sinks, alibi_slopes, bias = tensors
        sinks_ = self.sinks if sinks is None and not isinstance(self.sinks, Tensor) else sinks
        return replace(self, visible=visible, sinks=sinks_, alibi_slopes=alibi_slopes, bias=bias)

    def of_heads(self, heads: slice) -> "Terms":
        """Those of some of the heads; but for `visible` and `bias`, which go by tokens too."""
        return replace(
            self,
            sinks=self.sinks[heads] if isinstance(self.sinks, Tensor) else self.sinks,
            alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes[heads],
            dropout=self.dropout and replace(self.dropout, first_head=self.dropout.first_head + (heads.start or 0)),
        )

    def needs(self, dtype: torch.dtype, *, looks_ahead: bool) -> frozenset[Term]:
        """What kernels have to do for queries of `dtype`; with gradients, where they are wanted now.

        looks_ahead: whether queries may see later keys.
        """
        needs = {
            Term.SOFTCAP: self.softcap is not None,
            Term.ALIBI: self.alibi_slopes is not None,
            Term.ALIBI_AHEAD: self.alibi_slopes is not None and looks_ahead,
            Term.SLOPE_GRADIENT: is_learnt(self.alibi_slopes),
            Term.BIAS: self.bias is not None,
            Term.WIDE_BIAS: self.bias is not None and torch.promote_types(dtype, self.bias.dtype) != dtype,
            Term.BIAS_GRADIENT: is_learnt(self.bias),
            Term.DROPOUT: self._drops and not self._drops_by_kernel,
            Term.KERNEL_DROPOUT: self._drops and self._drops_by_kernel,
        }
        return frozenset(term for term, is_needed in needs.items() if is_needed)

    @property
    def _drops(self) -> bool:
        return self.dropout is not None and self.dropout.rate > 0.0

    @property
    def _drops_by_kernel(self) -> bool:
        return self.dropout is not None and self.dropout.by_kernel

    @property
    def _sinks(self) -> Tensor | None:
        return self.sinks if isinstance(self.sinks, Tensor) else None


def check_terms(terms: AttentionTerms | None, q: Tensor, k: Tensor, plan: AttentionPlan | None, num_ranks: int) -> None:
    """Raise ValueError unless these are terms for q [B, N, S, D] and k [B, G, T, D] of one of so many ranks."""
    if terms is None:
        return
    if terms.softcap is not None and not 0.0 < terms.softcap < torch.inf:
        raise ValueError(f"softcap={terms.softcap} is no finite number above 0; give one, or None for no softcap.")
    for name, x in (("sinks", terms.sinks), ("alibi_slopes", terms.alibi_slopes), ("bias", terms.bias)):
        if not isinstance(x, Tensor):
            continue
        if not x.is_floating_point() or x.device != q.device:
            raise ValueError(f"{name} are {x.dtype} on {x.device}, and q is on {q.device}; give floating ones there.")
        if name != "bias" and x.shape != q.shape[1:2]:
            raise ValueError(f"{name} are {tuple(x.shape)}, and q has {q.size(1)} heads; give one for each, [N].")
    slopes = terms.alibi_slopes
    if slopes is not None and slopes.device.type == "cpu" and not slopes.isfinite().all():
        raise ValueError(f"alibi_slopes are {slopes.tolist()}; give finite numbers.")
    if terms.bias is not None:
        _check_bias(terms.bias, q, k, plan, num_ranks)


def _check_bias(bias: Tensor, q: Tensor, k: Tensor, plan: AttentionPlan | None, num_ranks: int) -> None:
    batch, num_heads, rows, _ = q.shape
    keys = k.size(2) * num_ranks if plan is None else total_tokens(plan.keys)
    fits = bias.dim() == 4 and bias.size(0) in (1, batch) and bias.size(1) in (1, num_heads)
    if not fits or bias.shape[2:] != (rows, keys):
        raise ValueError(
            f"bias is {tuple(bias.shape)}, and q {tuple(q.shape)} over the {keys} keys of all ranks takes "
            f"[1 or {batch}, 1 or {num_heads}, {rows}, {keys}]; shard its rows as q, and no columns."
        )
    if bias.size(0) < batch and plan is not None and any(sample is not None for sample, _ in plan.starts):
        raise ValueError(
            f"bias has one sample, and in this plan each of {batch} samples has documents, and so rows, of its own; "
            f"give bias.expand({batch}, -1, -1, -1), sharded as q."
        )


def terms_words(terms: AttentionTerms | None) -> str:
    """What of them has to be the same on all ranks of a call, for messages and for comparing."""
    if terms is None:
        return ""
    bias = None if terms.bias is None else (*terms.bias.shape[:2], "rows", terms.bias.size(3))
    said = (
        ("sinks", _said(terms.sinks)),
        ("softcap", terms.softcap),
        ("ALiBi", _said(terms.alibi_slopes)),
        ("a bias", None if terms.bias is None else (bias, is_learnt(terms.bias))),
        ("", terms.dropout),
    )
    return "".join(f", {name} {value}".replace(",  ", ", ") for name, value in said if value is not None)


def _said(x: Tensor | float | None) -> object:
    """A parameter in words: its shape, and whether it is learnt; its numbers are those of every rank by replication."""
    return (*x.shape, "learnable" if is_learnt(x) else "fixed") if isinstance(x, Tensor) else x


def is_learnt(x: Tensor | None) -> bool:
    """Whether its gradient is wanted now."""
    return x is not None and x.requires_grad and torch.is_grad_enabled()


class TermsOfTiles:
    """What kernels are told of each call's tiles, in one pass of a rank.

    plan: between the ranks. rank: whose queries. needs: what kernels have to do. q: the queries [B, N, S, D].
    gradients: in the backward pass, where those of parameters are added up.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        rank: int,
        terms: Terms,
        needs: frozenset[Term],
        q: Tensor,
        gradients: "ParameterGradients | None" = None,
    ) -> None:
        self._gradients = gradients
        self._plan, self._rank, self._terms, self._needs, self._q = plan, rank, terms, needs, q
        self._places: dict[tuple[bool, int], Tensor] = {}

    def of(self, owner: int, call: Call, heads: slice) -> TileTerms:
        """Of a call for some of the heads, over keys of `owner`."""
        terms = self._terms
        if terms.visible is None:
            told = call.terms(terms.scale, self._q)
        else:
            told = TileTerms(terms.scale, visible=self._visible(terms.visible, owner, call, heads))
        if not self._needs:
            return told
        slopes, dropout = terms.alibi_slopes, terms.dropout
        return replace(
            told,
            positions=self._positions(owner, call) if self._needs & _BY_POSITION else None,
            softcap=terms.softcap,
            alibi_slopes=None if slopes is None else part(slopes, 0, heads),
            bias=None if terms.bias is None else self.bias_of(terms.bias, owner, call, heads),
            dropout=self._dropout(dropout, heads) if dropout is not None and self._needs & _DROPOUT else None,
            terms=self._needs,
            gradients=self._taken_in(owner, call, heads),
        )

    def _taken_in(self, owner: int, call: Call, heads: slice) -> TermGradients | None:
        if self._gradients is None:
            return None
        return self._gradients.of(call, heads, lambda: self.columns(owner, call))

    def columns(self, owner: int, call: Call) -> Tensor:
        """Which keys of the stream are those of a call of one tile, [T] int64."""
        (tile,) = call.tiles
        return self._place(owner, of_keys=True)[tile.sample or 0, tile.keys]

    def _place(self, rank: int, *, of_keys: bool) -> Tensor:
        """Where a rank's tokens are in the stream, [1 or B, s] int64."""
        if (of_keys, rank) not in self._places:
            self._places[of_keys, rank] = self._plan.once(
                ("places", rank, of_keys), lambda: places_in_stream(self._plan, rank, of_keys=of_keys)
            ).to(self._q.device)
        return self._places[of_keys, rank]

    def _positions(self, owner: int, call: Call) -> Positions:
        batch = self._q.size(0)
        queries, keys = call.queries(self._q).given, call.keys(self._q).given
        alike = isinstance(queries.tokens, slice) and call.tiles[0].sample is None
        of_queries, of_keys = self._place(self._rank, of_keys=False), self._place(owner, of_keys=True)
        # As long as what calls count in: of queries that travel there may be less at hand.
        samples = torch.arange(batch, device=self._q.device)[:, None].expand(-1, of_queries.size(1))
        rows = [(queries, of_queries), (keys, of_keys), (queries, samples)]
        placed = [place.take((x if alike else places_of_batch(x, batch)).unsqueeze(1)).squeeze(1) for place, x in rows]
        return Positions(*placed)

    def _dropout(self, dropout: Dropout, heads: slice) -> DropoutTerms:
        numbers = torch.arange(self._q.size(1), device=self._q.device)[heads] + dropout.first_head
        return DropoutTerms(dropout.rate, dropout.key, numbers)

    def _visible(self, visible: Tensor, owner: int, call: Call, heads: slice) -> Tensor:
        """The part of a boolean mask that is about a tile, within its window."""
        (tile,) = call.tiles
        seen, window = self._columns(visible, owner, call, heads), Window(tile.left, tile.right)
        return seen if window == EVERYTHING else seen & window.visible(tile.num_queries, tile.num_keys, seen.device)

    def bias_of(self, bias: Tensor, owner: int, call: Call, heads: slice) -> Tensor:
        """The part of a bias that is about a call of one tile."""
        return self._columns(bias, owner, call, heads)

    def _columns(self, x: Tensor, owner: int, call: Call, heads: slice) -> Tensor:
        """The part of [.., S, T] that is about a call of one tile."""
        (tile,) = call.tiles
        rows = part_of(x, of_sample(tile.sample), heads)
        assert rows is not None
        return rows[..., tile.queries, :].index_select(-1, self.columns(owner, call))


_DROPOUT = frozenset({Term.DROPOUT, Term.KERNEL_DROPOUT})
_BY_POSITION = frozenset({Term.ALIBI}) | _DROPOUT


def places_in_stream(plan: AttentionPlan, rank: int, *, of_keys: bool) -> Tensor:
    """Where a rank's tokens are in the stream, [1 or B, s] int64; 0 where a sample is padded."""
    layout = plan.keys if of_keys else plan.queries
    num_samples = 1 + max((sample or 0 for sample, _ in plan.starts), default=0)
    places = torch.zeros(num_samples, layout.num_tokens(rank), dtype=torch.int64)
    for run in layout.runs(rank):
        first = plan.starts[run.sample, run.document] + run.position
        places[run.sample or 0, run.start : run.stop] = torch.arange(first, first + run.stop - run.start)
    return places


def places_of_batch(places: Tensor, batch: int) -> Tensor:
    """[B, s]; a plan does not know of samples without tokens behind the last one that has some."""
    return places.expand(batch, -1) if places.size(0) == 1 else F.pad(places, (0, 0, 0, batch - places.size(0)))


class ParameterGradients:
    """This rank's part of the gradients of slopes and bias, in the dtype of sums."""

    def __init__(self, terms: Terms, needs: frozenset[Term]) -> None:
        self._slopes = _zeros(terms.alibi_slopes) if Term.SLOPE_GRADIENT in needs else None
        self._bias = _zeros(terms.bias) if Term.BIAS_GRADIENT in needs else None

    def of(self, call: Call, heads: slice, columns: Callable[[], Tensor]) -> TermGradients:
        """What takes in those that are found for a call. columns: which keys of the stream it is about."""
        slopes, bias = self._slopes, None
        if self._bias is not None:
            (tile,) = call.tiles
            bias = part_of(self._bias, of_sample(tile.sample), heads)
            bias = None if bias is None else bias[..., tile.queries, :]
        return _GradientsOfCall(None if slopes is None else part(slopes, 0, heads), bias, columns)

    def result(self, terms: Terms, sinks: Tensor | None) -> Tensors:
        """In the order and the dtypes of `Terms.tensors`."""
        found = (None, sinks, self._slopes, self._bias)
        return tuple(
            None if gradient is None or x is None else gradient.to(x.dtype)
            for gradient, x in zip(found, terms.tensors, strict=True)
        )


class _GradientsOfCall(NamedTuple):
    """Views of the sums that are about a call, see TermGradients."""

    slopes: Tensor | None
    bias: Tensor | None
    columns: Callable[[], Tensor]

    def add_slopes(self, gradient: Tensor) -> None:
        assert self.slopes is not None, "nobody asked for the gradient of slopes"
        self.slopes.add_(gradient)

    def add_bias(self, gradient: Tensor) -> None:
        assert self.bias is not None, "nobody asked for the gradient of the bias"
        self.bias.index_add_(-1, self.columns(), gradient)


def _zeros(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.zeros_like(x, dtype=accumulation_dtype(x.dtype))


class LargestScores:
    """The largest score of each head among those of this rank, [N] in the dtype of sums, where it is asked for."""

    def __init__(self, terms: Terms, q: Tensor) -> None:
        self.result: Tensor | None = None
        if terms.largest:
            self.result = q.new_full((q.size(1),), -torch.inf, dtype=accumulation_dtype(q.dtype))

    def add(self, q: Tensor, k: Tensor, told: TileTerms, heads: slice) -> None:
        """Look at a call's scores, of some of the heads."""
        if self.result is not None:
            there = part(self.result, 0, heads)
            torch.maximum(there, largest_scores(q, k, told), out=there)
