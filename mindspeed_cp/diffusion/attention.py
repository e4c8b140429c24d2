"""Attention of a diffusion transformer over a mesh: every query sees every key, and each rank holds a share of both.

    self-attention     a rank gives q, k and v of its own tokens
    joint attention    text beside the image: sharded text is more tokens of a rank; of replicated text each rank takes
                       its share of the queries and keys, and the text's output is gathered
    cross-attention    keys that all ranks have: no message at all

Softmax asks for no order of keys, so shares may have any lengths, and nothing is padded.

Shapes: B batch, N query heads, G key/value heads, S tokens of one rank, D key head size, V value head size.

Sources: Ulysses arXiv:2309.14509, Ring Attention arXiv:2310.01889, both at once USP arXiv:2405.07719.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mindspeed_cp.attention import RingAttention, RingCommunicators, UlyssesAttention
from mindspeed_cp.attention.terms import Terms, default_scale
from mindspeed_cp.diffusion.mesh import ParallelMesh
from mindspeed_cp.diffusion.tokens import Shares, gather, split
from mindspeed_cp.kernels import KERNELS, KernelRegistry
from mindspeed_cp.messages import divisors, or_list
from mindspeed_cp.plan import FULL, AttentionPlan
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.topology import CPTopology

DimOrder = Literal["BNSD", "BSND"]
"""Of the dims of q, k, v and the output."""


class QKV(NamedTuple):
    """Queries, keys and values of the same tokens, q [B, N, S, D], k [B, G, S, D], v [B, G, S, V] or in BSND."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class MeshAttention:
    """Attention over the ranks of a mesh that share a sequence. kernels: what to choose from for each tile."""

    mesh: ParallelMesh
    kernels: KernelRegistry = KERNELS

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        shares: Shares | None = None,
        scale: float | None = None,
        dims: DimOrder = "BNSD",
    ) -> Tensor:
        """Attention output of this rank's queries over the keys of all ranks.

        q: [B, N, S, D]; k: [B, G, S, D]; v: [B, G, S, V]; one floating dtype; in BSND where `dims` says so.
        shares: how many tokens each rank holds; without it ranks ask each other, which makes the host wait.
        scale: factor on the scores, 1 / sqrt(D) by default.

        Returns [B, N, S, V], or [B, S, N, V], in the dtype of q; differentiable. Raises ValueError for tensors that do
        not fit, and where there are fewer query heads than the Ulysses degree.
        """
        q, k, v = (_bnsd(x, dims) for x in (q, k, v))
        self.check(q, k, v)
        if shares is None:
            tokens = self.mesh.all_gather(torch.tensor([q.size(2)], device=q.device), ("ring", "ulysses"))
            shares = Shares(tuple(tokens.flatten().tolist()))
        if shares.num_ranks != self.mesh.shape.sequence or shares.lengths[self.mesh.sequence_index] != q.size(2):
            raise ValueError(
                f"shares of {shares.lengths} tokens and q of {q.size(2)} on rank {self.mesh.sequence_index} of "
                f"{self.mesh.shape.sequence}: they are this call's tokens by rank; leave them out to have them asked."
            )
        terms = Terms(default_scale(q.size(3)) if scale is None else scale)
        attention = self._without_gradients if not torch.is_grad_enabled() else self._with_gradients
        return _bnsd(attention(q, k, v, _plan(shares), terms), dims)

    def joint(
        self,
        image: QKV,
        text: QKV,
        *,
        text_is: Literal["replicated", "sharded"] = "replicated",
        scale: float | None = None,
        dims: DimOrder = "BNSD",
    ) -> tuple[Tensor, Tensor]:
        """Attention outputs of image and text tokens, which all see all of both.

        image: of this rank's tokens. text: of all tokens where it is replicated, bit for bit the same on all ranks;
        else of this rank's. Returns (image, text) with the tokens as they came. Raises as the call does.
        """
        dim = 2 if dims == "BNSD" else 1
        text_tokens = text.q.size(dim)
        if text_is == "replicated":
            text = QKV(*(split(x, self.mesh, dim) for x in text))
        image_tokens = image.q.size(dim)
        both = (torch.cat(pair, dim=dim) for pair in zip(image, text, strict=True))
        out = self(*both, scale=scale, dims=dims)
        image_out, text_out = out.split([image_tokens, text.q.size(dim)], dim=dim)
        if text_is == "replicated":
            text_out = gather(text_out, Shares.of(text_tokens, self.mesh.shape.sequence), self.mesh, dim)
        return image_out, text_out

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless these are q, k and v, in BNSD, of the same tokens, with heads that can be shared."""
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} (batch, heads, tokens, head size)"
        if not q.dim() == k.dim() == v.dim() == 4:
            raise ValueError(f"{shapes}: give tensors of four dims; unsqueeze a missing one.")
        if q.size(2) != k.size(2) or k.shape[:3] != v.shape[:3] or q.size(0) != k.size(0) or q.size(3) != k.size(3):
            raise ValueError(
                f"{shapes}: they are of the same tokens of the same batch; keys that all ranks have (cross-attention) "
                f"need no mesh: give them to torch's scaled_dot_product_attention."
            )
        if q.size(1) % max(k.size(1), 1):
            heads = or_list(divisors(q.size(1)))
            raise ValueError(f"{shapes}: the key heads divide the query heads; give k and v with {heads} heads.")
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast them to one dtype.")
        refuse_heads(self.mesh, q.size(1))

    @functools.cached_property
    def _without_gradients(self) -> RingAttention | UlyssesAttention:
        """Messages travel while a step is computed: without a backward pass one group is enough for that."""
        return self._compose(overlap=True)

    @functools.cached_property
    def _with_gradients(self) -> RingAttention | UlyssesAttention:
        return self._compose(overlap=False)

    def _compose(self, overlap: bool) -> RingAttention | UlyssesAttention:
        shape, communicators = self.mesh.shape, self.mesh.communicators
        along = communicators.get("ring")
        ring = RingAttention(
            schedule=RingSchedule(outer=1, inner=shape.ring),
            communicators=None if along is None else RingCommunicators(along, along, along),
            overlap=overlap,
            kernels=self.kernels,
        )
        if "ulysses" not in communicators:
            return ring
        groups = CPTopology(inner=shape.ring, ulysses=shape.ulysses).ulysses_groups
        return UlyssesAttention(communicators["ulysses"], groups, self.mesh.index("ring"), ring)


def refuse_heads(mesh: ParallelMesh, heads: int) -> None:
    """Raise ValueError where a rank of a Ulysses group would get none of a tensor-parallel rank's query heads."""
    degree, sequence = mesh.shape.ulysses, mesh.shape.sequence
    if heads < degree:
        fits = [each for each in range(1, heads + 1) if sequence % each == 0]
        ways = " or ".join(f"ulysses={each}, ring={sequence // each}" for each in reversed(fits))
        raise ValueError(
            f"ulysses={degree} is more than the {heads} query heads of a rank (tp={mesh.shape.tp}), and each rank of "
            f"its group attends for one at least; use {ways}."
        )


@functools.lru_cache(maxsize=256)
def _plan(shares: Shares) -> AttentionPlan:
    """All see all, made once for all layers and steps."""
    return AttentionPlan(shares, shares, FULL)


def _bnsd(x: Tensor, dims: DimOrder) -> Tensor:
    """Between the given order and BNSD, either way."""
    if dims not in get_args(DimOrder):
        raise ValueError(f"dims={dims!r} is no order of dims; use {' or '.join(get_args(DimOrder))}.")
    return x if dims == "BNSD" else x.transpose(1, 2)
