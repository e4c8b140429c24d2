"""Triton's merge: its numbers, which the interpreter computes on a CPU; its code for three GPUs; what it refuses.

No test here runs on a GPU. The interpreter's exp and log are numpy's.
"""

import re
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_cp.kernels import TileOutput, choose_merge_kernel, triton_merge
from mindspeed_cp.kernels.merge import TorchMerge
from mindspeed_cp.kernels.triton_merge import TritonMerge, merge_tile
from mindspeed_cp.testing.rank_pool import LIMIT_S, RankPool
from unit_tests import merge_cases as cases
from unit_tests.merge_cases import Case, Merged, merged_part

ROOT = Path(__file__).resolve().parents[3]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., Any]]:
    """What a function returns in a process where Triton interprets: `interpreter(function, *args)`."""
    pool = RankPool(1, [], cases.interpret)  # Fresh: Triton reads the variable when it is imported.
    yield lambda function, *args: pool.call([0], LIMIT_S, function, *args)[0]
    pool.close()


# Numbers.

CASES = {
    "bf16": Case(),
    "fp16": Case(dtype=torch.float16),
    "fp32": Case(dtype=torch.float32),
    "whole tiles": Case(queries=128, head_size=64, batch=1),
    "one query": Case(queries=1),
    "one value": Case(head_size=1, batch=1),
    "one head": Case(heads=1, queries=33, head_size=128),
    "uneven sizes": Case(batch=3, heads=5, queries=7, head_size=5),
    "values that are more than a tile": Case(queries=3, head_size=5000, batch=1),
    "later queries": Case(skipped=35, queries=35),
    "in memory as SBND, later queries": Case(memory="SBNV", skipped=35, queries=35),
    "in memory as BSND, lse as BSN": Case(memory="BSNV", lse_memory="BSN"),
    "values that are not adjacent": Case(memory="VSNB", lse_memory="SNB", dtype=torch.float32),
    "block expanded": Case(expanded=True),
}


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_triton_merge_is_within_two_ulp_as_the_definition_is_and_writes_nothing_else(interpreter, name):
    case = CASES[name]
    before, actual = interpreter(cases.merge, TritonMerge(), case)
    definition, exact = (cases.merge(TorchMerge(), case, dtype)[1] for dtype in (torch.float32, torch.float64))
    _, block = cases.inputs(case, torch.float64)
    operands = Merged(
        *(torch.maximum(x.abs(), y.abs()) for x, y in zip(merged_part(case, before), block, strict=False))
    )
    for merged in (actual, definition):
        assert_within_two_ulp(merged_part(case, merged), merged_part(case, exact), operands)

    for changed, original in zip(merged_part(case, actual), merged_part(case, before), strict=True):
        changed.copy_(original)
    assert torch.equal(actual.out, before.out)
    assert torch.equal(actual.lse, before.lse)


def assert_within_two_ulp(actual: Merged, exact: Merged, operands: Merged) -> None:
    """Ulp of fp32 at the larger operand, of lse at 1 at least; infinite where the exact values are."""
    dead = exact.lse == -torch.inf
    assert torch.equal(actual.lse == -torch.inf, dead)
    assert not actual.out[dead].any()
    for name, x, y, size in zip(Merged._fields, actual, exact, operands, strict=True):
        live, smallest = y.isfinite(), 1.0 if name == "lse" else 0.0
        ulps = (x.double() - y)[live].abs() / (2**-23 * size[live].clamp_min(smallest))
        assert ulps.nan_to_num(0.0).max() <= 2, f"{name}: {ulps.max():.1f} ulp"


@needs_triton
@pytest.mark.parametrize("dim", range(3))
def test_triton_merge_finds_rows_more_than_2_to_the_31_numbers_apart(interpreter, tmp_path, dim):
    out, lse = interpreter(cases.merge_far_apart, TritonMerge(), dim, str(tmp_path))
    torch.testing.assert_close(out, torch.full((3, 4), 0.5))
    torch.testing.assert_close(lse, torch.full((3,), 2.0).log())


@needs_triton
@pytest.mark.parametrize("where", ["out", "block_out", "lse", "block_lse"])
def test_triton_merge_passes_a_nan_on_where_the_definition_does(interpreter, where):
    for actual, expected in zip(
        interpreter(cases.merge_nan, TritonMerge(), where), cases.merge_nan(TorchMerge(), where), strict=True
    ):
        assert torch.equal(actual.isnan(), expected.isnan())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_output_of_blocks_and_later_queries_is_that_of_the_definition(interpreter, dtype):
    generator = torch.Generator().manual_seed(1)
    blocks = []
    for start in (0, 6, 0, 3):
        out = torch.randn(1, 2, 12 - start, 8, generator=generator).to(dtype)
        lse = torch.randn(1, 2, 12 - start, generator=generator)
        lse[:, :, 3:5], out[:, :, 3:5] = -torch.inf, 0
        blocks.append((TileOutput(out, lse), slice(start, 12)))
    actual, expected = interpreter(cases.merge_blocks, blocks, True), cases.merge_blocks(blocks, False)
    torch.testing.assert_close(actual.out, expected.out)
    torch.testing.assert_close(actual.lse, expected.lse)
    assert (actual.out.dtype, actual.lse.dtype) == (dtype, torch.float32)


# Code.


def compiled(capability: int, dtype: str, strides: str) -> Any:
    """The kernel for a GPU of this compute capability, as Triton specialises it for adjacent values, V = 128.

    strides: type of every number that is not a pointer.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = merge_tile()
    constants = {"out_v": 1, "block_out_v": 1, "QUERIES": 32, "VALUES": 128}
    signature = dict.fromkeys(kernel.arg_names, strides) | dict.fromkeys(constants, "constexpr")
    signature |= dict.fromkeys(("out", "lse", "block_lse"), "*fp32") | {"block_out": f"*{dtype}"}
    lse_strides = {"lse_b", "lse_n", "lse_s", "block_lse_b", "block_lse_n", "block_lse_s"}
    uneven = {"num_heads", "num_queries", "tiles", *lse_strides, *constants}
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name not in uneven
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "strides"),
    [
        (80, "bf16", "i32"),
        (90, "bf16", "i64"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(100, "bf16", "i32"), (80, "fp16", "i64")]),
        pytest.param(80, "fp32", "i32", marks=pytest.mark.slow),
    ],
)
def test_kernel_compiles_and_reads_16_bytes_at_a_time_and_all_before_it_writes(
    monkeypatch, tmp_path, capability, dtype, strides
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled(capability, dtype, strides)
    assert code["cubin"].startswith(b"\x7fELF")
    assert re.search(rf"^\.target sm_{capability}a?$", code["ptx"], re.MULTILINE)
    accesses = re.findall(r"ld\.global\S*|st\.global\S*|bar\.sync", code["ptx"])
    *reads, last = [place for place, access in enumerate(accesses) if access.startswith("ld")]
    first_write = next(place for place, access in enumerate(accesses) if access.startswith("st"))
    assert len(reads) > 0 and "bar.sync" in accesses[last:first_write]
    assert {"ld.global.v4.b32", "st.global.v4.b32"} <= set(accesses)
    assert "_local" not in code["ptx"], "registers were spilled"


# Choice.


@pytest.mark.parametrize(
    ("device_type", "dtype", "reasons"),
    [
        ("cuda", torch.bfloat16, []),
        ("cuda", torch.float16, []),
        ("cuda", torch.float32, []),
        ("cuda", torch.float64, ["merges bfloat16, float16 and float32, not float64"]),
        ("npu", torch.bfloat16, ["runs on CUDA, not on npu"]),
        ("cpu", torch.float64, ["runs on CUDA, not on cpu", "merges bfloat16, float16 and float32, not float64"]),
    ],
)
def test_triton_merge_refuses_with_every_reason(monkeypatch, device_type, dtype, reasons):
    monkeypatch.setattr(triton_merge, "missing", lambda: ())
    assert TritonMerge().unsupported_reasons(device_type, dtype) == reasons
    monkeypatch.setattr(triton_merge, "missing", lambda: ("triton is not installed",))
    assert TritonMerge().unsupported_reasons(device_type, dtype) == [*reasons, "triton is not installed"]


@pytest.mark.parametrize("compiler", ["gcc", "clang", "CC"])
def test_triton_and_a_compiler_are_what_may_be_missing(monkeypatch, tmp_path, compiler):
    missing = triton_merge.missing.__wrapped__
    monkeypatch.setattr(triton_merge, "find_spec", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    no_compiler = "triton needs a C compiler: gcc, clang, or what CC names"
    assert missing() == ("triton is not installed", no_compiler)
    monkeypatch.setattr(triton_merge, "find_spec", lambda name: name)
    assert missing() == (no_compiler,)
    if compiler == "CC":
        monkeypatch.setenv("CC", "cc")
    else:
        (tmp_path / compiler).touch(mode=0o755)
    assert missing() == ()


def test_plain_torch_merges_where_triton_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("CC", "cc")
    triton_merge.missing.cache_clear()
    try:
        assert choose_merge_kernel("cuda", torch.bfloat16).name == "torch"
        assert TritonMerge().unsupported_reasons("cuda", torch.bfloat16) == ["triton is not installed"]
    finally:
        triton_merge.missing.cache_clear()
