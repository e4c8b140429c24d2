"""Dropout by a kernel's own coordinates: only where it is asked for, and the same in both passes."""

from dataclasses import dataclass, replace

import pytest
import torch

from mindspeed_cp.attention import AttentionTerms, Dropout
from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.kernels import KernelRegistry, TileOutput, TileTerms
from mindspeed_cp.kernels.flash_attn import FlashAttnKernel
from mindspeed_cp.kernels.protocol import TRIANGLE, DropoutTerms
from unit_tests.call_cases import ALGORITHMS, agreeing_attention, run_virtually
from unit_tests.dense import Result, assert_as_accurate_as, causal_mask
from unit_tests.emulated_cuda import emulated_cuda, kept_by
from unit_tests.emulation import OnEmulator
from unit_tests.ring_cases import case_on

HOPPER = (9, 0)
FLASH = KernelRegistry((OnEmulator(FlashAttnKernel(), emulated_cuda, "cuda", HOPPER),))
DROPOUT = Dropout(rate=0.5, seed=1, by_kernel=True)


def dropped(tensors: list[torch.Tensor], keep: torch.Tensor, dtype: torch.dtype) -> Result:
    """Causal attention of two query heads to a K/V head, its probabilities multiplied with `keep`, in plain torch."""
    q, k, v, dout = (x.to(dtype).requires_grad_() for x in tensors)
    scores = (q @ k.repeat_interleave(2, dim=1).mT * 0.5).masked_fill(~causal_mask(q.size(2)), -torch.inf)
    out = (scores.softmax(dim=-1) * keep.to(dtype)) @ v.repeat_interleave(2, dim=1)
    return Result(out.detach(), scores.logsumexp(dim=-1).detach(), *torch.autograd.grad(out, (q, k, v), dout))


def test_flash_attn_drops_in_its_backward_pass_what_it_has_dropped():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(2, n, 24, 16, generator=generator).bfloat16() for n in (4, 2, 2, 4)]
    terms = TileTerms(0.5, TRIANGLE, dropout=DropoutTerms(0.5, (0, 0), torch.arange(4)))
    with emulated_cuda():
        q, k, v, dout = tensors
        output = FlashAttnKernel().forward(q, k, v, terms)
        out = output.out.to(q.dtype)
        grads = FlashAttnKernel().backward(dout, q, k, v, TileOutput(out, *output[1:]), terms)
    keep = kept_by(*output.state, 0.5, tensors[0], 24)
    plain, exact = (dropped(tensors, keep, dtype) for dtype in (torch.bfloat16, torch.float64))
    assert_as_accurate_as(plain, exact, Result(out, output.lse, *grads))


@dataclass(frozen=True)
class Recording(OnEmulator):
    """Notes what the forward pass has multiplied each probability of the stream with, [B, N, S, S]."""

    kept: torch.Tensor | None = None

    def forward(self, q, k, v, terms):
        output = super().forward(q, k, v, terms)
        keep = kept_by(*output.state, terms.dropout.rate, q, k.size(2))
        queries, keys, _ = terms.positions
        self.kept[:, terms.dropout.heads[:, None, None], queries[0][:, None], keys[0]] = keep
        return output


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_both_passes_drop_the_same_on_every_algorithm(algorithm):
    case, batch = case_on(ALGORITHMS[algorithm]), PackedBatch.from_cu_seqlens([0, 96], 4)
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(1, n, 96, 16, generator=generator).bfloat16() for n in (16, 8, 8, 16)]
    kept = torch.zeros(1, 16, 96, 96)
    kernels = KernelRegistry((Recording(FlashAttnKernel(), emulated_cuda, "cuda", HOPPER, kept),))
    world = VirtualWorld(case.size, 30.0)

    def on_rank(rank):
        q, k, v, dout = (batch.shard(x, rank, dim=2) for x in whole)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        attention = agreeing_attention(case, world, rank, kernels)
        out, lse = attention.with_lse(*leaves, scale=0.5, plan=batch.plan, terms=AttentionTerms(dropout=DROPOUT))
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]

    with emulated_cuda():
        shards = world.run(on_rank)
    found = Result(*(batch.restore(each, dim=2) for each in zip(*shards, strict=True)))
    assert_as_accurate_as(*(dropped(whole, kept, dtype) for dtype in (torch.bfloat16, torch.float64)), found)


def test_without_it_the_kernel_is_refused_with_the_way_out():
    def on_rank(attention, rank):
        x = torch.zeros(1, 4, 6, 8, dtype=torch.bfloat16)
        attention = replace(attention, attention=only_flash(attention.attention))
        with pytest.raises(NotImplementedError) as error:
            attention(x, x, x, terms=AttentionTerms(dropout=replace(DROPOUT, by_kernel=False)))
        return str(error.value)

    def only_flash(planned):
        return replace(planned, attention=replace(planned.attention, kernels=FLASH))

    with emulated_cuda():
        said = run_virtually(case_on(ALGORITHMS["ring"]), on_rank)
    assert all("valid, not the same as at CP = 1; Dropout(by_kernel=True) allows it" in each for each in said)
