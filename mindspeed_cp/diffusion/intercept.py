"""A module's calls of scaled_dot_product_attention, run over a mesh while a `with` block lasts.

Note [Replicated or shared]
    Under sequence parallelism a call's keys are either this rank's share, or ones that all ranks have (the text of
    cross-attention). The first time that a call is met, ranks compare how many tokens they have and a sample of their
    keys and values. Where those are the same on all ranks the call is computed as it is, without messages; else it runs
    over the mesh. Neither answer can be wrong: attention over P copies of the same keys is attention over one of them,
    so keys that are equal on all ranks by chance give the same output both ways.

    The answer is remembered by what all ranks have come with and by the number of the call within the module's forward
    pass. Ranks that remember and ranks that ask would wait for each other, so both have to be the same on all of them.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mindspeed_cp.diffusion.attention import MeshAttention
from mindspeed_cp.diffusion.mesh import Axis, ParallelMesh
from mindspeed_cp.diffusion.tokens import Shares
from mindspeed_cp.kernels import KERNELS, KernelRegistry

_SEQUENCE: tuple[Axis, ...] = ("ring", "ulysses")
_SAMPLED_TOKENS = 16
"""Of each sample and head: two shares of a sequence do not agree in so many."""


@contextmanager
def parallel_attention(module: nn.Module, mesh: ParallelMesh, *, kernels: KernelRegistry = KERNELS) -> Iterator[None]:
    """Within it the module's calls of torch's scaled_dot_product_attention see the keys of all ranks of the mesh.

    The module is given this rank's share of the tokens; what all ranks have, such as a prompt's, may be given whole to
    cross-attention. See Note [Replicated or shared]. Its forward pass raises ValueError for a mask, dropout or
    causality where keys are shared, for fewer heads than the Ulysses degree, and where attention does not go through
    torch's function.
    """
    calls = AttentionCalls(mesh, kernels)
    forward = module.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        shapes = calls.shapes_of_all(tensors)
        with calls.of_pass(type(module).__name__, shapes):
            return forward(*args, **kwargs)

    module.forward = replaced
    try:
        yield
    finally:
        del module.forward


class AttentionCalls:
    """The calls of attention of one module, and what is known of each; see Note [Replicated or shared]."""

    def __init__(self, mesh: ParallelMesh, kernels: KernelRegistry = KERNELS) -> None:
        self._mesh = mesh
        self._attention = MeshAttention(mesh, kernels)
        self._known: dict[tuple[object, int], Shares | None] = {}

    def shapes_of_all(self, tensors: list[Tensor]) -> object:
        """Something that is the same on all ranks of a sequence, and differs where any rank's shapes do."""
        if self._mesh.shape.sequence == 1 or not tensors:
            return ()
        digest = _digest(repr([tuple(each.shape) for each in tensors]).encode())
        rows = self._mesh.all_gather(torch.tensor([digest], device=tensors[0].device), _SEQUENCE)
        return tuple(rows.flatten().tolist())

    @contextmanager
    def of_pass(self, name: str, shapes: object) -> Iterator[None]:
        """A forward pass of the module. name: its class. shapes: what all ranks have come with.

        Raises ValueError where no call was met, since every rank would have seen its own tokens alone.
        """
        if self._mesh.shape.sequence == 1:
            yield
            return
        numbers = _Numbers(self, shapes)
        with numbers:
            yield
        if not numbers.count:
            raise ValueError(
                f"{name} has not called torch's scaled_dot_product_attention, so that each of the "
                f"{self._mesh.shape.sequence} ranks would attend to its own tokens alone; choose torch's own attention "
                f"(diffusers: set_attention_backend('native')), or call MeshAttention where the module attends."
            )

    def attend(
        self,
        key: tuple[object, int],
        query: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """One call, with the arguments of torch's function. key: by which it is known again."""
        if key not in self._known:
            self._known[key] = self._ask(query, k, v)
        shares = self._known[key]
        if shares is None:
            options: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
            return F.scaled_dot_product_attention(query, k, v, attn_mask, dropout_p, is_causal, scale=scale, **options)
        if attn_mask is not None or dropout_p or is_causal:
            given = "a mask" if attn_mask is not None else f"dropout_p={dropout_p}" if dropout_p else "is_causal=True"
            raise ValueError(
                f"attention over {shares.lengths} tokens of {shares.num_ranks} ranks is given {given}, and there all "
                f"see all; leave it out (unpadded prompts need no mask), or use ring=1, ulysses=1."
            )
        return self._attention(query, k, v, shares=shares, scale=scale)

    def _ask(self, q: Tensor, k: Tensor, v: Tensor) -> Shares | None:
        """Who holds how many tokens; None where all have the same keys."""
        row = torch.tensor([q.size(-2), k.size(-2), _digest_of(k), _digest_of(v)], device=q.device)
        rows = self._mesh.all_gather(row, _SEQUENCE).tolist()
        if len({tuple(each[1:]) for each in rows}) == 1:
            return None
        queries, keys = (tuple(each[place] for each in rows) for place in (0, 1))
        if queries != keys:
            raise ValueError(
                f"attention of {queries} queries by rank over {keys} keys, which are not the same on all ranks: give "
                f"each rank the keys of its own queries, or all of them."
            )
        return Shares(queries)


class _Numbers(TorchFunctionMode):
    """Counts the calls of a pass, and has them attended. count: how many there were."""

    def __init__(self, calls: AttentionCalls, shapes: object) -> None:
        super().__init__()
        self.count = 0
        self._calls, self._shapes = calls, shapes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.count += 1
        names = {"key": "k", "value": "v"}
        return self._calls.attend(
            (self._shapes, self.count), *args, **{names.get(name, name): value for name, value in kwargs.items()}
        )


def _digest_of(x: Tensor) -> int:
    """Of a sample of its tokens."""
    sample = x.detach()[..., :: max(1, x.size(-2) // _SAMPLED_TOKENS), :]
    return digest_of(sample)


def digest_of_all(value: object) -> int:
    """Of every tensor, number and name in nested tuples, lists and dicts."""
    leaves = tree_leaves(value)
    plain = (bool, int, float, str, type(None))
    words = [
        digest_of(each) if isinstance(each, Tensor) else each for each in leaves if isinstance(each, (*plain, Tensor))
    ]
    return _digest(repr(words).encode())


def digest_of(x: Tensor) -> int:
    """Of a tensor's shape, dtype and content."""
    # A copy: what is expanded has strides of 0, which cannot be read as bytes.
    content = (
        x.detach().cpu().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().tobytes()
    )
    return _digest(repr((tuple(x.shape), x.dtype)).encode() + content)


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
