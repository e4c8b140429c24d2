"""What a TileCase refuses, and the way out that its messages name."""

import re

import pytest
import torch

from mindspeed_cp.kernels import TileCase, TileTerms

NONE = TileTerms(1.0)


def tensors(*dtypes: torch.dtype) -> list[torch.Tensor]:
    return [
        torch.zeros(shape, dtype=dtype)
        for shape, dtype in zip(((2, 4, 5, 8), *[(2, 2, 7, 8)] * 2), dtypes, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_attention_is_not_computed_in_are_refused(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError) as error:
        TileCase.of(*tensors(*[dtype] * 3), NONE)
    assert str(error.value) == (
        f"q, k and v are of dtype {name}: attention is computed in bfloat16, float16, float32, float64; cast them, "
        "q.to(torch.float32) for instance."
    )


def test_mixed_dtypes_are_refused_with_the_cast_that_mends_it():
    with pytest.raises(ValueError) as error:
        TileCase.of(*tensors(torch.bfloat16, torch.float32, torch.bfloat16), NONE)
    assert str(error.value) == (
        "q, k and v are of dtypes bfloat16, float32, bfloat16: they must be of one; cast them, k.to(q.dtype) and "
        "v.to(q.dtype) for instance."
    )


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 1, 5, 7), (2, 5, 7), (1, 1, 1, 5, 7)])
def test_mask_that_does_not_fit_is_refused_with_its_shape_and_those_that_would(shape):
    q, k, v = tensors(*[torch.float32] * 3)
    needed = "it must be [S, T] = [5, 7] or [1 or B, 1 or N, S, T] = [1 or 2, 1 or 4, 5, 7]."
    with pytest.raises(ValueError, match=rf"^a mask of {re.escape(str(shape))} .*{re.escape(needed)}$"):
        TileCase.of(q, k, v, TileTerms(1.0, visible=torch.ones(shape, dtype=torch.bool)))


def test_no_key_value_heads_are_refused():
    q, k, v = tensors(*[torch.float32] * 3)
    with pytest.raises(ValueError, match="K/V heads divide the query heads"):
        TileCase.of(q, k[:, :0], v[:, :0], NONE)
