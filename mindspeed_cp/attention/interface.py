"""What every attention here is asked, and gives: by a caller's keywords, or by a plan and terms that are made already.

`Attention` is what callers see, `GridAttention` what it is composed of. Each has its four methods here, once: what is
asked for becomes a value, and an attention is one method that takes it.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T keys, D key head size, V value head size.
"""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

from torch import Tensor

from mindspeed_cp.attention.latent import Latent
from mindspeed_cp.attention.repeated_heads import RepeatedHeads
from mindspeed_cp.attention.terms import AttentionTerms, Terms
from mindspeed_cp.plan import AttentionPlan

Wanted = Literal["output", "output and log-sum-exp", "output and largest scores"]
OUTPUT: Wanted = "output"
WITH_LSE: Wanted = "output and log-sum-exp"
WITH_LARGEST: Wanted = "output and largest scores"
"""What can be asked back, in the words in which ranks agree on it."""

Source = tuple[Tensor, Tensor] | Latent
"""Keys [B, G, S, D] and values [B, G, S, V], or what they are made of."""
SourceOfPart = Source | RepeatedHeads
"""The same of a part of the heads, which may be told to be repeated."""


class Told(NamedTuple):
    """What a call is told beside queries, keys and values, by the keywords of `Attention`."""

    scale: float | Tensor | None = None
    visible: Tensor | None = None
    plan: AttentionPlan | None = None
    terms: AttentionTerms | None = None


class Attention(ABC):
    """Attention over however many ranks: each gives its own tokens' queries, keys and values."""

    @property
    @abstractmethod
    def exchanges_heads(self) -> bool:
        """Whether it attends with exchanged tensors, as under Ulysses, and saves none of those given but weights."""

    @abstractmethod
    def check(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | None = None) -> None:
        """Raise ValueError where this algorithm cannot take tensors of these shapes; nothing is sent or computed."""

    @abstractmethod
    def check_latent(self) -> None:
        """Raise ValueError where a latent cannot travel."""

    @abstractmethod
    def attend(self, wanted: Wanted, q: Tensor, source: Source, told: Told) -> tuple[Tensor, ...]:
        """The output, and what is wanted beside it; see the methods below."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | Tensor | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> Tensor:
        """Attention output of this rank's queries over the keys of all ranks.

        q: [B, N, S, D]; k: [B, G, S, D]; v: [B, G, S, V]; one floating dtype, any strides.
        scale: factor on the scores, 1 / sqrt(D) by default.
        visible: the mask's rows for this rank's queries, [S, T] or [1 or B, 1 or N, S, T] bool with T the tokens of the
            whole sequence in order, True where a query sees a key. Only for attention that was built without a causal
            mask; without it every query sees every key.
        plan: who holds what and sees whom (`PackedBatch.plan`, say), in place of equal shards and of the type of mask
            that the attention was built with; ranks may then have different numbers of tokens. The same on all ranks.
            Beside `visible` it says who holds what alone: one document, in which all see all.
        terms: sinks, softcap, ALiBi, bias, dropout.

        Returns [B, N, S, V] in the dtype of q, differentiable in q, k, v and the terms that are learnable; 0 in rows
        that see no key.
        """
        (out,) = self.attend(OUTPUT, q, (k, v), Told(scale, visible, plan, terms))
        return out

    def with_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | Tensor | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output, and the log-sum-exp of each query's scores, a sink's among them.

        The latter is [B, N, S] in fp32 (fp64 for fp64 inputs), natural logarithm, -inf in rows that see no key, and
        differentiable too. Where gradients are wanted, eight more numbers travel with each token and head of v, and of
        k where it is as large. Arguments are those of the call.
        """
        out, lse = self.attend(WITH_LSE, q, (k, v), Told(scale, visible, plan, terms))
        return out, lse

    def with_largest(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | Tensor | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output, and the largest score of each head among those that this rank has computed.

        The latter is [N] in fp32 (fp64 for fp64 inputs), without a gradient: scores as the softmax takes them, sinks
        left out; -inf for heads that this rank has not computed. QK-clip takes the largest over all ranks. Arguments
        are those of the call.
        """
        out, largest = self.attend(WITH_LARGEST, q, (k, v), Told(scale, visible, plan, terms))
        return out, largest

    def of_latent(
        self,
        q: Tensor,
        latent: Latent,
        *,
        scale: float | Tensor | None = None,
        visible: Tensor | None = None,
        plan: AttentionPlan | None = None,
        terms: AttentionTerms | None = None,
    ) -> Tensor:
        """The output over keys and values that are made of a latent, which travels in their place.

        latent: of this rank's tokens; of the dtype of q, as what is made of it. The rest as in the call.

        Returns [B, N, S, V], differentiable in the payload and the weights too; the gradients of weights are this
        rank's part of them. Raises ValueError for what is no Latent.
        """
        if not isinstance(latent, Latent):
            raise ValueError(f"latent is a {type(latent).__name__}; give Latent(payload, expand, weights).")
        (out,) = self.attend(OUTPUT, q, latent, Told(scale, visible, plan, terms))
        return out


class GridAttention(ABC):
    """Attention between the ranks of a grid, or of one of its axes, by a plan between them.

    A call is in order and agreed on (`ContextParallelAttention`), and terms have their scale and mask. Tensors and
    results are those of `Attention`.
    """

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank's number among those that the plan deals to."""

    @property
    def exchanges_heads(self) -> bool:
        """See Attention."""
        return False

    @abstractmethod
    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError where tensors of these shapes cannot be dealt to the ranks."""

    @abstractmethod
    def check_latent(self) -> None:
        """Raise ValueError where a latent cannot travel."""

    @abstractmethod
    def attend(
        self, wanted: Wanted, q: Tensor, source: Source, plan: AttentionPlan, terms: Terms
    ) -> tuple[Tensor, ...]:
        """The output, and what is wanted beside it."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms) -> Tensor:
        """See Attention."""
        return self.attend(OUTPUT, q, (k, v), plan, terms)[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms) -> tuple[Tensor, Tensor]:
        """See Attention."""
        out, lse = self.attend(WITH_LSE, q, (k, v), plan, terms)
        return out, lse

    def with_largest(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms) -> tuple[Tensor, Tensor]:
        """See Attention."""
        out, largest = self.attend(WITH_LARGEST, q, (k, v), plan, terms)
        return out, largest

    def of_latent(self, q: Tensor, latent: Latent, plan: AttentionPlan, terms: Terms) -> Tensor:
        """See Attention."""
        return self.attend(OUTPUT, q, latent, plan, terms)[0]
