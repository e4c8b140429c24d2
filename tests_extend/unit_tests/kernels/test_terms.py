"""Which kernel takes which term, as the documentation has it; and terms that kernels take by themselves."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mindspeed_cp.attention import AttentionTerms
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.kernels import Term, TileCase, TileOutput, TileTerms, Window
from mindspeed_cp.kernels.cpu_flash import CpuFlashKernel
from mindspeed_cp.kernels.cuda import EfficientKernel
from mindspeed_cp.kernels.flash_attn import FlashAttnKernel
from mindspeed_cp.kernels.protocol import EVERYTHING, TRIANGLE
from mindspeed_cp.kernels.reference import ReferenceKernel
from mindspeed_cp.kernels.taken import table_of_terms
from unit_tests.dense import Result, assert_as_accurate_as, assert_equal_to
from unit_tests.emulated_cuda import emulated_cuda

PAGE = Path(__file__).resolve().parents[3] / "docs" / "attention.md"


class WithBias(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dbias: torch.Tensor


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
        grads = kernel.backward(dout, q, k, v, TileOutput(out, lse), terms)
        return Result(out, lse, *(x.to(q.dtype) for x in grads))

    exact = results(ReferenceKernel(), *(x.double() for x in (q, k, v, dout)))
    plain = results(ReferenceKernel(), q, k, v, dout)
    with emulated_cuda():
        assert_as_accurate_as(plain, exact, results(FlashAttnKernel(), q, k, v, dout))


class Gradients:
    """Takes in the gradient of a bias."""

    def add_bias(self, gradient: torch.Tensor) -> None:
        self.bias = gradient


@pytest.mark.parametrize("own", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("mask", ["all", "causal", "some"])
def test_the_efficient_kernel_adds_a_bias_and_gives_its_gradient(mask, own):
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(2, n, 21, 16, generator=generator).bfloat16() for n in (4, 2, 2, 4))
    bias = torch.randn(*own, 21, 21, generator=generator).bfloat16().index_fill_(2, torch.tensor([3]), -torch.inf)
    visible = torch.rand(21, 21, generator=generator) < 0.7 if mask == "some" else None

    def results(kernel, q, k, v, dout, bias):
        gradients = Gradients()
        told = frozenset({Term.BIAS, Term.BIAS_GRADIENT})
        window = TRIANGLE if mask == "causal" else EVERYTHING
        terms = TileTerms(0.5, window, visible, bias=bias, terms=told, gradients=gradients)
        output = kernel.forward(q, k, v, terms)
        out, lse = output.out.to(q.dtype), output.lse
        grads = kernel.backward(dout, q, k, v, output._replace(out=out), terms)
        return WithBias(out, lse, *(x.to(q.dtype) for x in grads), gradients.bias)

    exact = results(ReferenceKernel(), *(x.double() for x in (q, k, v, dout, bias)))
    plain = results(ReferenceKernel(), q, k, v, dout, bias)
    assert (exact.lse[:, :, 3] == -torch.inf).all()
    with emulated_cuda():
        found = results(EfficientKernel(), q, k, v, dout, bias)
    assert found.dbias.dtype == torch.float32
    assert found.dbias.shape == bias.shape
    assert_as_accurate_as(plain, exact, found._replace(dbias=plain.dbias))
    assert (found.dbias - exact.dbias).norm() < 4e-3 * exact.dbias.norm()  # Rounded to bf16 for each sample and head.


def test_a_bias_with_more_digits_than_the_queries_is_not_rounded_to_theirs():
    case = TileCase("cuda", torch.bfloat16, EVERYTHING, 4, 4, 128, 128, 64, 64)
    bias = AttentionTerms(bias=torch.zeros(1, 1, 128, 128))
    needs = {dtype: Terms.of(bias, 1.0).needs(dtype, looks_ahead=True) for dtype in (torch.bfloat16, torch.float32)}
    assert needs[torch.float32] == {Term.BIAS}
    reasons = EfficientKernel().unsupported_reasons(case._replace(terms=needs[torch.bfloat16]))
    assert "takes no bias with more digits than q" in reasons
