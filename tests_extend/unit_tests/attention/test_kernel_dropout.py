"""Dropout by a kernel's own coordinates: only where it is asked for, and the same in both passes."""

from dataclasses import replace

import pytest
import torch

from mindspeed_cp.attention import AttentionTerms, Dropout
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.kernels import BlockOutput, KernelRegistry, TileTerms
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


def test_flash_attn_drops_in_its_backward_pass_what_it_has_dropped():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(2, n, 24, 16, generator=generator).bfloat16() for n in (4, 2, 2, 4)]
    terms = TileTerms(0.5, TRIANGLE, dropout=DropoutTerms(0.5, (0, 0), torch.arange(4)))
    with emulated_cuda():
        q, k, v, dout = tensors
        output = FlashAttnKernel().forward(q, k, v, terms)
        out = output.out.to(q.dtype)
        grads = FlashAttnKernel().backward(dout, q, k, v, BlockOutput(out, *output[1:]), terms)
    keep = kept_by(*output.state, 0.5, tensors[0], 24)

    def plain(dtype: torch.dtype) -> Result:
        q, k, v, dout = (x.to(dtype).requires_grad_() for x in tensors)
        scores = (q @ k.repeat_interleave(2, dim=1).mT * 0.5).masked_fill(~causal_mask(24), -torch.inf)
        out = (scores.softmax(dim=-1) * keep.to(dtype)) @ v.repeat_interleave(2, dim=1)
        return Result(out.detach(), scores.logsumexp(dim=-1).detach(), *torch.autograd.grad(out, (q, k, v), dout))

    assert_as_accurate_as(plain(torch.bfloat16), plain(torch.float64), Result(out, output.lse, *grads))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_both_passes_drop_the_same_on_every_algorithm(algorithm):
    """The output is linear in the values, whatever is dropped: their product with their gradient is that of output."""
    case = replace(case_on(ALGORITHMS[algorithm]), heads=4, tokens=24)
    world = VirtualWorld(case.size, 30.0)

    def on_rank(rank):
        generator = torch.Generator().manual_seed(rank)
        q, k, v, dout = (torch.randn(1, 16, 24, 16, generator=generator).bfloat16() for _ in range(4))
        v.requires_grad_()
        attention = agreeing_attention(case, world, rank, FLASH)
        out = attention(q, k, v, terms=AttentionTerms(dropout=DROPOUT))
        (dv,) = torch.autograd.grad(out, v, dout)
        of_out, of_dv = dout.float() * out.float(), dv.float() * v.float()
        return torch.stack([of_out.sum(), of_dv.sum(), of_out.square().sum()]).detach()

    with emulated_cuda():
        of_out, of_dv, squares = torch.stack(world.run(on_rank)).sum(dim=0)
    assert (of_out - of_dv).abs() < 0.02 * squares.sqrt()


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
