"""FlashAttention 3 is called by position: its functions are looked at before."""

import sys

import pytest
import torch

from mindspeed_cp.kernels import TileCase
from mindspeed_cp.kernels.flash_attn import FlashAttn3Kernel
from mindspeed_cp.kernels.protocol import TRIANGLE
from unit_tests.emulated_cuda import emulated_cuda

CASE = TileCase("cuda", torch.bfloat16, TRIANGLE, 8, 2, 4096, 4096, 128, 128, (9, 0))
TOO_OLD = "needs FlashAttention 3 of release 2.8.0 or newer: argument {1} of {0} is not softmax_scale"


@pytest.fixture
def interface():
    with emulated_cuda():
        yield sys.modules["flash_attn_interface"]


def function(place: int):
    """One that takes softmax_scale after `place` other arguments."""
    namespace: dict = {}
    names = [f"a{number}" for number in range(place)]
    exec(f"def call({', '.join(names)}, softmax_scale, causal): ...", namespace)
    return namespace[
        "call"
    ], f"({''.join(f'Tensor? {name}, ' for name in names)}float softmax_scale, bool causal) -> ()"


@pytest.mark.parametrize(
    ("name", "place", "reasons"),
    [
        ("_flash_attn_forward", 23, []),
        ("_flash_attn_forward", 21, [TOO_OLD.format("_flash_attn_forward", 23)]),
        ("_flash_attn_forward", 2, [TOO_OLD.format("_flash_attn_forward", 23)]),
        ("_flash_attn_backward", 15, []),
        ("_flash_attn_backward", 9, [TOO_OLD.format("_flash_attn_backward", 15)]),
    ],
)
def test_scale_in_another_place_is_refused_of_functions_and_of_custom_operators(
    interface, monkeypatch, name, place, reasons
):
    plain, schema = function(place)
    custom = torch.library.custom_op(f"mindspeed_cp_tests::{name}_{place}", plain, mutates_args=(), schema=schema)
    for function_of_a_release in (plain, custom):
        monkeypatch.setattr(interface, name, function_of_a_release)
        assert FlashAttn3Kernel().unsupported_reasons(CASE) == reasons


def test_module_without_the_function_is_refused(interface, monkeypatch):
    monkeypatch.delattr(interface, "_flash_attn_backward")
    assert FlashAttn3Kernel().unsupported_reasons(CASE) == ["this flash_attn_interface has no _flash_attn_backward"]
