"""What the ranks run for attention/test_ulysses.py, and the inputs that they and the oracle start from."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.attention import Attention, UlyssesAttention, build_attention
from mindspeed_cp.attention.group_order import GroupOrder
from mindspeed_cp.comm import ContextParallelGroups, Traffic
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.plan import Part
from mindspeed_cp.sharding import SequenceLayout
from mindspeed_cp.topology import CPTopology
from unit_tests.communicator_cases import noted


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention over `size` ranks. Heads are counted per rank of the Ulysses group, so that they always divide.

    outer, inner: the inner rings and the ranks of each; the ranks that are left are those of a Ulysses group.
    memory: order of the dims in memory, outermost first, of the q, k, v and dout that each rank hands in.
    """

    size: int
    outer: int = 1
    inner: int = 1
    overlap: bool = False
    pieces: int = 1
    bnsd: bool = False
    kv_cache_policy: Literal["full", "half"] | None = None
    heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    tokens: int = 6
    head_size: int = 8
    value_head_size: int = 8
    mask: Literal["causal", "full", "2d", "per batch", "per head"] = "causal"
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    dtype: torch.dtype = torch.float64
    memory: str = "BNSD"

    @property
    def sequence_layout(self) -> SequenceLayout:
        """Which tokens each rank holds."""
        return SequenceLayout(size=self.size, kind=self.layout)

    @property
    def topology(self) -> CPTopology:
        """The grid of ranks."""
        return CPTopology(outer=self.outer, inner=self.inner, ulysses=self.size // (self.outer * self.inner))

    @property
    def config(self) -> ContextParallelConfig:
        """The configuration that a user would give."""
        topology, algorithm = self.topology, "hybrid_cp_algo"
        if topology.ring_size == 1:
            algorithm = "ulysses_cp_algo"
        elif topology.ulysses == 1:
            algorithm = "megatron_cp_algo"
        return ContextParallelConfig(
            context_parallel_size=self.size,
            context_parallel_algo=algorithm,
            cp_window_size=self.inner if self.outer > 1 else 1,
            ulysses_degree_in_cp=topology.ulysses if algorithm == "hybrid_cp_algo" else None,
            use_cp_send_recv_overlap=self.overlap,
            attention_mask_type="causal" if self.mask == "causal" else "general",
            megatron_cp_in_bnsd=self.bnsd,
            context_parallel_kv_cache_policy=self.kv_cache_policy,
        )

    @property
    def formula_bytes(self) -> int:
        """What Ulysses on u ranks sends from each in the forward pass, and again in the backward.

        (u-1)/u * s * B * (Hq * Dq + Hkv * (Dk + Dv) + Hq * Dv) * e, with H the heads of all ranks together.
        """
        degree = self.topology.ulysses
        heads, kv_heads = degree * self.heads, degree * self.kv_heads
        numbers = heads * self.head_size + kv_heads * (self.head_size + self.value_head_size)
        numbers += heads * self.value_head_size
        return (degree - 1) * self.tokens * self.batch * numbers * self.dtype.itemsize // degree


class Inputs(NamedTuple):
    """Whole tensors [B, H, S, D], and the mask as a tensor unless there is none or it is the causal one."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    visible: Tensor | None


class Shard(NamedTuple):
    """Results for the tokens of one rank, or of all."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


@functools.lru_cache(maxsize=4)
def inputs(case: Case) -> Inputs:
    """The same in every process."""
    generator, degree = torch.Generator().manual_seed(1), case.topology.ulysses
    heads, kv_heads, length = degree * case.heads, degree * case.kv_heads, case.size * case.tokens

    def normal(num_heads: int, head_size: int) -> Tensor:
        shape = (case.batch, num_heads, length, head_size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    q, dout = normal(heads, case.head_size), normal(heads, case.value_head_size)
    k, v = normal(kv_heads, case.head_size), normal(kv_heads, case.value_head_size)
    if case.mask in ("causal", "full"):
        return Inputs(q, k, v, dout, None)
    leading = {"2d": (), "per batch": (case.batch, 1), "per head": (1, heads)}[case.mask]
    visible = torch.rand((*leading, length, length), generator=generator) < 0.4
    visible &= torch.rand((*leading, length, 1), generator=generator) < 0.8  # Dead rows, others in each head.
    visible[..., 1, :] = False
    return Inputs(q, k, v, dout, visible)


def shard_of(case: Case, x: Tensor, rank: int) -> Tensor:
    """The rank's tokens, laid out in memory as the case says."""
    order = ["BNSD".index(dim) for dim in case.memory]
    inverse = sorted(range(4), key=order.__getitem__)
    return case.sequence_layout.shard(x, rank, dim=2).permute(order).contiguous().permute(inverse)


def restored(case: Case, shards: list[Shard]) -> Shard:
    """The whole sequence from the ranks' results."""
    return Shard(*(case.sequence_layout.restore(torch.cat(parts, dim=2), dim=2) for parts in zip(*shards, strict=True)))


def forward_and_backward(rank: int, case: Case, attention: Attention) -> Shard:
    """A rank's part of the case."""
    whole = inputs(case)
    q, k, v, dout = (shard_of(case, x, rank) for x in whole[:4])
    visible = None if whole.visible is None else case.sequence_layout.shard(whole.visible, rank, dim=-2)
    for x in (q, k, v):
        x.requires_grad_()
    out = attention(q, k, v, visible=visible)
    return Shard(out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


def attend(group: dist.ProcessGroup, case: Case) -> Shard:
    """The case, built as a user builds it."""
    return forward_and_backward(
        dist.get_rank(group), case, build_attention(case.config, group, layout=case.sequence_layout)
    )


def attend_in_default_group(group: dist.ProcessGroup, case: Case) -> Shard:
    """The case over all ranks of the world, with no group given."""
    return forward_and_backward(dist.get_rank(group), case, build_attention(case.config, layout=case.sequence_layout))


def attend_in_built_groups(group: dist.ProcessGroup, case: Case) -> Shard:
    """The case over groups that were built beforehand."""
    groups = ContextParallelGroups.build(case.config.topology, group)
    return forward_and_backward(
        dist.get_rank(group), case, build_attention(case.config, groups, layout=case.sequence_layout)
    )


def attend_with_chunk_order(group: dist.ProcessGroup, case: Case, chunks: Sequence[tuple[int, int]]) -> Shard:
    """The case with its chunks, two of each member, in this order in place of the plan's."""
    half = case.tokens // 2
    parts = tuple(Part(member, chunk * half, (chunk + 1) * half) for member, chunk in chunks)
    order = GroupOrder((case.tokens,) * case.size, (parts,))
    with mock.patch.object(UlyssesAttention, "_order", lambda attention, of, layout, plan: order):
        return attend(group, case)


class Sent(NamedTuple):
    """All-to-all calls of one pass and the bytes they send to other ranks."""

    calls: int
    bytes: int


class Count(NamedTuple):
    """What one pass sent, by the library's own count, and the bytes that its backend was told to send."""

    library: Sent
    backend: int


def count_sent(group: dist.ProcessGroup, case: Case) -> tuple[Count, Count]:
    """What the forward and the backward pass send."""
    traffic = Traffic()

    def count() -> Count:
        library = Sent(traffic.calls["all_to_all"], traffic.bytes_sent["all_to_all"])
        # Not what ranks agree on beforehand.
        sent = sum(x.nbytes for way, x in started if way == "send" and x.dtype == case.dtype)
        return Count(library, sent)

    q, k, v, dout = (shard_of(case, x, dist.get_rank(group)) for x in inputs(case)[:4])
    attention = build_attention(case.config, group, layout=case.sequence_layout, traffic=traffic)
    with noted(group) as started:
        out = attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
        forward = count()
        traffic.clear()
        started.clear()
        out.backward(dout)
        return forward, count()


def attend_twice(group: dist.ProcessGroup, case: Case) -> tuple[Shard, Shard]:
    """Two runs of the case."""
    return attend(group, case), attend(group, case)


def build_error(group: dist.ProcessGroup, config: ContextParallelConfig, topology: CPTopology | None = None) -> str:
    """What `build_attention` raises over the group, or over the groups of another topology on it."""
    try:
        build_attention(config, group if topology is None else ContextParallelGroups.build(topology, group))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Shapes(NamedTuple):
    """Shapes of what one rank hands in, and the dtype of k and v where it is not fp64."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    visible: tuple[int, ...] | None = None
    kv_dtype: torch.dtype = torch.float64


def call_error(group: dist.ProcessGroup, config: ContextParallelConfig, shapes: Shapes) -> str:
    """What attention over the group raises for inputs of these shapes."""
    q = torch.zeros(shapes.q, dtype=torch.float64)
    k, v = (torch.zeros(shape, dtype=shapes.kv_dtype) for shape in (shapes.k, shapes.v))
    visible = None if shapes.visible is None else torch.ones(shapes.visible, dtype=torch.bool)
    attention = build_attention(config, group)
    try:
        attention(q, k, v, visible=visible)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
