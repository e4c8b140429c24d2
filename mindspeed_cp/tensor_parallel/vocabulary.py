"""Both ends of a language model: the embedding, and the loss of logits, over a sharded vocabulary.

Shapes: B batch, S sequence, H features, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.derivatives import Once
from mindspeed_cp.tensor_parallel.collectives import (
    Along,
    check_even,
    gather,
    own_part,
    raw_gather,
    raw_reduce,
    reduce,
    scatter_sum,
    shard_tensor,
    share,
)
from mindspeed_cp.tensor_parallel.grid import Axes, Part
from mindspeed_cp.tensor_parallel.layout import Layout, Sharded
from mindspeed_cp.tensor_parallel.linear import Linear
from mindspeed_cp.tensor_parallel.mesh import TensorMesh
from mindspeed_cp.tensor_parallel.module import ShardedModule

IGNORED = -100
"""The label of a token that has no loss, as torch has it."""


def shard_tokens(whole: Tensor, layout: Layout, mesh: TensorMesh) -> Tensor:
    """This rank's part of token numbers or labels [B, S] that all ranks have, for activations that lie so.

    Raises ValueError where the mesh does not divide B or S.
    """
    placement = (layout.batch, layout.sequence)
    check_even("tokens", whole.shape, placement, mesh.grid)
    return shard_tensor(whole, placement, mesh)


class Embedding(ShardedModule):
    """A table whose rows are found by all ranks together.

    Where the axes that shard the table's rows also shard the tokens, token numbers are gathered (they are small), and
    what each rank finds in its part of the table is summed and goes home.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, mesh: TensorMesh, *, vocabulary: Axes | None = None) -> None:
        """weight: [V, H], whole. vocabulary: axes that shard its rows, the kind's by default; none for a table of
        positions, say, of which each rank needs its own tokens' rows alone.

        Raises ValueError where the mesh does not divide V or H.
        """
        super().__init__(mesh)
        self.layout = mesh.kind.outer
        self.vocabulary = mesh.kind.vocabulary if vocabulary is None else vocabulary
        placement = (self.vocabulary, self.layout.features)
        check_even("an embedding's table", weight.shape, placement, mesh.grid)
        self.own = own_part(weight.size(0), self.vocabulary, mesh)
        # The axis that cuts the tokens last is gathered first.
        self._gathered = tuple(
            Along(axis, 0 if axis in self.layout.batch else 1)
            for axis in reversed(self.layout.rows)
            if axis in self.vocabulary
        )
        self.keep_part("weight", weight, placement)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, mesh: TensorMesh, *, vocabulary: Axes | None = None
    ) -> "Embedding":
        """The same table as a whole one, which all ranks have alike."""
        return cls(embedding.weight, mesh, vocabulary=vocabulary)

    def forward(self, tokens: Tensor) -> Sharded:
        """tokens: this rank's [B, S] int64, see shard_tokens; returns [B, S, H] as activations lie between blocks."""
        for along in self._gathered:
            tokens = raw_gather(tokens, self.mesh, along)
        replicas = tuple(axis for axis in self.layout.rows if axis not in self.vocabulary)
        found = _look_up(tokens, share(self.weight, self.mesh, replicas), self.own)
        for along in reversed(self._gathered):
            found = scatter_sum(found, self.mesh, along)
        whole = tuple(axis for axis in self.vocabulary if axis not in self.layout.rows)
        return Sharded(reduce(found, self.mesh, whole), self.layout)


class TiedEmbedding(ShardedModule):
    """An embedding whose table is the weight of the model's head, the one parameter of both.

    It lies as the head's weight does, so that what the head does along an axis is done here the other way round: where
    its input is gathered, what is found goes home in parts of sums; its weight is gathered where the head's is.
    """

    weight: Tensor

    def __init__(self, head: Linear) -> None:
        """head: features to vocabulary, of activations as they lie between blocks.

        Raises ValueError where it is for others.
        """
        super().__init__(head.mesh)
        if head.layouts.input != self.mesh.kind.outer:
            raise ValueError(
                f"a head of activations with {head.layouts.input} shares no table with an embedding, which gives them "
                f"with {self.mesh.kind.outer}; make it without input=."
            )
        self.plan = head.plan
        self.wholes["weight"] = head.wholes["weight"]
        self.weight = head.weight
        self.own = own_part(self.wholes["weight"].shape[0], head.layouts.weight[0], self.mesh)

    def forward(self, tokens: Tensor) -> Sharded:
        """See Embedding.forward."""
        plan, mesh = self.plan, self.mesh
        rows = [along for along in plan.gathered_input if along.dim != -1]
        for axis, dim in rows:
            tokens = raw_gather(tokens, mesh, Along(axis, 0 if dim == 0 else 1))
        table = share(self.weight, mesh, plan.shared_weight)
        for along in plan.gathered_weight:
            table = gather(table, mesh, along)
        found = _look_up(tokens, table, self.own)
        for along in reversed(plan.gathered_input):
            found = scatter_sum(found, mesh, along)
        return Sharded(reduce(found, mesh, plan.shared_input), mesh.kind.outer)


def _look_up(tokens: Tensor, table: Tensor, own: Part) -> Tensor:
    """The rows of tokens in this rank's part of the table, and zeros for those that are elsewhere."""
    place = tokens - own.start
    elsewhere = (place < 0) | (place >= own.size)
    return F.embedding(place.masked_fill(elsewhere, 0), table).masked_fill(elsewhere.unsqueeze(-1), 0.0)


def cross_entropy(logits: Sharded, labels: Tensor, mesh: TensorMesh) -> Tensor:
    """Mean cross-entropy of all tokens of all ranks, the same number on each rank.

    logits: [B, S, V], the vocabulary sharded by the axes of its features. labels: [B, S] int64, this rank's, see
    shard_tokens with `logits.layout`; -100 is a token without a loss. Computed in fp32 (fp64 for fp64). Ranks send
    three numbers a token. Where all tokens are without a loss it is NaN, as torch's own.
    """
    losses: Tensor = _TokenLosses.apply(logits.local, labels, logits.layout.features, mesh)
    count = raw_reduce((labels != IGNORED).sum().double(), mesh, logits.layout.rows)
    return reduce(losses.sum(), mesh, logits.layout.rows) / count.to(losses.dtype)


_ONCE = Once("a loss over a vocabulary in parts", "torch.nn.functional.cross_entropy on one rank")


class _TokenLosses(torch.autograd.Function):
    """Loss of each token, 0 for those without one; forward it is the same along the axes of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, axes: Axes, mesh: TensorMesh) -> Tensor:
        x = logits.to(accumulation_dtype(logits.dtype))
        largest = x.amax(dim=-1)
        for axis in axes:
            largest = raw_gather(largest.unsqueeze(0), mesh, Along(axis, 0)).amax(dim=0)
        exponentials = (x - largest.unsqueeze(-1)).exp()
        own = own_part(x.size(-1) * mesh.size_of(axes), axes, mesh)
        place = labels - own.start
        elsewhere = (place < 0) | (place >= own.size)
        place = place.masked_fill(elsewhere, 0).unsqueeze(-1)
        target = x.gather(-1, place).squeeze(-1).masked_fill(elsewhere, 0.0)
        total, target = raw_reduce(torch.stack([exponentials.sum(dim=-1), target]), mesh, axes)
        ignored = labels == IGNORED
        ctx.save_for_backward(exponentials, total, place, elsewhere, ignored)
        ctx.dtype = logits.dtype
        losses: Tensor = (total.log() + largest - target).masked_fill(ignored, 0.0)
        return losses

    @staticmethod
    @_ONCE.only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exponentials, total, place, elsewhere, ignored = ctx.saved_tensors
        dx = exponentials / total.unsqueeze(-1)
        dx.scatter_add_(-1, place, -(~elsewhere).unsqueeze(-1).to(dx.dtype))
        dx *= grads[0].masked_fill(ignored, 0.0).unsqueeze(-1)
        return dx.to(ctx.dtype), None, None, None
