"""Every block kernel against the dense oracle, what each refuses, and the choice between them."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mindspeed_cp.kernels import (
    KERNELS,
    KernelRegistry,
    TileCase,
    TileGradients,
    TileKernel,
    TileOutput,
    TileTerms,
    Window,
)
from mindspeed_cp.kernels.cpu_flash import CpuFlashKernel
from mindspeed_cp.kernels.cuda import CudaFlashKernel, CudnnKernel, EfficientKernel
from mindspeed_cp.kernels.flash_attn import FlashAttn3Kernel, FlashAttnKernel
from mindspeed_cp.kernels.npu import NpuKernel
from mindspeed_cp.kernels.protocol import EVERYTHING, TRIANGLE
from mindspeed_cp.kernels.wrapped import in_bnsd
from unit_tests.dense import Result, assert_as_accurate_as, assert_equal_to, causal_mask, dense_attention
from unit_tests.emulated_cuda import emulated_cuda
from unit_tests.emulated_npu import fake_torch_npu
from unit_tests.emulation import OnEmulator, running

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One block.

    visible: shape of a mask tensor, () for none. memory: order of the dims in memory, outermost first. offset: numbers
    that lie before a tensor's first in its storage.
    """

    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    queries: int = 40
    keys: int = 40
    head_size: int = 64
    value_head_size: int = 64
    window: Window = EVERYTHING
    visible: tuple[int, ...] = ()
    memory: str = "BNSD"
    offset: int = 0
    scale: float = 0.125
    dout: str = "random"


WINDOWS = ((5, 0, 40, 40), (7, 3, 40, 72), (0, None, 40, 40), (None, 0, 40, 72), (None, 26, 40, 24), (5, None, 40, 24))
"""Left and right bound, queries and keys: what not every kernel takes as it is."""

CASES = {
    **{
        f"window ({left}, {right}), {queries} queries, {keys} keys": Case(
            window=Window(left, right), queries=queries, keys=keys, kv_heads=2
        )
        for left, right, queries, keys in WINDOWS
    },
    "full": Case(),
    "causal": Case(window=TRIANGLE),
    "causal gqa": Case(window=TRIANGLE, kv_heads=2),
    "causal mqa": Case(window=TRIANGLE, kv_heads=1),
    "causal head size 128": Case(window=TRIANGLE, head_size=128, value_head_size=128),
    "causal more tokens than a tile": Case(window=TRIANGLE, batch=1, heads=2, kv_heads=1, queries=600, keys=600),
    "one query": Case(queries=1),
    "causal other scale": Case(window=TRIANGLE, scale=0.05),
    "more keys than queries": Case(keys=72, kv_heads=2),
    "more queries than keys": Case(keys=24),
    "value head size": Case(window=TRIANGLE, kv_heads=2, value_head_size=32),
    "in memory as SBND": Case(window=TRIANGLE, kv_heads=2, memory="SBND"),
    "in memory as BSND": Case(window=TRIANGLE, kv_heads=2, memory="BSND"),
    "in memory as BNDS": Case(window=TRIANGLE, kv_heads=2, memory="BNDS"),
    "misaligned in memory": Case(window=TRIANGLE, kv_heads=2, offset=1),
    "odd head size": Case(window=TRIANGLE, head_size=7, value_head_size=7),
    "head size 320": Case(window=TRIANGLE, head_size=320, value_head_size=320),
    "dout expanded": Case(window=TRIANGLE, dout="expanded"),
    "128 tokens": Case(queries=128, keys=128),
    "128 tokens, causal, gqa": Case(queries=128, keys=128, window=TRIANGLE, kv_heads=2),
    "128 tokens, causal, mqa": Case(queries=128, keys=128, window=TRIANGLE, kv_heads=1),
    "128 tokens, causal, dout expanded": Case(queries=128, keys=128, window=TRIANGLE, dout="expanded"),
    "128 tokens, in memory as SBND": Case(queries=128, keys=128, window=TRIANGLE, memory="SBND"),
    "128 tokens, misaligned as BSND": Case(queries=128, keys=128, window=TRIANGLE, memory="BSND", offset=1),
    "128 tokens, value head size": Case(queries=128, keys=128, window=TRIANGLE, head_size=128, value_head_size=32),
    "128 queries, 256 keys, gqa": Case(queries=128, keys=256, kv_heads=2),
    "mask [S, T]": Case(visible=(40, 40)),
    "mask [S, T], S != T": Case(keys=24, visible=(40, 24)),
    "mask [S, T], odd lengths": Case(queries=39, keys=37, visible=(39, 37)),
    "mask [1, 1, S, T], gqa": Case(kv_heads=2, visible=(1, 1, 40, 40)),
    "mask [B, 1, S, T]": Case(visible=(2, 1, 40, 40)),
    "mask [1, N, S, T], gqa": Case(kv_heads=2, visible=(1, 4, 40, 40)),
    "mask [B, N, S, T], mqa": Case(kv_heads=1, visible=(2, 4, 40, 40), memory="SBND"),
}

HALF, UP_TO_FP32 = (torch.bfloat16, torch.float16), (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (torch.float64, *reversed(UP_TO_FP32))


def masked(case: Case, dtype: torch.dtype) -> bool:
    return bool(case.visible)


def other_value_head_size(case: Case, dtype: torch.dtype) -> bool:
    return case.value_head_size != case.head_size


FUSED_REFUSALS = {
    "takes bfloat16 and float16, not float32": lambda case, dtype: dtype is torch.float32,
    "takes bfloat16 and float16, not float64": lambda case, dtype: dtype is torch.float64,
    "takes no arbitrary mask": masked,
    "takes head sizes that are multiples of 8, not 7": lambda case, dtype: case.head_size == 7 and dtype in HALF,
    "takes head sizes that are multiples of 4, not 7": lambda case, dtype: case.head_size == 7 and dtype.itemsize == 4,
    "takes head sizes that are multiples of 2, not 7": lambda case, dtype: case.head_size == 7 and dtype.itemsize == 8,
}
CUT = {
    f"takes no window ({left}, {right}) on {queries} queries and {keys} keys": (
        lambda case, dtype, of=(left, right, queries, keys): of == (*case.window, case.queries, case.keys)
    )
    for left, right, queries, keys in WINDOWS
}
FLASH_REFUSALS = {
    **FUSED_REFUSALS,
    "needs one head size, not 64 for keys and 32 for values": lambda case, dtype: (
        other_value_head_size(case, dtype) and case.head_size == 64
    ),
    "needs one head size, not 128 for keys and 32 for values": lambda case, dtype: (
        other_value_head_size(case, dtype) and case.head_size == 128
    ),
    "takes head sizes up to 256, not 320": lambda case, dtype: case.head_size == 320,
}


def cudnn_refuses_lengths(queries: int, keys: int) -> dict:
    reason = f"is used for multiples of 128 queries and keys only, not for {queries} and {keys}"
    return {reason: lambda case, dtype: (case.queries, case.keys) == (queries, keys)}


REFUSALS = {
    "flash_attn": {
        **FLASH_REFUSALS,
        "makes another window of (None, 26) on 40 queries and 24 keys": lambda case, dtype: case.window == (None, 26),
        "makes another window of (5, None) on 40 queries and 24 keys": lambda case, dtype: case.window == (5, None),
    },
    "cuda_flash": {**FLASH_REFUSALS, **CUT},
    "flash_attn_3": {**FLASH_REFUSALS, **CUT},
    "cuda_cudnn": {
        **FUSED_REFUSALS,
        **CUT,
        "takes head sizes up to 128, not 320": lambda case, dtype: case.head_size == 320,
        **cudnn_refuses_lengths(40, 40),
        **cudnn_refuses_lengths(1, 40),
        **cudnn_refuses_lengths(40, 72),
        **cudnn_refuses_lengths(40, 24),
        **cudnn_refuses_lengths(39, 37),
        **cudnn_refuses_lengths(600, 600),
    },
    "cuda_efficient": {
        **CUT,
        "takes float32 and float16 and bfloat16 here, not float64": lambda case, dtype: dtype is torch.float64,
        **{reason: applies for reason, applies in FUSED_REFUSALS.items() if "multiples" in reason},
    },
    "npu": {"takes no float64": lambda case, dtype: dtype is torch.float64},
    "cpu_flash": {
        **{reason: applies for reason, applies in FLASH_REFUSALS.items() if "one head size" in reason},
        **CUT,
        "takes no grouped queries before torch 2.13": lambda case, dtype: (
            case.kv_heads < case.heads and TORCH < (2, 13)
        ),
    },
    "reference": {},
}
"""Of each kernel, the reasons it gives and the cases it gives them for. It computes all others."""

EMULATED = (
    OnEmulator(FlashAttnKernel(), emulated_cuda, "cuda", (8, 0)),
    OnEmulator(CudaFlashKernel(), emulated_cuda, "cuda", (8, 0)),
    OnEmulator(FlashAttn3Kernel(), emulated_cuda, "cuda", (9, 0)),
    OnEmulator(CudnnKernel(), emulated_cuda, "cuda", (9, 0)),
    OnEmulator(EfficientKernel(), emulated_cuda, "cuda", (8, 0)),
    OnEmulator(NpuKernel(), fake_torch_npu, "npu"),
    OnEmulator(in_bnsd(NpuKernel()), fake_torch_npu, "npu"),
)
"""The kernels of devices that are not here: add yours, and what it refuses to REFUSALS."""

HERE = (*KERNELS.only(["cpu_flash", "reference"]).kernels, *EMULATED)
"""The kernels that can run on this CPU."""


def expected_reasons(name: str, case: Case, dtype: torch.dtype) -> list[str]:
    return [reason for reason, applies in REFUSALS[name].items() if applies(case, dtype)]


@functools.lru_cache(maxsize=8)  # Kernels take turns with a case: `computable` has its order for that.
def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(heads: int, tokens: int, head_size: int) -> Tensor:
        x = torch.randn(case.batch, heads, tokens, head_size, generator=generator, dtype=torch.float64).to(dtype)
        order = ["BNSD".index(dim) for dim in case.memory]
        x = x.permute(order)
        storage = torch.empty(case.offset + x.numel(), dtype=dtype)
        x = storage[case.offset :].view(x.shape).copy_(x)
        return x.permute(sorted(range(4), key=order.__getitem__))

    q, dout = (normal(case.heads, case.queries, size) for size in (case.head_size, case.value_head_size))
    k, v = (normal(case.kv_heads, case.keys, size) for size in (case.head_size, case.value_head_size))
    return q, k, v, dout if case.dout == "random" else dout[0, 0, 0, 0].expand_as(dout)


def terms_of(case: Case) -> TileTerms:
    """Mask tensors have dead rows, and other ones in each head."""
    if not case.visible:
        return TileTerms(case.scale, case.window)
    generator = torch.Generator().manual_seed(2)
    visible = torch.rand(case.visible, generator=generator) < 0.5
    visible &= torch.rand((*case.visible[:-1], 1), generator=generator) < 0.8
    visible[..., 3, :] = False
    return TileTerms(case.scale, visible=visible)


@functools.lru_cache(maxsize=16)
def dense(case: Case, dtype: torch.dtype, of: torch.dtype) -> Result:
    """The oracle's results for the inputs of dtype `of`, computed in `dtype`."""
    visible = terms_of(case).visible if case.visible else case.window.visible(case.queries, case.keys)
    return dense_attention(*(x.to(dtype) for x in inputs(case, of)), visible=visible, scale=case.scale)


def dtypes_tried(kernel: TileKernel, number: int, case: Case) -> list[torch.dtype]:
    """The dtypes in which a kernel has to compute a case here.

    All that it takes; on an emulator, which computes in one way whatever the dtype, one after the other.
    """
    taken = [dtype for dtype in DTYPES if not expected_reasons(kernel.name, case, dtype)]
    return [taken[number % len(taken)]] if taken and isinstance(kernel, OnEmulator) else taken


def computable() -> list:
    """The kernels, cases and dtypes that have to be computed here."""
    return [
        pytest.param(kernel, case, dtype, id=f"{kernel.name}: {name}, {str(dtype).removeprefix('torch.')}")
        for number, (name, case) in enumerate(CASES.items())
        for kernel in HERE
        for dtype in dtypes_tried(kernel, number, case)
    ]


def on_gpu() -> list:
    """The kernels and cases that a GPU in this machine may compute."""
    if not torch.cuda.is_available():
        return [pytest.param(None, None, None, marks=pytest.mark.skip(reason="there is no CUDA GPU"), id="no GPU")]
    return [
        pytest.param(kernel, case, dtype, id=f"{kernel.name}: {name}, {str(dtype).removeprefix('torch.')}")
        for kernel in (each.kernel for each in EMULATED if each.device_type == "cuda")
        for name, case in CASES.items()
        for dtype in UP_TO_FP32
    ]


def attend(kernel: TileKernel, case: Case, tensors: Sequence[Tensor], terms: TileTerms) -> Result:
    """Forward and backward pass on the device of the tensors; the inputs are the same afterwards."""
    copies = [x.clone() for x in tensors]
    q, k, v, dout = tensors
    output = kernel.forward(q, k, v, terms)
    result = Result(output.out, output.lse, *kernel.backward(dout, q, k, v, output, terms))
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True)), "inputs were changed"
    return result


def assert_accurate(case: Case, dtype: torch.dtype, tensors: tuple[Tensor, ...], result: Result) -> None:
    dout = tensors[-1]
    assert {x.dtype for x in (result.out, result.dq, result.dk, result.dv)} <= {dtype, result.lse.dtype}
    assert result.lse.dtype == torch.promote_types(dtype, torch.float32)
    assert [x.shape for x in result] == [x.shape for x in (dout, dout[..., 0], *tensors[:3])]
    exact = dense(case, torch.float64, dtype)
    if dtype is torch.float64:
        assert_equal_to(exact, result)
    else:
        assert_as_accurate_as(dense(case, dtype, dtype), exact, result)


@pytest.mark.parametrize(("kernel", "case", "dtype"), computable())
def test_kernel_is_as_accurate_as_dense_attention(kernel, case, dtype):
    tensors = inputs(case, dtype)
    with running(kernel):
        result = attend(kernel, case, tensors, terms_of(case))
    assert_accurate(case, dtype, tensors, result)


@pytest.mark.parametrize(("kernel", "case", "dtype"), on_gpu())
def test_kernel_on_a_gpu_is_as_accurate_as_dense_attention(kernel, case, dtype):
    tensors, terms = inputs(case, dtype), terms_of(case)
    there = [x.cuda() for x in tensors]
    terms = replace(terms, visible=None if terms.visible is None else terms.visible.cuda())
    reasons = kernel.unsupported_reasons(TileCase.of(*there[:3], terms))
    if reasons:
        pytest.skip("; ".join(reasons))
    result = attend(kernel, case, there, terms)
    assert_accurate(case, dtype, tensors, Result(*(x.cpu() for x in result)))


@pytest.mark.parametrize(
    ("kernel", "case", "dtype"),
    [p for p in computable() if p.values[1].visible and p.values[2] is not torch.float64],
)
def test_rows_that_see_no_key_give_zero_and_minus_infinity(kernel, case, dtype):
    q, k, v, dout = inputs(case, dtype)
    terms = terms_of(case)
    dead = ~terms.visible.any(-1).expand(case.batch, case.heads, case.queries)
    none = TileTerms(case.scale, visible=torch.zeros_like(terms.visible))
    with running(kernel):
        output = kernel.forward(q, k, v, terms)
        gradients = kernel.backward(dout, q, k, v, output, terms)
        nothing = kernel.forward(q, k, v, none)
        no_gradients = kernel.backward(dout, q, k, v, nothing, none)
    assert (output.out[dead] == 0).all()
    assert torch.equal(output.lse == -torch.inf, dead)
    assert (gradients.dq[dead] == 0).all()
    assert not any(x.any() for x in (nothing.out, *no_gradients))


@pytest.mark.parametrize(("kernel", "case", "dtype"), [p for p in computable() if p.values[1].visible])
def test_rows_that_see_no_key_here_but_some_in_another_block_give_no_gradients(kernel, case, dtype):
    """As a ring calls it: `out` and `lse` are of all blocks' keys."""
    q, k, v, dout = inputs(case, dtype)
    terms = terms_of(case)
    dead = ~terms.visible.any(-1).expand(case.batch, case.heads, case.queries)
    with running(kernel):
        output = kernel.forward(q, k, v, terms)
        alive = output._replace(out=output.out.masked_fill(dead.unsqueeze(-1), 1.0), lse=output.lse.clamp(min=0.0))
        gradients = kernel.backward(dout, q, k, v, alive, terms)
    assert (gradients.dq[dead] == 0).all()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(kernel, dtype, id=kernel.name)
        for kernel in HERE
        for dtype in DTYPES
        if not expected_reasons(kernel.name, CASES["128 tokens"], dtype)
        and (dtype is torch.bfloat16 or not isinstance(kernel, OnEmulator))
    ],
)
def test_gradients_of_blocks_add_up_when_out_and_lse_are_of_all_their_keys(kernel, dtype):
    """As a ring calls it: the first half of the keys lies before the queries, the second is their own."""
    case = Case(queries=128, keys=256)
    q, k, v, dout = tensors = inputs(case, dtype)
    visible = causal_mask(256)[128:]
    exact, same = (
        dense_attention(*(x.to(each) for x in tensors), visible=visible, scale=case.scale)
        for each in (torch.float64, dtype)
    )
    total = []
    with running(kernel):
        for keys, window in ((slice(0, 128), EVERYTHING), (slice(128, 256), TRIANGLE)):
            block = (q, k[:, :, keys], v[:, :, keys])
            state = kernel.forward(*block, TileTerms(case.scale, window)).state
            output = TileOutput(exact.out.to(dtype), exact.lse.to(torch.promote_types(dtype, torch.float32)), state)
            total.append(kernel.backward(dout, *block, output, TileTerms(case.scale, window)))
    past, own = total
    whole = (past.dq + own.dq, torch.cat([past.dk, own.dk], dim=2), torch.cat([past.dv, own.dv], dim=2))
    if dtype is torch.float64:
        assert_equal_to(exact, TileGradients(*whole))
    else:
        assert_as_accurate_as(same, exact, TileGradients(*whole))


@functools.cache
def block_of(case: Case, dtype: torch.dtype) -> TileCase:
    return TileCase.of(*inputs(case, dtype)[:3], terms_of(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", HERE, ids=lambda kernel: kernel.name)
def test_kernel_refuses_with_a_reason_just_what_it_cannot_compute(kernel, dtype):
    given, expected = {}, {}
    with running(kernel):
        for name, case in CASES.items():
            given[name] = sorted(kernel.unsupported_reasons(block_of(case, dtype)))
            expected[name] = sorted(expected_reasons(kernel.name, case, dtype))
    assert given == expected


@pytest.mark.parametrize("kernel", EMULATED, ids=lambda kernel: kernel.name)
def test_an_emulator_leaves_nothing_behind(kernel):
    case = CASES["128 tokens"]
    q, k, v, _ = inputs(case, torch.bfloat16)
    with running(kernel):
        kernel.forward(q, k, v, TileTerms(case.scale))
    with pytest.raises((ImportError, NotImplementedError)):
        kernel.forward(q, k, v, TileTerms(case.scale))


def block_case(**changed: object) -> TileCase:
    """The case of causal attention on a CPU."""
    whole = TileCase("cpu", torch.float32, TRIANGLE, 4, 4, 16, 16, 64, 64)
    return whole._replace(**changed)


def test_cpu_flash_gives_every_reason_at_once():
    case = block_case(device_type="cuda", window=Window(5, 0), value_head_size=32)
    assert CpuFlashKernel().unsupported_reasons(case) == [
        "runs on the CPU, not on cuda",
        "needs one head size, not 64 for keys and 32 for values",
        "takes no window (5, 0) on 16 queries and 16 keys",
    ]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "cpu_flash"),
        ({"window": EVERYTHING, "num_keys": 24}, "cpu_flash"),
        ({"masked": True, "window": EVERYTHING}, "cpu_flash"),
        ({"window": Window(5, 0)}, "reference"),
        ({"value_head_size": 32}, "reference"),
        ({"device_type": "meta"}, "reference"),
    ],
)
def test_registry_chooses_the_first_kernel_that_can(changed, name):
    assert KERNELS.choose(block_case(**changed)).name == name


@pytest.mark.parametrize("names", [("reference", "cpu_flash"), ("cpu_flash", "reference"), ("reference",)])
def test_kernels_that_are_named_are_used_in_their_order(names):
    registry = KERNELS.only(names)
    assert registry.names == names
    assert registry.choose(block_case()).name == names[0]


def test_a_kernel_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"there is no attention kernel 'flesh'; there are .*cpu_flash.*reference\."):
        KERNELS.only(["flesh"])


def test_kernels_measured_to_be_faster_on_a_gpu_go_first_there_unless_named_in_another_order():
    a, b, c = (SimpleNamespace(name=name, unsupported_reasons=lambda case: []) for name in "abc")
    registry = KernelRegistry((a, b, c), first_on={(9, 0): ("c", "b")})
    hopper, ampere = (block_case(device_type="cuda", compute_capability=one) for one in ((9, 0), (8, 0)))
    assert registry.choose(hopper).name == "c"
    assert registry.choose(ampere).name == "a"
    assert registry.choose(block_case()).name == "a"
    assert registry.only(["a", "c"]).choose(hopper).name == "a"


def test_registry_says_in_the_log_once_for_each_case_why_it_chose(caplog):
    registry, case = KERNELS.only(KERNELS.names), block_case(value_head_size=32)
    with caplog.at_level("INFO", logger="mindspeed_cp"):
        registry.choose(case)
        registry.choose(case)
    (record,) = caplog.records
    assert record.getMessage() == registry.explain(case)
    assert record.getMessage().startswith(f"reference computes {case}\n")
    assert "\n  not cpu_flash: needs one head size" in record.getMessage()


def test_registry_names_every_reason_of_every_kernel_when_none_can():
    never = SimpleNamespace(name="never", unsupported_reasons=lambda case: ["is a stub"])
    case = block_case(window=Window(5, 0), value_head_size=32)
    with pytest.raises(NotImplementedError) as error:
        KernelRegistry((CpuFlashKernel(), never)).choose(case)
    assert str(error.value) == (
        f"no attention kernel can compute {case}\n"
        "  not cpu_flash: needs one head size, not 64 for keys and 32 for values; "
        "takes no window (5, 0) on 16 queries and 16 keys\n"
        "  not never: is a stub"
    )


def test_block_case_reads_every_size_from_the_tensors():
    q, k, v = torch.zeros(2, 6, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 4)
    assert TileCase.of(q, k, v, TileTerms(1.0)) == TileCase("cpu", torch.float32, EVERYTHING, 6, 3, 5, 7, 8, 4)


TRIPLES = {
    "three dims": (
        (6, 5, 8),
        (2, 3, 5, 8),
        (2, 3, 5, 8),
        "expected [B, N, S, D], [B, G, T, D] and [B, G, T, V]; give them so.",
    ),
    "keys and values of other lengths": ((2, 6, 5, 8), (2, 3, 5, 8), (2, 3, 4, 8), "expected [B, N, S, D]"),
    "keys and values of other heads": ((2, 6, 5, 8), (2, 3, 5, 8), (2, 2, 5, 8), "expected [B, N, S, D]"),
    "batches differ": ((2, 6, 5, 8), (1, 3, 5, 8), (1, 3, 5, 8), "batch and head size must agree"),
    "head sizes differ": ((2, 6, 5, 8), (2, 3, 5, 4), (2, 3, 5, 8), "batch and head size must agree"),
    "heads do not divide": (
        (2, 6, 5, 8),
        (2, 4, 5, 8),
        (2, 4, 5, 8),
        "K/V heads divide the query heads; give k and v so.",
    ),
}


@pytest.mark.parametrize("name", TRIPLES)
def test_block_case_refuses_shapes_that_do_not_fit(name):
    *shapes, fault = TRIPLES[name]
    with pytest.raises(ValueError) as error:
        TileCase.of(*(torch.zeros(shape) for shape in shapes), TileTerms(1.0))
    assert str(error.value).startswith("q {}, k {}, v {}: ".format(*shapes))
    assert fault in str(error.value)


@pytest.mark.parametrize("other", [{"dtype": torch.float64}, {"device": "meta"}])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_block_case_refuses_tensors_of_different_dtype_or_device(place, other):
    tensors = [torch.zeros(2, 4, 5, 8) for _ in range(3)]
    tensors[place] = tensors[place].to(**other)
    with pytest.raises(ValueError, match=r"q, k and v are o[fn] .*: they must be o[fn] one"):
        TileCase.of(*tensors, TileTerms(1.0))


@pytest.mark.parametrize(
    "shape", [(5,), (4, 5, 7), (5, 6), (4, 7), (1, 7), (1, 2, 5, 7), (3, 1, 5, 7), (1, 1, 5, 1), (1, 1, 5, 6)]
)
def test_block_case_refuses_a_mask_of_another_shape(shape):
    q, k, v = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 8)
    with pytest.raises(ValueError, match="mask"):
        TileCase.of(q, k, v, TileTerms(1.0, visible=torch.ones(shape, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("window", "visible", "message"),
    [
        (
            TRIANGLE,
            torch.ones(2, 2, dtype=torch.bool),
            "a mask tensor beside Window(left=None, right=0): it says all of",
        ),
        (EVERYTHING, torch.ones(2, 2), "a mask is boolean, True where a query sees a key; this one is torch.float32."),
    ],
    ids=["with a window", "float"],
)
def test_a_mask_tensor_is_boolean_and_says_all(window, visible, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TileTerms(1.0, window, visible)
