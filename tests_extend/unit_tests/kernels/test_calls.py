"""Tiles in calls: each is computed once, small ones share a call, and the results are those of dense attention."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.kernels import KERNELS, KernelRegistry, TileCase, TileKernel, TileTerms, Window
from mindspeed_cp.kernels.calls import calls
from mindspeed_cp.kernels.flash_attn import FlashAttnKernel
from mindspeed_cp.kernels.npu import NpuKernel
from mindspeed_cp.kernels.protocol import EVERYTHING
from mindspeed_cp.layouts import Contiguous, EqualChunks
from mindspeed_cp.plan import CAUSAL, AttentionPlan, Band, Run
from unit_tests.dense import Result, assert_as_accurate_as, assert_equal_to, dense_attention
from unit_tests.emulated_cuda import emulated_cuda
from unit_tests.emulated_npu import fake_torch_npu
from unit_tests.emulation import OnEmulator, running
from unit_tests.test_plan import pairs_of_ranks, random_plans, seen_by_tiles

BASE = TileCase("cpu", torch.float64, EVERYTHING, 4, 2, 0, 0, 16, 16)
LENGTHS = (5, 1, 17, 3, 40, 8, 9, 30, 2, 13)
WINDOWED = (Band(6, 0),)


@dataclass(frozen=True)
class TakesPacked:
    """A kernel that takes everything, also packed."""

    name: str = "packed"

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        return []


@pytest.mark.parametrize("registry", [KERNELS, KernelRegistry((TakesPacked(),))], ids=["cpu", "packed"])
def test_calls_compute_each_pair_once_and_no_token_of_a_call_twice(registry):
    for plan in random_plans(60):
        for pair in pairs_of_ranks(plan):
            tiles = plan.tiles(*pair)
            made = calls(tiles, BASE, registry)
            assert Counter(seen_by_tiles(t for call in made for t in call.tiles)) == Counter(seen_by_tiles(tiles))
            for call in made:
                assert not call.kernel.unsupported_reasons(call.case)
                for side in ("queries", "keys"):
                    of_call = [(t.sample, token) for t in call.tiles for token in range_of(getattr(t, side))]
                    assert len(of_call) == len(set(of_call))


def range_of(tokens: slice) -> range:
    return range(tokens.start, tokens.stop)


def documents(lengths: tuple[int, ...]) -> Contiguous:
    return Contiguous(1, (lengths,))


@pytest.mark.parametrize(
    ("registry", "bands", "most"),
    [
        (KERNELS, CAUSAL, 40),
        (KERNELS, WINDOWED, 60),
        (KernelRegistry((TakesPacked(),)), CAUSAL, 1),
    ],
    ids=["cpu", "cpu, window", "packed"],
)
def test_a_thousand_documents_are_a_few_calls(registry, bands, most):
    rng = random.Random(1)
    lengths = tuple(min(250, int(rng.lognormvariate(4, 1)) + 1) for _ in range(1000))
    layout = documents(lengths)
    assert len(calls(AttentionPlan(layout, layout, bands).tiles(0, 0), BASE, registry)) <= most


@pytest.mark.parametrize("window", [16, 64])
def test_the_strips_of_a_window_are_a_few_calls(window):
    layout = EqualChunks(1, 4096, "contiguous")
    assert len(calls(AttentionPlan(layout, layout, (Band(window, 0),)).tiles(0, 0), BASE, KERNELS)) <= 8


@dataclass(frozen=True)
class TwoSamples:
    """Two samples of one rank with documents of their own."""

    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    num_ranks: int = 1

    def num_tokens(self, rank: int) -> int:
        return sum(self.lengths[0])

    def runs(self, rank: int) -> tuple[Run, ...]:
        return tuple(
            Run(start, start + length, 0, document, sample)
            for sample, of_sample in enumerate(self.lengths)
            for document, (start, length) in enumerate(zip(accumulate(of_sample, initial=0), of_sample, strict=False))
        )


LAYOUTS = {
    "one pack": documents(LENGTHS),
    "packs of their own": TwoSamples((LENGTHS, LENGTHS[::-1])),
}
KERNEL_CASES = [
    pytest.param(KERNELS.only(["cpu_flash", "reference"]), torch.float64, id="cpu_flash"),
    pytest.param(KERNELS.only(["reference"]), torch.float64, id="reference"),
    pytest.param(OnEmulator(FlashAttnKernel(), emulated_cuda, "cuda", (8, 0)), torch.bfloat16, id="flash_attn"),
    pytest.param(OnEmulator(NpuKernel(), fake_torch_npu, "npu"), torch.float32, id="npu"),
]


def visible_in(plan: AttentionPlan, batch: int, length: int) -> Tensor:
    """[B, 1, S, S] by the definition of the bands."""
    visible = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    (band,) = plan.bands
    for run in plan.queries.runs(0):
        samples = slice(None) if run.sample is None else run.sample
        size = run.stop - run.start
        of_run = Window(band.behind, band.ahead).visible(size, size)
        visible[samples, 0, run.start : run.stop, run.start : run.stop] = of_run
    return visible


@pytest.mark.parametrize("bands", [CAUSAL, WINDOWED, (Band(3, 4),)], ids=["causal", "window", "both sides"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernels", "dtype"), KERNEL_CASES)
def test_attention_of_packed_documents_is_that_of_each_by_itself(kernels, dtype, layout, bands):
    registry: KernelRegistry = kernels if isinstance(kernels, KernelRegistry) else KernelRegistry((kernels,))
    plan = AttentionPlan(LAYOUTS[layout], LAYOUTS[layout], bands)
    length, generator = LAYOUTS[layout].num_tokens(0), torch.Generator().manual_seed(1)
    shapes = [(2, heads, length, 16) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    kernel: TileKernel | None = None if isinstance(kernels, KernelRegistry) else kernels
    with running(kernel or registry.kernels[0]):
        out, lse = RingAttention(kernels=registry).with_lse(*leaves, plan, Terms(0.25))
        result = Result(out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))
    visible = visible_in(plan, 2, length)
    exact, same = (
        dense_attention(*(x.to(each) for x in (q, k, v, dout)), visible=visible, scale=0.25)
        for each in (torch.float64, dtype)
    )
    if dtype is torch.float64:
        assert_equal_to(exact, result)
    else:
        assert_as_accurate_as(same, exact, result)


def test_packed_documents_that_follow_each_other_are_handed_over_as_views():
    layout = documents((8, 8, 16, 16))
    (call,) = calls(AttentionPlan(layout, layout).tiles(0, 0), BASE, KernelRegistry((TakesPacked(),)))
    q = torch.randn(1, 2, 48, 16)
    assert call.queries(q).given.take(q).data_ptr() == q.data_ptr()
    segments = call.terms(1.0, q).segments
    assert segments is not None
    assert (segments.queries.tolist(), segments.max_queries) == ([0, 8, 16, 32, 48], 16)


def test_a_scale_that_changes_from_call_to_call_leaves_nothing_behind():
    layout = documents((8, 8, 16, 16))
    (call,) = calls(AttentionPlan(layout, layout).tiles(0, 0), BASE, KernelRegistry((TakesPacked(),)))
    first, second = (call.terms(scale, torch.randn(1, 2, 48, 16)) for scale in (0.5, 0.25))
    assert (first.scale, second.scale) == (0.5, 0.25)
    assert first.segments is not None and second.segments is first.segments


def test_the_reference_refuses_a_tile_whose_scores_would_not_fit():
    large = BASE._replace(num_queries=2**16, num_keys=2**16)
    with pytest.raises(NotImplementedError, match="holds all scores, 128 GiB a sample here, and takes 16 at most"):
        KERNELS.only(["reference"]).choose(large)
    assert TileTerms(1.0).window == EVERYTHING
