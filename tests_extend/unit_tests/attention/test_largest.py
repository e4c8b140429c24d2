"""The largest score of each head: of packed tiles too, and without all scores in memory."""

from dataclasses import replace

import pytest
import torch

from mindspeed_cp.attention import local_attention
from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.kernels import KERNELS, KernelRegistry, TileTerms, Window, reference
from mindspeed_cp.kernels.flash_attn import FlashAttnKernel
from mindspeed_cp.kernels.protocol import EVERYTHING, TRIANGLE, Positions
from mindspeed_cp.kernels.reference import largest_scores
from unit_tests.emulated_cuda import emulated_cuda
from unit_tests.emulation import OnEmulator

FLASH = KernelRegistry((OnEmulator(FlashAttnKernel(), emulated_cuda, "cuda", (8, 0)),))


def test_packed_documents_share_no_scores():
    plan = PackedBatch.from_cu_seqlens([0, 3, 9, 14, 20, 25], 1).plan
    q, k, v = torch.randn(3, 1, 4, 25, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    with emulated_cuda():
        packed, alone = (
            local_attention(causal=True, kernels=kernels).with_largest(q, k, v, plan=plan)[1]
            for kernels in (FLASH, KERNELS.only(["reference"]))
        )
    assert torch.equal(packed, alone)


@pytest.mark.parametrize("told", ["all", "causal", "a window", "a mask", "a bias", "ALiBi"])
def test_some_queries_at_a_time_have_the_largest_of_all(told, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    q, k, bias = (torch.randn(2, n, 11, 11, generator=generator, dtype=torch.float64) for n in (4, 2, 4))
    windows = {"causal": TRIANGLE, "a window": Window(2, 1)}
    terms = TileTerms(0.5, windows.get(told, EVERYTHING), bias > 0 if told == "a mask" else None)
    places = torch.arange(11)[None]
    terms = replace(
        terms,
        bias=bias if told == "a bias" else None,
        alibi_slopes=torch.arange(4.0, dtype=torch.float64) if told == "ALiBi" else None,
        positions=Positions(places.flip(1), places, torch.zeros_like(places)),
    )
    exact = reference._scores(q, k, terms).masked.amax(dim=(0, 3, 4)).flatten()
    monkeypatch.setattr(reference, "_HELD", 60)
    torch.testing.assert_close(largest_scores(q, k, terms), exact, rtol=0, atol=1e-12)
