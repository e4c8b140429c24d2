"""What a layer of Megatron's computes: who sees whom, as it comes to a layer, and attention by that.

Shapes: S tokens of this rank, B batch, N heads of this tensor-parallel rank, G K/V heads of it, D head size,
V head size of the values (D but in latent attention), T tokens of all ranks.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from mindspeed_cp.attention import AttentionTerms, ContextParallelAttention
from mindspeed_cp.attention.interface import OUTPUT, WITH_LARGEST, Told
from mindspeed_cp.documents import WindowSize
from mindspeed_cp.messages import or_list
from mindspeed_cp.patches.dropout import LayerDropout
from mindspeed_cp.patches.latent_travel import UpProjection
from mindspeed_cp.patches.packing import (
    CAUSAL_WINDOW,
    FULL_WINDOW,
    Packing,
    is_documents,
    layout_of_length,
    plan_of_documents,
    plan_of_window,
)
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.sharding import SequenceLayout

_ON_ONE_RANK = ("--attention-on-one-rank", "--use-alibi", "--qk-clip", "--log-max-attention-logit", "packed streams")
"""With which this plugin computes attention without context parallelism too, beside --hybrid-context-parallel."""

WITHOUT_MASK: dict[str, WindowSize] = {"causal": CAUSAL_WINDOW, "no_mask": FULL_WINDOW, "padding": FULL_WINDOW}
"""What a layer's mask type, by Megatron's name, means where no mask comes: what the local spec's own attention computes
at CP = 1. The others (arbitrary, padding_causal, causal_bottom_right) say nothing without one there."""

WINDOWED: dict[str, WindowSize] = {
    "causal": CAUSAL_WINDOW,
    "padding_causal": CAUSAL_WINDOW,
    "no_mask": FULL_WINDOW,
    "padding": FULL_WINDOW,
}
"""What a query sees of its document, by the layer's mask type; where that is causal, the layer may have a window."""


@dataclass(frozen=True)
class LayerAttention:
    """Our attention of one layer, in Megatron's terms; on one rank too.

    by_plan: takes plans; without one each token sees itself and what came before.
    by_mask: takes the batch's mask; without one all see all. None with --attention-mask-type causal, where the batch's
        mask is not read.
    mask_type: Megatron's name of who sees whom in this layer where no mask comes; Megatron gives one to the pipeline
        stages that have a batch, which are the first and the last.
    scale: factor on the scores.
    window: what a query of a causal layer sees of its document, (tokens before it, tokens after it), -1 being all.
    packing: how packed streams are dealt to ranks. apart_by: the flag that keeps documents apart; None where none does.
    cuts_streams_alone: whether all batches that this rank has cut are packed streams. was_cut_as_samples: whether
        the one at hand was cut as samples.
    latent: how keys and values are made of a payload, which a key then is; None where they are given.
    length: tokens of a whole sample where ranks have unequal shards of it.
    dropout: of the layer in training. watches_scores: whether the largest score of each head is asked for.
    slopes: ALiBi's, of this tensor-parallel rank's heads; None where scores do not fall with the distance.
    is_dynamic: whether each document has ranks of its own.
    """

    by_plan: ContextParallelAttention
    by_mask: ContextParallelAttention | None
    mask_type: str
    scale: float
    window: WindowSize = CAUSAL_WINDOW
    packing: Packing = field(default_factory=Packing)
    apart_by: str | None = None
    cuts_streams_alone: Callable[[], bool] = lambda: False
    was_cut_as_samples: Callable[[], bool] = lambda: False
    latent: UpProjection | None = None
    length: int | None = None
    dropout: LayerDropout | None = None
    watches_scores: bool = False
    slopes: tuple[float, ...] | None = None
    is_dynamic: bool = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        mask_type: str | None = None,
        packed: Any = None,
        sinks: Tensor | None = None,
        is_training: bool = False,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens over those of all ranks, [S, B, N * V].

        query: [S, B, N, D]; key: [S, B, G, D]; value: [S, B, G, V]; attention_mask: [B or 1, N or 1, S, T] bool, True
        where masked (as Megatron has it), with T the tokens of all ranks, or the documents that packing describes.
        mask_type: overrides the layer's own. packed: Megatron's PackedSeqParams; tensors are then [S, N, D], [S, G, D]
        and [S, G, V], and the result is [S, N * V]. sinks: a score for each head that has no value, N floating numbers;
        its gradient is this rank's part, which data-parallel reducers add up. is_training: whether dropout drops.
        watch: told the largest score of each head, [N] in the dtype of sums; -inf for those this rank has not computed.

        Raises ValueError, on all ranks, where nothing says who sees whom, for a mask of another shape or dtype, for
        documents that do not fit the tokens, and for inference.
        """
        if query.size(0) != key.size(0):
            self.refuse(
                f"{query.size(0)} queries over {key.size(0)} keys a rank: inference through Megatron is not available "
                f"in this attention; {self.way_out}.",
                query,
            )
        seen = self._who_sees_whom(query, attention_mask, mask_type or self.mask_type, packed)
        q, k, v = (_apart(x, packed is not None) for x in (query, key, value))
        out = self._attend(seen, q, k, v, terms=self._terms(sinks, is_training, query.device), watch=watch)
        return out[0].transpose(0, 1).flatten(1) if packed is not None else out.permute(2, 0, 1, 3).flatten(2)

    def _who_sees_whom(self, query: Tensor, mask: Tensor | None, mask_type: str, packed: Any) -> "_Seen":
        """What says it, the first of these that there is: a packed stream; documents; --window-size; causality; a mask
        tensor; the layer's mask type.

        Raises ValueError on all ranks where nothing says it, or two that differ.
        """
        reads_mask = mask is not None and self.by_mask is not None
        if packed is not None:
            return self._planned(query, mask_type, functools.partial(self._plan_of_stream, query, packed))
        if mask is not None and is_documents(mask):
            return self._planned(query, mask_type, lambda window: plan_of_documents(mask, self.size, window))
        apart_by = self.apart_by or ("a packed stream was cut" if self.cuts_streams_alone() else None)
        if apart_by is not None and not reads_mask:
            self.refuse(
                f"{apart_by}, and this layer was not told where documents end; import "
                f"mindspeed_cp.megatron_adaptor before megatron, and let Megatron's get_batch_on_this_cp_rank or "
                f"mindspeed_cp.megatron_adaptor.shard_batch cut the batch; where it is one packed stream, hand its "
                f"PackedSeqParams to the model.",
                query,
            )
        if self.window != CAUSAL_WINDOW:
            if reads_mask:
                self.refuse(
                    "--window-size and a mask tensor: each says who sees whom; use --attention-mask-type causal.", query
                )
            return self._planned(query, mask_type, functools.partial(self._plan_of_window, query))
        if self.by_mask is None:
            if mask_type != "causal":
                self.refuse(other_mask_type(mask_type), query)
            return _Seen(self.by_plan, self._plan_of_shards(CAUSAL_WINDOW))
        if mask is not None:
            self._check_mask(query, mask)
            return _Seen(self.by_mask, self._plan_of_shards(FULL_WINDOW), visible=~mask)
        if mask_type in WITHOUT_MASK:
            window = WITHOUT_MASK[mask_type]
            return _Seen(self.by_plan if window == CAUSAL_WINDOW else self.by_mask, self._plan_of_shards(window))
        self.refuse(
            f"a layer with the mask type {mask_type} was given no attention_mask, and without one nothing says who "
            f"sees whom; give it one, or build it with the mask type causal or no_mask.",
            query,
        )

    @property
    def size(self) -> int:
        """Context-parallel ranks."""
        return self.by_plan.config.context_parallel_size

    @property
    def rank(self) -> int:
        """This one among the context-parallel ranks."""
        agreement = self.by_plan.agreement
        return 0 if agreement is None else agreement.communicator.rank

    @property
    def way_out(self) -> str:
        """What to do to have Megatron's own attention, as an imperative clause."""
        return way_out(self.size, is_dynamic=self.is_dynamic)

    def of_latents(self, up: UpProjection) -> "LayerAttention":
        """The same where keys are payloads, of which keys and values are made."""
        return replace(self, latent=up)

    def _terms(self, sinks: Tensor | None, is_training: bool, device: torch.device) -> AttentionTerms | None:
        dropout = self.dropout.draw() if self.dropout is not None and is_training else None
        if sinks is None and dropout is None and self.slopes is None:
            return None
        return AttentionTerms(
            sinks=None if sinks is None else sinks.flatten(),
            alibi_slopes=None if self.slopes is None else _on_device(self.slopes, device),
            dropout=dropout,
        )

    def _attend(
        self,
        seen: "_Seen",
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        terms: AttentionTerms | None,
        watch: Callable[[Tensor], None] | None,
    ) -> Tensor:
        attention, plan, visible = seen
        told = Told(self.scale, visible, plan, terms)
        if self.latent is not None:
            return self.latent.attend(attention, q, k, told)
        if watch is None:
            (out,) = attention.attend(OUTPUT, q, (k, v), told)
            return out
        out, largest = attention.attend(WITH_LARGEST, q, (k, v), told)
        watch(largest)
        return out

    def refuse(self, reason: str, query: Tensor) -> NoReturn:
        """Raise ValueError on all ranks; see ContextParallelAttention.refuse."""
        self.by_plan.refuse(reason, query)

    def _plan_of_shards(self, window: WindowSize) -> AttentionPlan | None:
        """Of samples without documents, where the ranks have unequal shards of them."""
        return None if self.length is None else plan_of_window(layout_of_length(self.length, self.size), window)

    def _plan_of_window(self, query: Tensor, window: WindowSize) -> AttentionPlan:
        return self._plan_of_shards(window) or plan_of_window(SequenceLayout(size=self.size).of(query.size(0)), window)

    def _plan_of_stream(self, query: Tensor, packed: Any, window: WindowSize) -> AttentionPlan:
        if (
            self.size > 1
            and self.was_cut_as_samples()
            and not self.packing.is_cut_as_sample(packed, self.rank, self.size)
        ):
            raise ValueError(
                "PackedSeqParams of a batch that was cut as samples: ranks hold other tokens than those of a packed "
                "stream; cut it by mindspeed_cp.megatron_adaptor.shard_batch with its cu_seqlens, or hand no "
                "PackedSeqParams to the model and use --reset-attention-mask."
            )
        return self.packing.plan(packed, query.size(0), self.rank, self.size, window)

    def _planned(self, query: Tensor, mask_type: str, plan: Callable[[WindowSize], AttentionPlan]) -> "_Seen":
        """By a plan under this layer's window. Raises ValueError on all ranks where it cannot be made."""
        if mask_type not in WINDOWED:
            self.refuse(
                f"a layer with the mask type {mask_type} and documents or a window: only {or_list([*WINDOWED])} say "
                f"who sees whom in them; build it with one of these.",
                query,
            )
        try:
            window = self.window if WINDOWED[mask_type] == CAUSAL_WINDOW else WINDOWED[mask_type]
            return _Seen(self.by_plan, plan(window))
        except ValueError as error:
            self.refuse(str(error), query)

    def _check_mask(self, query: Tensor, mask: Tensor) -> None:
        tokens, batch, heads, _ = query.shape
        keys = tokens * self.size if self.length is None else self.length
        fits = mask.dim() == 4 and mask.size(0) in (1, batch) and mask.size(1) in (1, heads)
        if not fits or mask.shape[2:] != (tokens, keys) or mask.dtype != torch.bool:
            self.refuse(
                f"attention_mask is {list(mask.shape)} of {mask.dtype}, and this rank's {tokens} queries of {keys} "
                f"tokens need [{batch} or 1, {heads} or 1, {tokens}, {keys}] of torch.bool, True where masked; "
                f"Megatron's get_batch_on_this_cp_rank gives each rank the rows of its own tokens.",
                query,
            )


def way_out(context_parallel_size: int, *, is_dynamic: bool) -> str:
    """What to do to have Megatron's own attention, as an imperative clause; see LayerAttention."""
    if is_dynamic:
        return "leave out --hybrid-context-parallel"
    if context_parallel_size > 1:
        return "use --context-parallel-size 1"
    return f"leave out what has this plugin compute attention on one rank: {or_list(_ON_ONE_RANK)}"


class _Seen(NamedTuple):
    """By which attention, and with what, it is said who sees whom."""

    attention: ContextParallelAttention
    plan: AttentionPlan | None = None
    visible: Tensor | None = None


def _apart(x: Tensor, is_stream: bool) -> Tensor:
    """[B, N, S, D] of [S, B, N, D]; of a stream's [S, N, D] with a batch of one."""
    return x.unsqueeze(0).transpose(1, 2) if is_stream else x.permute(1, 2, 0, 3)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _on_device(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once for all layers."""
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def other_mask_type(mask_type: str) -> str:
    """What a layer is told whose mask type is not the one of the flag."""
    return (
        f"a layer with the mask type {mask_type} and --attention-mask-type causal: they differ; "
        f"use --attention-mask-type general."
    )
