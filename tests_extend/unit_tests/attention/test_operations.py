"""Operations that a step dispatches beside its kernel: each is a launch on an accelerator, and time on the host."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_cp.attention import Attention, RingCommunicators, compose_attention
from mindspeed_cp.benchmark.one_gpu import ImmediateCommunicator
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.kernels import KernelRegistry, TileCase, TileGradients, TileOutput, TileTerms

RANKS = 8


class StubKernel:
    """Gives the same zeros each time, and dispatches nothing."""

    name = "stub"

    def __init__(self) -> None:
        self._outputs: dict[object, Any] = {}

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        return []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        if q.shape not in self._outputs:
            self._outputs[q.shape] = TileOutput(torch.zeros(q.shape), torch.zeros(q.shape[:3]))
        output: TileOutput = self._outputs[q.shape]
        return output

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        shapes = q.shape, k.shape
        if shapes not in self._outputs:
            self._outputs[shapes] = TileGradients(*(torch.zeros(x.shape) for x in (q, k, v)))
        gradients: TileGradients = self._outputs[shapes]
        return gradients


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(attention: Attention, *shape: int) -> tuple[int, int]:
    """How many operations the two passes dispatch, once all that is made once is there."""
    q, k, v = (torch.zeros(shape, requires_grad=True) for _ in range(3))
    dout = torch.zeros(shape)
    torch.autograd.grad(attention(q, k, v), (q, k, v), dout)
    with Counting() as forward:
        out = attention(q, k, v)
    with Counting() as backward:
        torch.autograd.grad(out, (q, k, v), dout)
    return forward.operations.total(), backward.operations.total()


@pytest.mark.parametrize("overlap", [False, True], ids=["one thing after another", "overlap"])
@pytest.mark.parametrize("rank", [0, 3, RANKS - 1])
def test_a_ring_dispatches_few_operations_a_step(rank, overlap):
    """Two views of a message and six operations of a merge; sums of three gradients going back."""
    config = ContextParallelConfig(
        context_parallel_size=RANKS, context_parallel_algo="megatron_cp_algo", use_cp_send_recv_overlap=overlap
    )
    communicator = ImmediateCommunicator(rank, RANKS, None)
    ring = RingCommunicators(communicator, communicator, communicator)
    kernels = KernelRegistry((StubKernel(),))
    attention = compose_attention(config, rank=rank, ulysses=None, ring=ring, kernels=kernels)
    forward, backward = operations(attention, 1, 2, 64, 8)
    assert forward <= 11 * RANKS
    assert backward <= 21 * RANKS


def test_a_rank_that_is_alone_dispatches_next_to_nothing():
    attention = compose_attention(
        ContextParallelConfig(), rank=0, ulysses=None, ring=None, kernels=KernelRegistry((StubKernel(),))
    )
    forward, backward = operations(attention, 1, 2, 64, 8)
    assert forward <= 8
    assert backward <= 8
