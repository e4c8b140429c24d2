"""MLP, self-attention and transformer block of every kind, from whole modules.

Shapes: B batch, S sequence, H features, N query heads, G key/value heads, D head size; all of one rank where q, k and v
are meant.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_cp.tensor_parallel.dropout import Dropout
from mindspeed_cp.tensor_parallel.layout import Sharded
from mindspeed_cp.tensor_parallel.linear import Gathering, Linear, apply_together
from mindspeed_cp.tensor_parallel.mesh import TensorMesh
from mindspeed_cp.tensor_parallel.norms import LayerNorm, RMSNorm

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q [B, N, S, D] over k and v [B, G, S, D]."""


class MLP(nn.Module):
    """fc2(activation(fc1(x))), or gated, fc2(activation(gate(x)) * fc1(x)): SwiGLU where the activation is silu."""

    def __init__(
        self,
        fc1: nn.Linear,
        fc2: nn.Linear,
        mesh: TensorMesh,
        *,
        gate: nn.Linear | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        gathering: Gathering = "keep",
        overlap: bool = True,
    ) -> None:
        """fc1, fc2, gate: whole. activation: elementwise. gathering, overlap: see Linear.

        Raises ValueError where fc2 does not take what fc1 gives, gate has other sizes than fc1, or one of these two has
        a bias and the other has none.
        """
        super().__init__()
        if gate is not None and (gate.weight.shape != fc1.weight.shape or (gate.bias is None) != (fc1.bias is None)):
            raise ValueError(
                f"a gate {_in_words(gate)} does not go with fc1 {_in_words(fc1)}; give both the same sizes, and both "
                f"a bias or none."
            )
        if fc2.in_features != fc1.out_features:
            raise ValueError(
                f"fc1 gives {fc1.out_features} features, and fc2 takes {fc2.in_features}; make one for the other."
            )
        self.fc1 = Linear.from_linear(fc1, mesh, gathering=gathering, overlap=overlap)
        self.gate = None if gate is None else Linear.from_linear(gate, mesh, gathering=gathering, overlap=overlap)
        self.activation = activation
        inner = self.fc1.layouts.output
        self.fc2 = Linear.from_linear(fc2, mesh, input=inner, gathering=gathering, overlap=overlap)

    def forward(self, x: Sharded) -> Sharded:
        """x: [B, S, H] or [B, H] as activations lie between blocks; the output lies so too."""
        if self.gate is None:
            hidden: Sharded = self.fc1(x)
            hidden = hidden.map(self.activation)
        else:
            gate, value = apply_together([self.gate, self.fc1], x)
            hidden = gate.map(lambda local: self.activation(local) * value.local)
        y: Sharded = self.fc2(hidden)
        return y


def _in_words(linear: nn.Linear) -> str:
    bias = "with" if linear.bias is not None else "without"
    return f"{linear.in_features} -> {linear.out_features} {bias} bias"


class SelfAttention(nn.Module):
    """Self-attention with the heads over the axes that shard features within a block.

    qkv gives, for each key/value head, the queries of its heads, then its key, then its value, as Megatron has them: so
    equal parts of its features are whole groups of heads.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        mesh: TensorMesh,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        attend: Attend | None = None,
        gathering: Gathering = "keep",
        overlap: bool = True,
    ) -> None:
        """qkv, proj: whole. num_heads, num_kv_heads: of all ranks, as many of both by default. gathering, overlap: see
        Linear.

        attend: torch's causal attention by default. Where axes shard the sequence within a block (y of x*y, context),
        it is attention over their ranks: build_attention over the group of `mesh.within_attention`, say, with the
        tokens in the order in which it has them.

        Raises ValueError where heads do not fit qkv, proj or the mesh, or attention over several ranks is not given.
        """
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_size = _head_size(qkv, proj, mesh, num_heads, num_kv_heads)
        if attend is None and mesh.size_of(mesh.kind.inner.sequence) > 1:
            raise ValueError(
                f"the sequence is sharded by {' and '.join(mesh.kind.inner.sequence)} within attention: give attend, "
                f"attention over their ranks, for instance of build_attention."
            )
        self.heads_per_group = num_heads // num_kv_heads
        self.attend = attend or causal_attention
        self.qkv = Linear.from_linear(qkv, mesh, gathering=gathering, overlap=overlap)
        inner = self.qkv.layouts.output
        self.proj = Linear.from_linear(proj, mesh, input=inner, gathering=gathering, overlap=overlap)

    def forward(self, x: Sharded) -> Sharded:
        """x: [B, S, H] as activations lie between blocks; the output lies so too."""
        qkv: Sharded = self.qkv(x)
        q, k, v = split_heads(qkv.local, self.heads_per_group, self.head_size)
        out = self.attend(q, k, v).transpose(1, 2).flatten(2)
        y: Sharded = self.proj(Sharded(out, qkv.layout))
        return y


def _head_size(qkv: nn.Linear, proj: nn.Linear, mesh: TensorMesh, num_heads: int, num_kv_heads: int) -> int:
    """Of a whole qkv. Raises ValueError where heads do not fit qkv, proj or the mesh."""
    axes = mesh.kind.inner.features
    ranks = mesh.size_of(axes)
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}; use a divisor of it.")
    if num_kv_heads % ranks:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} heads are cut in {ranks} parts along {' and '.join(axes)}, which do not "
            f"divide them; use a multiple of {ranks}, or a mesh with fewer ranks there."
        )
    if qkv.out_features % (num_heads + 2 * num_kv_heads):
        raise ValueError(
            f"qkv gives {qkv.out_features} features, not a multiple of {num_heads} + 2 * {num_kv_heads} heads; use one."
        )
    head_size = qkv.out_features // (num_heads + 2 * num_kv_heads)
    if proj.in_features != num_heads * head_size:
        raise ValueError(
            f"proj takes {proj.in_features} features, and {num_heads} heads of {head_size} give "
            f"{num_heads * head_size}; make it for those."
        )
    return head_size


def split_heads(qkv: Tensor, heads_per_group: int, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, N, S, D], k and v [B, G, S, D] from groups of features [B, S, G * (N/G + 2) * D], see SelfAttention."""
    groups = qkv.unflatten(-1, (-1, heads_per_group + 2, head_size))  # [B, S, G, N/G + 2, D]
    q, k, v = groups.split([heads_per_group, 1, 1], dim=3)
    return q.flatten(2, 3).transpose(1, 2), k.squeeze(3).transpose(1, 2), v.squeeze(3).transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, of one rank's whole sequence."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))


class TransformerBlock(nn.Module):
    """x + attention(norm_1(x)), and that + mlp(norm_2(that)), with dropout of both branches."""

    def __init__(
        self,
        norm_1: LayerNorm | RMSNorm,
        attention: SelfAttention,
        norm_2: LayerNorm | RMSNorm,
        mlp: MLP,
        dropout: Dropout | None = None,
    ) -> None:
        """Parts of one mesh. dropout: none by default."""
        super().__init__()
        self.norm_1, self.attention, self.norm_2, self.mlp, self.dropout = norm_1, attention, norm_2, mlp, dropout

    def forward(self, x: Sharded) -> Sharded:
        """x: [B, S, H] as activations lie between blocks; the output lies so too."""
        x = x + self._dropped(self.attention(self.norm_1(x)))
        return x + self._dropped(self.mlp(self.norm_2(x)))

    def _dropped(self, x: Sharded) -> Sharded:
        return x if self.dropout is None else self.dropout(x)
