"""Which kernel takes which term, as the documentation has it; and terms that kernels take by themselves."""

from pathlib import Path

import pytest
import torch

from mindspeed_cp.kernels import BlockOutput, Term, TileTerms, Window
from mindspeed_cp.kernels.cpu_flash import CpuFlashKernel
from mindspeed_cp.kernels.flash_attn import FlashAttnKernel
from mindspeed_cp.kernels.protocol import EVERYTHING, TRIANGLE
from mindspeed_cp.kernels.reference import ReferenceKernel
from mindspeed_cp.kernels.taken import table_of_terms
from unit_tests.dense import Result, assert_as_accurate_as, assert_equal_to
from unit_tests.emulated_cuda import emulated_cuda

PAGE = Path(__file__).resolve().parents[3] / "docs" / "attention.md"


def test_the_documented_table_is_what_the_kernels_say():
    assert f"\n{table_of_terms()}\n" in PAGE.read_text()


def test_a_bias_of_minus_infinity_hides_a_row_from_the_flash_kernel_of_the_cpu():
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(1, 2, 6, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64).index_fill_(2, torch.tensor([3]), -torch.inf)
    terms = TileTerms(0.5, TRIANGLE, bias=bias, terms=frozenset({Term.BIAS}))

    def results(kernel):
        output = kernel.forward(q, k, v, terms)
        return Result(output.out, output.lse, *kernel.backward(dout, q, k, v, output, terms))

    expected = results(ReferenceKernel())
    assert (expected.lse[:, :, 3] == -torch.inf).all()
    assert_equal_to(expected, results(CpuFlashKernel()))


@pytest.mark.parametrize("window", [EVERYTHING, TRIANGLE, Window(5, 0)], ids=str)
def test_flash_attn_caps_scores_itself(window):
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(1, n, 24, 16, generator=generator).bfloat16() for n in (4, 2, 2, 4))
    terms = TileTerms(0.5, window, softcap=1.5, terms=frozenset({Term.SOFTCAP}))

    def results(kernel, q, k, v, dout):
        forward = kernel.forward(q, k, v, terms)
        out, lse = forward.out.to(q.dtype), forward.lse
        grads = kernel.backward(dout, q, k, v, BlockOutput(out, lse), terms)
        return Result(out, lse, *(x.to(q.dtype) for x in grads))

    exact = results(ReferenceKernel(), *(x.double() for x in (q, k, v, dout)))
    plain = results(ReferenceKernel(), q, k, v, dout)
    with emulated_cuda():
        assert_as_accurate_as(plain, exact, results(FlashAttnKernel(), q, k, v, dout))
