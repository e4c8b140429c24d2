"""cuDNN's attention: where it is preferred, where refused, and how its backward pass gets its tensors."""

import pytest
import torch

from mindspeed_cp.kernels import KERNELS, TileCase, TileTerms
from mindspeed_cp.kernels.cuda import CudnnKernel, _fit_in_order_of
from mindspeed_cp.kernels.protocol import TRIANGLE
from unit_tests import emulated_cuda as emulator
from unit_tests.emulated_cuda import emulated_cuda

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def emulated():
    with emulated_cuda():
        yield


def case(capability: tuple[int, int] | None, value_head_size: int = 128) -> TileCase:
    device = "cpu" if capability is None else "cuda"
    return TileCase(device, BF16, TRIANGLE, 8, 2, 4096, 4096, 128, value_head_size, capability)


@pytest.mark.parametrize(
    ("capability", "version", "value_head_size", "name"),
    [
        ((9, 0), 91501, 128, "cuda_cudnn"),
        ((9, 0), 91500, 128, "flash_attn_3"),
        ((9, 0), 91002, 64, "cuda_efficient"),
        ((10, 0), 91501, 128, "cuda_cudnn"),
        ((10, 3), 91501, 128, "cuda_cudnn"),
        ((10, 7), 92500, 128, "flash_attn"),
        ((10, 7), 92500, 64, "cuda_cudnn"),
        ((10, 7), 92400, 64, "cuda_efficient"),
        ((12, 0), 92500, 128, "flash_attn"),
        ((8, 0), 92500, 128, "flash_attn"),
    ],
)
def test_cudnn_goes_first_where_torch_prefers_it_and_nowhere_when_it_is_too_old(
    capability, version, value_head_size, name, monkeypatch
):
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: version)
    assert KERNELS.in_bnsd().choose(case(capability, value_head_size)).name == name


def test_cudnn_that_torch_cannot_use_is_a_reason_on_gpus_and_not_asked_for_elsewhere(monkeypatch):
    def version():
        raise RuntimeError("cuDNN version incompatibility: compiled against (9, 19), found (8, 9).\nLook at the paths.")

    monkeypatch.setattr("torch.backends.cudnn.version", version)
    assert CudnnKernel().unsupported_reasons(case((9, 0))) == [
        "torch cannot use this cuDNN: cuDNN version incompatibility: compiled against (9, 19), found (8, 9)."
    ]
    assert CudnnKernel().unsupported_reasons(case(None)) == ["runs on NVIDIA GPUs, not on cpu"]


def in_memory(order: str, x: torch.Tensor) -> torch.Tensor:
    outermost_first = ["BNSD".index(dim) for dim in order]
    return x.permute(outermost_first).contiguous().permute([outermost_first.index(dim) for dim in range(4)])


@pytest.mark.parametrize("torch_version", [(2, 8), (2, 9)])
@pytest.mark.parametrize("others", ["BNSD", "SBND", "BSND"])
@pytest.mark.parametrize("of_q", ["BNSD", "SBND", "BSND"])
def test_backward_gets_out_and_dout_in_the_order_of_q_and_lse_in_the_forwards_dims(
    of_q, others, torch_version, monkeypatch
):
    monkeypatch.setattr(emulator, "TORCH", torch_version)
    q, k, v, dout = (torch.randn(2, 4, 128, size, dtype=BF16) for size in (64, 64, 32, 32))
    kernel, terms = CudnnKernel(), TileTerms(0.125, TRIANGLE)
    output = kernel.forward(in_memory(of_q, q), k, v, terms)
    expected = kernel.backward(in_memory(of_q, dout), in_memory(of_q, q), k, v, output, terms)
    # A ring's output is merged, and may lie in memory as it likes.
    output = output._replace(out=in_memory(others, output.out))
    actual = kernel.backward(in_memory(others, dout), in_memory(of_q, q), k, v, output, terms)
    assert all(map(torch.equal, actual, expected))


def test_tensors_that_lie_in_memory_as_megatrons_are_not_copied():
    q, out = (in_memory("SBND", torch.randn(2, 4, 128, size, dtype=BF16)) for size in (64, 32))
    second_half = out[:, :, 64:]
    assert _fit_in_order_of(q, second_half).data_ptr() == second_half.data_ptr()
