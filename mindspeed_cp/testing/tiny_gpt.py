"""A tiny GPT in plain PyTorch, the same one in any kind of tensor parallelism, and a task that it learns.

Shapes: B batch, S sequence, H features, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_cp.sharding import SequenceLayout
from mindspeed_cp.tensor_parallel import (
    MLP,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    SelfAttention,
    TensorMesh,
    TiedEmbedding,
    TransformerBlock,
    cross_entropy,
    shard_tokens,
)
from mindspeed_cp.tensor_parallel.block import Attend
from mindspeed_cp.tensor_parallel.linear import Gathering


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model and of its batches. gated: its MLPs are SwiGLU. tied: the head's weight is the embedding's table."""

    batch: int = 8
    sequence: int = 16
    hidden: int = 32
    heads: int = 8
    kv_heads: int = 4
    layers: int = 2
    vocabulary: int = 64
    gated: bool = False
    tied: bool = False


class Attention(nn.Module):
    """Causal self-attention; features of qkv by key/value head: its queries, its key, its value.

    attend: gives the output of q [B, N, S, D] over k and v [B, G, S, D]; torch's own at first.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = _causal_attention
        self.heads, self.kv_heads, self.size = sizes.heads, sizes.kv_heads, sizes.hidden // sizes.heads
        self.qkv = nn.Linear(sizes.hidden, (sizes.heads + 2 * sizes.kv_heads) * self.size)
        self.proj = nn.Linear(sizes.hidden, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, H]."""
        batch, sequence, _ = x.shape
        groups = self.qkv(x).view(batch, sequence, self.kv_heads, -1, self.size)
        q = groups[..., :-2, :].reshape(batch, sequence, self.heads, self.size).transpose(1, 2)
        k, v = (groups[..., place, :].transpose(1, 2) for place in (-2, -1))
        out = self.attend(q, k, v)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(x.shape))
        return projected


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class PlainMLP(nn.Module):
    """H -> 4H -> H, with a gate or without."""

    def __init__(self, hidden: int, gated: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.gate = nn.Linear(hidden, 4 * hidden) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H]."""
        hidden = F.gelu(self.fc1(x)) if self.gate is None else F.silu(self.gate(x)) * self.fc1(x)
        out: Tensor = self.fc2(hidden)
        return out


class Block(nn.Module):
    """A transformer block that normalizes before each of its parts."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(sizes.hidden), nn.LayerNorm(sizes.hidden)
        self.attention, self.mlp = Attention(sizes), PlainMLP(sizes.hidden, sizes.gated)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, S, H]."""
        x = x + self.attention(self.norm_1(x))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


class GPT(nn.Module):
    """The whole model, made from a seed, on one rank."""

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        super().__init__()
        self.sizes = sizes
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.positions = nn.Embedding(sizes.sequence, sizes.hidden)
        self.blocks = nn.ModuleList([Block(sizes) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        if sizes.tied:
            self.tokens.weight = self.head.weight
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.1, generator=generator)

    def loss(self, batch: "Batch") -> Tensor:
        """Mean loss of a batch."""
        x = self.tokens(batch.tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch.labels.flatten())


class Batch(NamedTuple):
    """tokens, labels: [B, S]."""

    tokens: Tensor
    labels: Tensor


def make_batch(sizes: Sizes, step: int) -> Batch:
    """Sequences in which a token is followed by the one that a fixed permutation says, most of the time."""
    generator = torch.Generator().manual_seed(1000 + step)
    follows = torch.randperm(sizes.vocabulary, generator=torch.Generator().manual_seed(1))
    shape = (sizes.batch, sizes.sequence + 1)
    sequence = torch.randint(sizes.vocabulary, shape, generator=generator)
    surprise = torch.rand(shape, generator=generator) < 0.1
    for place in range(1, shape[1]):
        sequence[:, place] = torch.where(surprise[:, place], sequence[:, place], follows[sequence[:, place - 1]])
    return Batch(sequence[:, :-1], sequence[:, 1:])


class ShardedGPT(nn.Module):
    """The same model on a mesh.

    attend: attention over the ranks that share a sequence, see SelfAttention. layout: which tokens each of these holds;
    in order where it is None. dropout: of the branches of each block.
    """

    order: Tensor

    def __init__(
        self,
        whole: GPT,
        mesh: TensorMesh,
        *,
        attend: Attend | None = None,
        layout: SequenceLayout | None = None,
        gathering: Gathering = "keep",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mesh, sizes = mesh, whole.sizes
        head = Linear.from_linear(whole.head, mesh, gathering=gathering)
        self.tokens = TiedEmbedding(head) if sizes.tied else Embedding.from_embedding(whole.tokens, mesh)
        self.positions = Embedding.from_embedding(whole.positions, mesh, vocabulary=())
        self.blocks = nn.ModuleList()
        for block in whole.blocks:
            assert isinstance(block, Block)
            attention = SelfAttention(
                block.attention.qkv,
                block.attention.proj,
                mesh,
                num_heads=sizes.heads,
                num_kv_heads=sizes.kv_heads,
                attend=attend,
                gathering=gathering,
            )
            norms = (LayerNorm.from_norm(norm, mesh) for norm in (block.norm_1, block.norm_2))
            gate, activation = (block.mlp.gate, F.silu) if sizes.gated else (None, F.gelu)
            mlp = MLP(block.mlp.fc1, block.mlp.fc2, mesh, gate=gate, activation=activation, gathering=gathering)
            norm_1, norm_2 = norms
            drop = Dropout(dropout, mesh) if dropout else None
            self.blocks.append(TransformerBlock(norm_1, attention, norm_2, mlp, drop))
        self.norm = LayerNorm.from_norm(whole.norm, mesh)
        self.head = head
        places = torch.arange(sizes.sequence)
        if layout is not None:
            places = torch.cat([layout.shard(places, rank, dim=0) for rank in range(layout.size)])
        self.register_buffer("order", places, persistent=False)

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch that all ranks have whole, the same on all of them."""
        outer, inner = self.mesh.kind.outer, self.mesh.kind.inner
        places = self.order.expand_as(batch.tokens)
        x = self.tokens(shard_tokens(batch.tokens[:, self.order], outer, self.mesh))
        x = x + self.positions(shard_tokens(places, outer, self.mesh))
        for block in self.blocks:
            x = block(x)
        labels = shard_tokens(batch.labels[:, self.order], inner, self.mesh)
        return cross_entropy(self.head(self.norm(x)), labels, self.mesh)


def train(model: GPT | ShardedGPT, sizes: Sizes, steps: range) -> list[float]:
    """Losses of so many steps with Adam."""
    return train_with(torch.optim.Adam(model.parameters(), lr=1e-2), model.loss, sizes, steps)


def train_with(
    optimizer: torch.optim.Optimizer, loss_of: Callable[[Batch], Tensor], sizes: Sizes, steps: range
) -> list[float]:
    """Losses of so many steps."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(make_batch(sizes, step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
