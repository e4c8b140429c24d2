"""Peak memory of one rank's attention, counted: what scripts/bench_memory.py prints, of ours and of others.

Note [Peak memory]
    A dispatch mode sees every operation, and so every storage when it appears; a weak reference tells when it is gone.
    What a rank holds at most in a forward and a backward pass is the peak: inputs, the gradient that comes and all that
    is returned included. It is a number of the program, the same on every machine; the size of a process is not (free
    memory that an allocator keeps, sockets' buffers). Attention itself is a kernel that gives tensors of the right
    shapes and computes nothing, the same for all that are counted, so that its workspace is none of theirs: it is what
    FlashAttention's backward pass takes by its source, and is given apart. Messages do not arrive: ranks are those of
    torch's fake process group, of which one runs.

Shapes: B batch, S tokens, N heads, D head size.
"""

import importlib
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mindspeed_cp.attention import ContextParallelAttention, RingCommunicators, compose_attention, operators
from mindspeed_cp.benchmark import flash_attn_stand_in
from mindspeed_cp.benchmark.peers import Attend, deepspeed_ulysses
from mindspeed_cp.comm import ProcessGroupCommunicator
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.kernels import KernelRegistry, TileCase, TileGradients, TileOutput, TileTerms

Maker = Callable[["MemoryCase", int], Attend]
"""Makes an attention of tensors [S, B, N, D] for a case, on a rank."""

COPIES = ("copy_", "clone", "contiguous", "index_select", "cat", "_to_copy")
"""Operations of aten that copy."""


_OPERATORS: dict[object, Callable[..., Any]] = {
    torch.ops.mindspeed_cp.attention.default: operators.forward,
    torch.ops.mindspeed_cp.attention_backward.default: operators.backward,
}
"""Ours, and what they run."""


class PeakMemory(TorchDispatchMode):
    """Counts, while it is entered, the bytes of all storages alive; see Note [Peak memory]. Looks into our operators.

    now, peak: bytes. copied: bytes written by operations that copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.copied = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: what has been compiled runs as it is within it."""
        return True

    def hold(self, *tensors: Tensor) -> None:
        """Count what was there before."""
        for x in tensors:
            self._see(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (runs := _OPERATORS.get(func)) is not None:
            with self:
                return runs(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for x in tree_iter((args, kwargs, result)):
            if isinstance(x, Tensor):
                self._see(x)
        if func.overloadpacket.__name__ in COPIES:
            self.copied += next(x.nbytes for x in tree_iter(result) if isinstance(x, Tensor))
        return result

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.now -= nbytes

        self._alive[key] = weakref.ref(storage, gone)
        self.now += nbytes
        self.peak = max(self.peak, self.now)


class ShapesKernel:
    """Gives tensors of the right shapes, in memory as FlashAttention does, and computes nothing."""

    name = "shapes"

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        """There are none."""
        return []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel."""
        return TileOutput(token_major(q, v.size(3)), q.new_zeros(q.shape[:3], dtype=torch.float32))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel."""
        return TileGradients(*(token_major(x, x.size(3)) for x in (q, k, v)))


def token_major(like: Tensor, size: int) -> Tensor:
    """Zeros [B, N, S, size] for one of [B, N, S, D], that lie as [B, S, N, size]."""
    batch, heads, tokens, _ = like.shape
    return like.new_zeros((batch, tokens, heads, size)).transpose(1, 2)


@dataclass(frozen=True)
class MemoryCase:
    """What is counted: one rank of an attention. tokens: of all ranks."""

    num_ranks: int = 4
    tokens: int = 8192
    num_heads: int = 8
    head_size: int = 64
    dtype: torch.dtype = torch.bfloat16

    def inputs(self) -> list[Tensor]:
        """q, k, v and dout of a rank, [S, B, N, D] as Megatron has them."""
        shape = self.tokens // self.num_ranks, 1, self.num_heads, self.head_size
        *qkv, dout = (torch.zeros(shape, dtype=self.dtype) for _ in range(4))
        return [*(x.requires_grad_() for x in qkv), dout]

    @property
    def tensor(self) -> int:
        """Bytes of one of q, k, v and out of a rank."""
        return self.tokens // self.num_ranks * self.num_heads * self.head_size * self.dtype.itemsize

    @property
    def lse(self) -> int:
        """Bytes of a rank's log-sum-exp."""
        return self.tokens // self.num_ranks * self.num_heads * 4

    @property
    def workspace(self) -> int:
        """What FlashAttention's backward pass takes in the largest call: dq in fp32, and a number a row.

        Under Ulysses these are more tokens of fewer heads.
        """
        rows = self.tokens // self.num_ranks * self.num_heads
        return rows * (self.head_size + 1) * 4


@dataclass(frozen=True)
class Counted:
    """Bytes of a pass. saved: held between the passes beside inputs, dout and output. copied: in the two passes."""

    peak: int
    saved: int
    copied_forward: int
    copied_backward: int


def count(attend: Attend, inputs: list[Tensor]) -> Counted:
    """What a rank holds in both passes of `attend`; its second run counts, when all that is made once is there."""
    q, k, v, dout = inputs
    torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
    with PeakMemory() as counter:
        counter.hold(q, k, v, dout)
        out = attend(q, k, v)
        between, forward = counter.now - dout.nbytes - sum(x.nbytes for x in (q, k, v)) - out.nbytes, counter.copied
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        del gradients
    return Counted(counter.peak, between, forward, counter.copied - forward)


def join_fake_group(rank: int, size: int) -> None:
    """Make the default group one of which this rank alone runs: nothing is sent, and nothing arrives."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())


def ours(config: ContextParallelConfig, rank: int) -> Attend:
    """Our attention of tensors [S, B, N, D], on one rank of the fake default group."""
    attention = composed(config, rank)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v))).permute(2, 0, 1, 3)

    return attend


def composed(config: ContextParallelConfig, rank: int) -> ContextParallelAttention:
    """Our attention on one rank of the fake default group, over a kernel that computes nothing."""
    group, topology = dist.group.WORLD, config.topology
    assert group is not None, "join_fake_group has made it"
    ulysses = ring = None
    if topology.ulysses > 1:
        ulysses = ProcessGroupCommunicator(group, ranks=tuple(topology.ulysses_ranks(rank)))
    if topology.ring_size > 1:
        along = ProcessGroupCommunicator(group, ranks=tuple(topology.ring_ranks(rank)))
        ring = RingCommunicators(along, along, along)
    attention = compose_attention(
        config, rank=rank, ulysses=ulysses, ring=ring, kernels=KernelRegistry((ShapesKernel(),))
    )
    return ContextParallelAttention(attention, config, config.layout)


def peers() -> dict[str, Maker]:
    """What is installed of other implementations, by name; each gives its attention of tensors [S, B, N, D] on a rank.

    They get a flash_attn that gives tensors of the right shapes, as `ShapesKernel` does.
    """
    flash_attn_stand_in.install()
    makers = {
        "DeepSpeed Ulysses": ("deepspeed.sequence.layer", _deepspeed),
        "yunchang Ulysses": ("yunchang", _yunchang_ulysses),
        "ring_flash_attn zigzag": ("ring_flash_attn", _ring_flash_attn),
        "yunchang USP 2x2, zigzag": ("yunchang", _yunchang_hybrid),
    }
    found: dict[str, Maker] = {}
    for name, (module, make) in makers.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"not counted: {name} ({error})", file=sys.stderr)
            continue
        found[name] = make
    return found


def _batch_first(attention: Attend) -> Attend:
    """An attention of [B, S, N, D] as one of [S, B, N, D]; no copy for one sample."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)

    return attend


def _deepspeed(case: MemoryCase, rank: int) -> Attend:
    local = sys.modules["flash_attn"].flash_attn_func
    return _batch_first(deepspeed_ulysses(lambda q, k, v: local(q, k, v, causal=True), "fake"))


def _yunchang_ulysses(case: MemoryCase, rank: int) -> Attend:
    from yunchang import UlyssesAttention

    attention = UlyssesAttention(dist.group.WORLD)
    return _batch_first(lambda q, k, v: attention(q, k, v, causal=True))


def _yunchang_hybrid(case: MemoryCase, rank: int) -> Attend:
    from yunchang import LongContextAttention, set_seq_parallel_pg

    set_seq_parallel_pg(2, case.num_ranks // 2, rank, case.num_ranks)
    attention = LongContextAttention(ring_impl_type="zigzag")
    return _batch_first(lambda q, k, v: attention(q, k, v, causal=True))


def _ring_flash_attn(case: MemoryCase, rank: int) -> Attend:
    from ring_flash_attn import zigzag_ring_flash_attn_func

    return _batch_first(lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True))
