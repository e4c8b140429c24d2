"""Merging and adding in place, in plain torch: the definitions; and the choice between the kernels that merge.

That a merge of disjoint keys is attention over all of them is in attention/test_merge.py.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mindspeed_cp.kernels import MERGE_KERNELS, TileOutput, add_, choose_merge_kernel, merge, triton_merge
from mindspeed_cp.kernels.merge import TorchMerge
from unit_tests import merge_cases as cases
from unit_tests.merge_cases import Case

LOW_PRECISION = [torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def largest_temporary(function: Callable[..., None], *args: object) -> int:
    """Bytes of the largest tensor that a function makes on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function(*args)
    return max(event.self_cpu_memory_usage for event in record.events())


# Merging.


@pytest.mark.parametrize("size", [0.0, 100.0, 10000.0, -10000.0])
def test_factors_do_not_have_the_rounding_error_of_a_large_lse(size):
    out, block_out = normal(1, 1, 500, 8, dtype=torch.float32), normal(1, 1, 500, 8, dtype=torch.float32, seed=2)
    lse, block_lse = (normal(1, 1, 500, seed=seed).add(size).float() for seed in (3, 4))
    factor = torch.sigmoid(block_lse.double() - lse.double()).unsqueeze(-1)
    exact = out.double() * (1 - factor) + block_out.double() * factor
    TorchMerge().merge_(out, lse, TileOutput(block_out, block_lse))
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("portion", [1, 40, 1000, 10**6])
@pytest.mark.parametrize(
    "case",
    [Case(), Case(memory="SBNV", lse_memory="SBN", skipped=9), Case(memory="VSNB", queries=1), Case(expanded=True)],
)
def test_merge_in_portions_is_the_merge_of_the_whole_and_changes_nothing_else(monkeypatch, case, portion):
    monkeypatch.setattr(merge, "_PORTION", portion)
    before, after = cases.merge(TorchMerge(), case, torch.float64)
    results, block = cases.inputs(case, torch.float64)
    expected = cases.merged_part(case, results)
    lse = torch.logaddexp(expected.lse, block.lse)
    seen, added = (torch.exp(each - lse).nan_to_num(0.0).unsqueeze(-1) for each in (expected.lse, block.lse))
    expected.out.copy_(seen * expected.out + added * block.out)
    expected.lse.copy_(lse)
    torch.testing.assert_close(after, results, rtol=0, atol=1e-14)
    assert not torch.equal(after.out, before.out)


@pytest.mark.parametrize("where", ["out", "block_out", "lse", "block_lse"])
def test_merge_passes_a_nan_on_in_its_row_alone(where):
    out, lse = cases.merge_nan(TorchMerge(), where)
    whole_row = where in ("lse", "block_lse")
    assert out.isnan().tolist() == [[False] * 4, [True, *[whole_row] * 3]]
    assert lse.isnan().tolist() == [False, whole_row]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_merge_makes_no_tensor_larger_than_a_piece(dtype):
    out, lse = torch.zeros(2, 4, 2048, 128), torch.zeros(2, 4, 2048)
    block = TileOutput(torch.ones(2, 4, 2048, 128, dtype=dtype), torch.zeros(2, 4, 2048))
    assert 0 < largest_temporary(TorchMerge().merge_, out, lse, block) <= 4 * merge._PORTION < 4 * out.numel()


# Adding.


@pytest.mark.parametrize("portion", [1, 100, 10**6])
@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32, torch.float64])
def test_add_gives_the_sum_rounded_once_and_changes_nothing_else(monkeypatch, dtype, portion):
    monkeypatch.setattr(merge, "_PORTION", portion)
    whole = normal(12, 2, 3, 8, dtype=torch.promote_types(dtype, torch.float32)).permute(1, 2, 0, 3)
    partial, before = normal(2, 3, 5, 8, dtype=dtype, seed=2), whole.clone()
    added = partial.clone()
    add_(whole[:, :, 4:9], partial)
    assert torch.equal(whole[:, :, 4:9], before[:, :, 4:9] + partial.to(whole.dtype))
    whole[:, :, 4:9] = before[:, :, 4:9]
    assert torch.equal(whole, before) and torch.equal(partial, added)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_add_makes_no_tensor_larger_than_a_piece(dtype):
    total, partial = torch.zeros(2, 4, 2048, 128), torch.ones(2, 4, 2048, 128, dtype=dtype)
    assert largest_temporary(add_, total, partial) <= 4 * merge._PORTION < 4 * total.numel()


def test_that_check_sees_the_cast_of_the_whole():
    total, partial = torch.zeros(2, 4, 2048, 128), torch.ones(2, 4, 2048, 128, dtype=torch.bfloat16)
    assert largest_temporary(total.add_, partial) == 4 * total.numel()


def test_nothing_is_merged_or_added_where_there_are_no_tokens():
    empty = torch.zeros(1, 2, 0, 4)
    add_(empty, empty)
    TorchMerge().merge_(empty, empty[..., 0], TileOutput(empty, empty[..., 0]))


# Choice.


@pytest.mark.parametrize(
    ("device_type", "dtype", "name"),
    [
        ("cuda", torch.bfloat16, "triton"),
        ("cuda", torch.float64, "torch"),
        ("npu", torch.bfloat16, "torch"),
        ("cpu", torch.float32, "torch"),
    ],
)
def test_choose_merge_kernel_takes_the_first_that_can(monkeypatch, device_type, dtype, name):
    monkeypatch.setattr(triton_merge, "missing", lambda: ())
    assert choose_merge_kernel(device_type, dtype).name == name
    assert choose_merge_kernel(device_type, dtype, MERGE_KERNELS[::-1]).name == "torch"


def test_choose_merge_kernel_names_every_reason_when_none_can():
    never = SimpleNamespace(name="never", unsupported_reasons=lambda device_type, dtype: ["is a stub", f"not {dtype}"])
    with pytest.raises(NotImplementedError) as error:
        choose_merge_kernel("npu", torch.float16, [never])
    assert str(error.value) == (
        "no kernel can merge blocks of torch.float16 on npu\n  not never: is a stub; not torch.float16"
    )
