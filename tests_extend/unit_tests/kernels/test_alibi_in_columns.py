"""ALiBi by kernels that have none: as columns of queries and keys."""

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention import AttentionTerms, ContextParallelAttention, local_attention
from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.kernels import KERNELS, KernelRegistry, Term, TileCase, TileTerms
from mindspeed_cp.kernels.alibi import AlibiInColumns
from mindspeed_cp.kernels.cuda import CudaFlashKernel, CudnnKernel, EfficientKernel
from mindspeed_cp.kernels.flash_attn import FlashAttn3Kernel, FlashAttnKernel
from mindspeed_cp.kernels.npu import NpuKernel
from mindspeed_cp.kernels.protocol import EVERYTHING, Positions
from mindspeed_cp.kernels.reference import ReferenceKernel
from unit_tests.call_cases import ALGORITHMS, agreeing_attention
from unit_tests.dense import Result, assert_as_accurate_as
from unit_tests.emulated_cuda import emulated_cuda
from unit_tests.emulated_npu import fake_torch_npu
from unit_tests.emulation import OnEmulator
from unit_tests.ring_cases import case_on

WRAPPED = {
    kernel.name: OnEmulator(AlibiInColumns(kernel), emulator, device, capability)
    for kernel, emulator, device, capability in (
        (FlashAttnKernel(), emulated_cuda, "cuda", (8, 0)),
        (CudaFlashKernel(), emulated_cuda, "cuda", (8, 0)),
        (FlashAttn3Kernel(), emulated_cuda, "cuda", (9, 0)),
        (EfficientKernel(), emulated_cuda, "cuda", (8, 0)),
        (NpuKernel(), fake_torch_npu, "npu", None),
    )
}
REFERENCE = KERNELS.only(["reference"])
CU_SEQLENS = [0, 3, 4, 60, 66, 96]
TERMS = AttentionTerms(alibi_slopes=torch.tensor([0.5, 0.037, -0.2, 0.0]))


def attend(attention: ContextParallelAttention, tensors: list[Tensor], batch: PackedBatch) -> list[Tensor]:
    """Output, log-sum-exp, and gradients."""
    q, k, v, dout = tensors
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention.with_lse(*leaves, plan=batch.plan, terms=TERMS)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def whole(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, n, 96, 16, generator=generator).bfloat16().to(dtype) for n in (4, 2, 2, 4)]


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("flash_attn", "hybrid"),
        ("cuda_efficient", "ring"),
        ("npu", "ring"),
        *(pytest.param(name, "double ring", marks=pytest.mark.slow) for name in WRAPPED),
    ],
)
def test_fused_kernels_take_alibi_on_every_tile_of_causal_documents(name, algorithm):
    alone = PackedBatch.from_cu_seqlens(CU_SEQLENS, 1)
    plain, exact = (
        Result(*attend(local_attention(causal=True, kernels=REFERENCE), whole(dtype), alone))
        for dtype in (torch.bfloat16, torch.float64)
    )
    case, batch = case_on(ALGORITHMS[algorithm]), PackedBatch.from_cu_seqlens(CU_SEQLENS, 4)
    world, registry = VirtualWorld(4, 30.0), KernelRegistry((WRAPPED[name],))

    def on_rank(rank: int) -> list[Tensor]:
        attention = agreeing_attention(case, world, rank, registry)
        return attend(attention, [batch.shard(x, rank, dim=2) for x in whole(torch.bfloat16)], batch)

    with WRAPPED[name].emulator():
        shards = world.run(on_rank)
    found = Result(*(batch.restore(each, dim=2) for each in zip(*shards, strict=True)))
    assert_as_accurate_as(plain, exact, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_far_keys_and_gaps_keep_their_digits(dtype):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 16, 16, generator=generator).to(dtype) for _ in range(3))
    keys = torch.arange(16)[None] * 70_001
    positions = Positions(keys[:, -1:] + 5 + torch.arange(16)[None], keys, torch.zeros(1, 16, dtype=torch.int64))
    slopes = torch.tensor([1e-5, 3.3e-6])
    terms = TileTerms(0.3, positions=positions, alibi_slopes=slopes, terms=frozenset({Term.ALIBI}))
    expected = ReferenceKernel().forward(*(x.double() for x in (q, k, v)), terms).lse
    with emulated_cuda():
        found = AlibiInColumns(EfficientKernel()).forward(q, k, v, terms).lse
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "changed", "reason"),
    [
        (FlashAttnKernel(), {"dtype": torch.float16}, "takes ALiBi in columns of bfloat16 and float32"),
        (FlashAttnKernel(), {"terms": {Term.SOFTCAP}}, "takes no softcap beside ALiBi"),
        (FlashAttnKernel(), {"terms": {Term.ALIBI_AHEAD}}, "takes no ALiBi of later keys"),
        (CudnnKernel(), {"head_size": 128, "value_head_size": 128}, "takes head sizes up to 128, not 144"),
    ],
    ids=["float16", "softcap", "later keys", "head size"],
)
def test_what_columns_cannot_say_is_refused(kernel, changed, reason):
    case = TileCase("cuda", torch.bfloat16, EVERYTHING, 4, 4, 128, 128, 64, 64)
    told = case._replace(**{**changed, "terms": frozenset({Term.ALIBI, *changed.get("terms", ())})})
    with emulated_cuda():
        assert reason in AlibiInColumns(kernel).unsupported_reasons(told)
        assert reason not in AlibiInColumns(kernel).unsupported_reasons(case)
