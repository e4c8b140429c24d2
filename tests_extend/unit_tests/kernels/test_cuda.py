"""The kernels for NVIDIA GPUs over their emulator: choice, refusals, copies, rings; and the emulator itself."""

import dataclasses
import inspect
import sys
from types import ModuleType

import pytest
import torch

from mindspeed_cp.kernels import KERNELS, KernelRegistry, TileCase, TileTerms
from mindspeed_cp.kernels.cuda import CudaFlashKernel, CudnnKernel, EfficientKernel, fit
from mindspeed_cp.kernels.flash_attn import FlashAttn3Kernel, FlashAttnKernel
from mindspeed_cp.kernels.protocol import EVERYTHING, TRIANGLE
from mindspeed_cp.topology import CPTopology
from unit_tests import emulated_cuda as emulator
from unit_tests.dense import assert_as_accurate_as, causal_mask, dense_attention
from unit_tests.emulated_cuda import emulated_cuda
from unit_tests.emulation import OnEmulator
from unit_tests.ring_cases import attend_virtually, case_on, dense, grid_name
from unit_tests.ulysses_cases import inputs, restored

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
AMPERE, HOPPER, BLACKWELL, TURING, ADA = (8, 0), (9, 0), (10, 0), (7, 5), (8, 9)
ON_GPU = KERNELS.only(["flash_attn", "cuda_flash", "flash_attn_3", "cuda_cudnn", "cuda_efficient"])
FLASH_KERNELS = (FlashAttnKernel(), CudaFlashKernel(), FlashAttn3Kernel())


@pytest.fixture(autouse=True)
def emulated():
    with emulated_cuda():
        yield


def block_case(capability, **changed) -> TileCase:
    """The case of causal attention on a GPU."""
    return TileCase("cuda", BF16, TRIANGLE, 8, 2, 4096, 4096, 128, 128, capability)._replace(**changed)


def without_packages(monkeypatch) -> None:
    monkeypatch.setattr("mindspeed_cp.kernels.flash_attn.find_spec", lambda name: None)


# Choice and refusals.


@pytest.mark.parametrize(
    ("capability", "changed", "with_packages", "without"),
    [
        (AMPERE, {}, "flash_attn", "cuda_flash"),
        (AMPERE, {"value_head_size": 64}, "cuda_cudnn", "cuda_cudnn"),
        (AMPERE, {"masked": True, "window": EVERYTHING}, "cuda_efficient", "cuda_efficient"),
        (AMPERE, {"dtype": FP32}, "cuda_efficient", "cuda_efficient"),
        (AMPERE, {"dtype": torch.float64}, "reference", "reference"),
        (HOPPER, {}, "cuda_cudnn", "cuda_cudnn"),
        (HOPPER, {"num_queries": 4000, "num_keys": 4000}, "flash_attn_3", "cuda_flash"),
        (HOPPER, {"head_size": 256, "value_head_size": 256}, "flash_attn_3", "cuda_flash"),
        (HOPPER, {"head_size": 192}, "cuda_efficient", "cuda_efficient"),
        (HOPPER, {"masked": True, "window": EVERYTHING}, "cuda_efficient", "cuda_efficient"),
        (BLACKWELL, {}, "cuda_cudnn", "cuda_cudnn"),
        (BLACKWELL, {"num_queries": 4000, "num_keys": 4000}, "flash_attn", "cuda_flash"),
        (TURING, {"dtype": FP16}, "cuda_efficient", "cuda_efficient"),
        (TURING, {}, "reference", "reference"),
    ],
)
def test_kernel_for_a_gpu_and_a_case(capability, changed, with_packages, without, monkeypatch):
    case = block_case(capability, **changed)
    assert dataclasses.replace(KERNELS).choose(case).name == with_packages
    without_packages(monkeypatch)
    assert dataclasses.replace(KERNELS).choose(case).name == without


@pytest.mark.parametrize(
    ("capability", "changed", "refusals"),
    [
        (
            TURING,
            {},
            {
                "flash_attn": "needs compute capability 8.0 or above, not 7.5",
                "cuda_flash": "needs compute capability 8.0 or above, not 7.5",
                "flash_attn_3": "needs compute capability 8.0 or above, not 7.5; is for compute capability 9.0 only",
                "cuda_cudnn": "needs compute capability 8.0 or above, not 7.5",
                "cuda_efficient": "takes float32 and float16 here, not bfloat16",
            },
        ),
        (
            AMPERE,
            {"masked": True, "window": EVERYTHING, "head_size": 100, "value_head_size": 300, "num_keys": 65},
            {
                "flash_attn": "takes no arbitrary mask; takes head sizes that are multiples of 8, not 100; takes head "
                "sizes that are multiples of 8, not 300; needs one head size, not 100 for keys and 300 for values",
                "cuda_flash": "takes no arbitrary mask; takes head sizes that are multiples of 8, not 100; takes head "
                "sizes that are multiples of 8, not 300; needs one head size, not 100 for keys and 300 for values",
                "flash_attn_3": "takes no arbitrary mask; takes head sizes that are multiples of 8, not 100; takes "
                "head sizes that are multiples of 8, not 300; needs one head size, not 100 for keys and 300 for "
                "values; is for compute capability 9.0 only",
                "cuda_cudnn": "takes no arbitrary mask; takes head sizes that are multiples of 8, not 100; takes head "
                "sizes that are multiples of 8, not 300; takes head sizes up to 128, not 300; is used for multiples "
                "of 128 queries and keys only, not for 4096 and 65",
                "cuda_efficient": "takes head sizes that are multiples of 8, not 100; takes head sizes that are "
                "multiples of 8, not 300",
            },
        ),
        (
            HOPPER,
            {"dtype": torch.float64, "head_size": 257, "value_head_size": 257},
            {
                **dict.fromkeys(
                    ("flash_attn", "cuda_flash", "flash_attn_3"),
                    "takes bfloat16 and float16, not float64; takes head sizes that are multiples of 2, not 257; "
                    "takes head sizes up to 256, not 257",
                ),
                "cuda_cudnn": "takes bfloat16 and float16, not float64; takes head sizes that are multiples of 2, not "
                "257; takes head sizes up to 128, not 257",
                "cuda_efficient": "takes float32 and float16 and bfloat16 here, not float64; takes head sizes that "
                "are multiples of 2, not 257",
            },
        ),
        (
            AMPERE,
            {"device_type": "npu", "compute_capability": None, "num_queries": 64, "num_keys": 64},
            {
                **dict.fromkeys(ON_GPU.names, "runs on NVIDIA GPUs, not on npu"),
                "cuda_cudnn": "runs on NVIDIA GPUs, not on npu; is used for multiples of 128 queries and keys only, "
                "not for 64 and 64",
            },
        ),
    ],
    ids=["7.5", "8.0", "9.0", "npu"],
)
def test_message_names_every_kernel_and_each_of_its_reasons(capability, changed, refusals):
    case = block_case(capability, **changed)
    with pytest.raises(NotImplementedError) as error:
        ON_GPU.choose(case)
    expected = [f"  not {name}: {refusals[name]}" for name in ON_GPU.names]
    assert str(error.value).splitlines() == [f"no attention kernel can compute {case}", *expected]


@pytest.mark.parametrize("kernel", FLASH_KERNELS[:2], ids=lambda kernel: kernel.name)
def test_flash_has_no_backward_pass_for_some_head_sizes_on_small_gpus(kernel):
    size = {"head_size": 224, "value_head_size": 224}
    assert kernel.unsupported_reasons(block_case(ADA, **size)) == [
        "has no backward pass for head size 224 on compute capability 8.9"
    ]
    assert kernel.unsupported_reasons(block_case(AMPERE, **size)) == []
    assert kernel.unsupported_reasons(block_case(ADA)) == []


@pytest.mark.parametrize(
    ("kernel", "place", "value", "reason"),
    [
        *(
            (kernel, "torch.version.hip", "6.4", "runs on NVIDIA GPUs, and this torch is built for AMD's")
            for kernel in ON_GPU.kernels
        ),
        (
            CudaFlashKernel(),
            "torch.backends.cuda.is_flash_attention_available",
            lambda: False,
            "this torch is built without it",
        ),
        (
            CudnnKernel(),
            "torch.backends.cudnn.version",
            lambda: 91002,
            "needs cuDNN 9.15.1 or newer, not the 91002 that torch finds",
        ),
        (
            CudnnKernel(),
            "torch.backends.cudnn.version",
            lambda: None,
            "needs cuDNN 9.15.1 or newer, and torch finds none",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", ""),
)
def test_kernel_refuses_a_torch_that_is_built_otherwise(kernel, place, value, reason, monkeypatch):
    assert kernel.unsupported_reasons(block_case(HOPPER)) == []
    monkeypatch.setattr(place, value)
    assert kernel.unsupported_reasons(block_case(HOPPER)) == [reason]


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_package_that_is_absent_or_cannot_be_imported_is_a_reason(name, monkeypatch):
    kernel = {"flash_attn": FlashAttnKernel(), "flash_attn_interface": FlashAttn3Kernel()}[name]
    module = {"flash_attn": "flash_attn.flash_attn_interface"}.get(name, name)
    assert kernel.unsupported_reasons(block_case(HOPPER)) == []
    monkeypatch.setitem(sys.modules, module, None)
    if module != name:
        (reason,) = kernel.unsupported_reasons(block_case(HOPPER))
        assert reason.startswith(f"{module} cannot be imported: ")
    without_packages(monkeypatch)
    assert kernel.unsupported_reasons(block_case(HOPPER)) == [f"{name} is not installed"]
    assert kernel.unsupported_reasons(block_case(HOPPER, device_type="cpu", compute_capability=None)) == [
        "runs on NVIDIA GPUs, not on cpu",
        f"{name} is not installed",
    ]


def test_flash_attn_older_than_its_present_functions_is_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["flash_attn"], "__version__", "2.6.3")
    assert FlashAttnKernel().unsupported_reasons(block_case(AMPERE)) == ["needs flash_attn 2.7 or newer, not 2.6.3"]


def test_packages_are_not_imported_for_another_device(monkeypatch):
    module = ModuleType("flash_attn")
    module.__spec__ = sys.modules["flash_attn"].__spec__
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.delitem(sys.modules, "flash_attn.flash_attn_interface")
    case = block_case(AMPERE, device_type="cpu", compute_capability=None)
    assert FlashAttnKernel().unsupported_reasons(case) == ["runs on NVIDIA GPUs, not on cpu"]


# Deterministic mode.


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_mode_refuses_what_is_not_deterministic(deterministic):
    wants = "torch.use_deterministic_algorithms asks for that"
    large = block_case(HOPPER, head_size=256, value_head_size=256)
    assert CudnnKernel().unsupported_reasons(block_case(HOPPER)) == [f"is not deterministic, and {wants}"]
    assert FlashAttn3Kernel().unsupported_reasons(large) == [f"is not deterministic with head size 256, and {wants}"]
    assert FlashAttn3Kernel().unsupported_reasons(block_case(HOPPER)) == []


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("kernel", [FlashAttnKernel(), FlashAttn3Kernel()], ids=lambda kernel: kernel.name)
def test_packages_are_told_of_deterministic_mode(kernel, wanted, monkeypatch, request):
    if wanted:
        request.getfixturevalue("deterministic")
    name = {"flash_attn": "flash_attn.flash_attn_interface", "flash_attn_3": "flash_attn_interface"}[kernel.name]
    backward, told = sys.modules[name]._flash_attn_backward, []

    def record(*args, **kwargs):
        told.append(inspect.signature(backward).bind(*args, **kwargs).arguments["deterministic"])
        return backward(*args, **kwargs)

    monkeypatch.setattr(sys.modules[name], "_flash_attn_backward", record)
    q = torch.ones(1, 1, 4, 8, dtype=BF16)
    output = kernel.forward(q, q, q, TileTerms(1.0))
    kernel.backward(q, q, q, q, output, TileTerms(1.0))
    assert told == [wanted]


# Copies.


@pytest.mark.parametrize("order", ["BNSD", "SBND", "BSND"])
def test_a_tensor_that_fits_is_not_copied(order):
    dims = ["BNSD".index(dim) for dim in order]
    x = torch.zeros([(2, 4, 6, 8)[dim] for dim in dims], dtype=BF16).permute(sorted(range(4), key=dims.__getitem__))
    assert x.shape == (2, 4, 6, 8)
    assert fit(x) is x
    assert fit(x[:, :, 3:]).data_ptr() == x[:, :, 3:].data_ptr()


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(64.0).to(BF16).view(1, 1, 8, 8).mT,
        torch.arange(65.0).to(BF16)[1:].view(1, 1, 8, 8),
        torch.arange(72.0).to(BF16).view(1, 1, 8, 9)[..., :8],
        torch.arange(8.0).to(BF16).expand(1, 1, 8, 8),
    ],
    ids=["last dim not dense", "starts between", "rows start between", "expanded"],
)
def test_a_tensor_that_does_not_fit_is_copied(x):
    assert torch.equal(fit(x), x)
    assert fit(x).is_contiguous()
    assert fit(x).data_ptr() % 16 == 0 and fit(x).data_ptr() != x.data_ptr()


def handed_to_efficient(kv_heads: int, visible: torch.Tensor | None, monkeypatch) -> tuple[torch.Tensor, ...]:
    """key, value and attn_bias that its forward pass gets."""
    handed, q = [], torch.zeros(2, 4, 16, 8, dtype=BF16)
    k, v = torch.zeros(2, 2, kv_heads, 16, 8, dtype=BF16)
    operator = torch.ops.aten._scaled_dot_product_efficient_attention

    def record(*args, **kwargs):
        handed.extend(args[1:4])
        return operator(*args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", record)
    EfficientKernel().forward(q, k, v, TileTerms(1.0, visible=visible))
    return tuple(handed)


def bytes_of(x: torch.Tensor) -> int:
    return x.untyped_storage().nbytes()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_efficient_copies_keys_and_values_only_for_grouped_queries(kv_heads, monkeypatch):
    key, value, _ = handed_to_efficient(kv_heads, None, monkeypatch)
    heads = {1: 2 * 1, 2: 4, 4: 2 * 4}[kv_heads]  # Of MQA and MHA the storage that k and v share.
    assert bytes_of(key) == bytes_of(value) == 2 * heads * 16 * 8 * 2


@pytest.mark.parametrize("leading", [(), (1, 1), (2, 1), (1, 4), (2, 4)])
def test_efficient_holds_a_bias_of_the_masks_own_shape(leading, monkeypatch):
    _, _, bias = handed_to_efficient(4, torch.ones(*leading, 16, 16, dtype=torch.bool), monkeypatch)
    assert bias.shape == (2, 4, 16, 16)
    assert bytes_of(bias) == 2 * 16 * 16 * torch.Size(leading).numel()


# Rings.


def on_emulator(kernel) -> KernelRegistry:
    return KernelRegistry((OnEmulator(kernel, emulated_cuda, "cuda", HOPPER),))


RING, DOUBLE, HYBRID = CPTopology(inner=4), CPTopology(outer=2, inner=2), CPTopology(inner=2, ulysses=2)
RINGS = [
    *((kernel, topology, dict(dtype=BF16)) for kernel in FLASH_KERNELS for topology in (RING, HYBRID)),
    (CudaFlashKernel(), CPTopology(ulysses=2), dict(dtype=BF16)),
    (CudnnKernel(), RING, dict(dtype=BF16, tokens=256, value_head_size=8)),
    (CudnnKernel(), HYBRID, dict(dtype=BF16, tokens=256, mask="full", memory="SBND")),
    (EfficientKernel(), RING, dict(dtype=FP32)),
    (EfficientKernel(), DOUBLE, dict(dtype=BF16, value_head_size=32)),
    (EfficientKernel(), HYBRID, dict(dtype=FP32, mask="2d", memory="SBND")),
    (EfficientKernel(), RING, dict(dtype=BF16, mask="per batch", value_head_size=8)),
    (EfficientKernel(), DOUBLE, dict(dtype=FP32, mask="per head", value_head_size=8)),
]


@pytest.mark.parametrize(
    ("kernel", "topology", "options"),
    [
        pytest.param(kernel, topology, options, id=f"{kernel.name} {grid_name(topology)} {options.get('mask', '')}")
        for kernel, topology, options in RINGS
    ],
)
def test_ring_is_as_accurate_as_dense_attention(kernel, topology, options):
    sizes = dict(heads=4, kv_heads=2, batch=2, tokens=24, head_size=16, value_head_size=16, overlap=True)
    case = case_on(topology, **{**sizes, **options})
    *tensors, visible = inputs(case)
    visible = causal_mask(tensors[0].size(2)) if case.mask == "causal" else visible
    actual = restored(case, attend_virtually(case, on_emulator(kernel)))
    assert_as_accurate_as(dense_attention(*tensors, visible=visible), dense(case), actual)


# The emulator.

OPERATORS = ("flash", "cudnn", "efficient")


def operator(kind: str, suffix: str = ""):
    return getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention{suffix}")


@pytest.mark.parametrize("suffix", ["", "_backward"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_emulated_operator_has_the_arguments_of_torchs_own(kind, suffix):
    schema = operator(kind, suffix).default._schema
    emulated = inspect.signature(getattr(emulator, kind + suffix)).parameters.values()
    assert [(each.name, each.kind is each.KEYWORD_ONLY) for each in emulated] == [
        (argument.name, argument.kwarg_only) for argument in schema.arguments
    ]


def described(outputs) -> list:
    return [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in outputs]


@pytest.mark.skipif(
    emulator.TORCH < (2, 9), reason="older operators give a random state and statistics of other shapes"
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", OPERATORS)
def test_emulated_operator_gives_shapes_and_dtypes_of_torchs_own(kind, kv_heads):
    kv_heads, value_size = (4 if kind == "efficient" else kv_heads), (16 if kind == "flash" else 32)
    q, k = torch.zeros(2, 4, 40, 16, dtype=BF16), torch.zeros(2, kv_heads, 24, 16, dtype=BF16)
    v, dout = torch.zeros(2, kv_heads, 24, value_size, dtype=BF16), torch.zeros(2, 4, 40, value_size, dtype=BF16)
    options = () if kind == "flash" else (None, True)
    there = operator(kind)(*(x.to("meta") for x in (q, k, v)), *options, scale=1.0)
    here = operator(kind)(q, k, v, *options, scale=1.0)
    assert described(here) == described(there)

    out, lse = emulator.tokens_outside_heads(here[0]) if kind == "efficient" else here[0], here[1]
    state, packed = here[2:4] if kind == "efficient" else here[6:8], (None, None, 40, 24)
    arguments = {
        "flash": (out, lse, *packed, 0.0, False, *state),
        "cudnn": (out, lse, *state, None, *packed, 0.0, False),
        "efficient": (None, out, lse, *state, 0.0, [True, True, True, False]),
    }[kind]
    on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    there = operator(kind, "_backward")(*(x.to("meta") for x in (dout, q, k, v)), *on_meta, scale=1.0)
    here = operator(kind, "_backward")(dout, q, k, v, *arguments, scale=1.0)
    assert described(here) == described(there)


X = torch.zeros(2, 4, 40, 16, dtype=BF16)
BIAS = torch.zeros(2, 4, 40, 40, dtype=BF16)


@pytest.mark.parametrize(
    ("kind", "tensors", "options", "message"),
    [
        ("flash", (X.float(),) * 3, (), "takes no torch.float32"),
        ("flash", (X, X, X[..., :8]), (), "needs one head size"),
        ("flash", (X, X[:, :, :24], X[:, :, :24]), (0.0, True), "aligned to the bottom right"),
        ("flash", (X, X[:, :3], X[:, :3]), (), "must divide"),
        ("flash", (X[..., :12],) * 3, (), "head size is not aligned"),
        ("flash", (X.mT.contiguous().mT,) * 3, (), "contiguous last dimension"),
        ("cudnn", (X.float(),) * 3, (None, True), "takes no torch.float32"),
        ("cudnn", (X, X[:, :, :1], X[:, :, :1]), (None, True), "sequences of one token"),
        ("cudnn", (X.repeat(1, 1, 1, 9),) * 3, (None, True), "no more than 128"),
        ("efficient", (X, X[:, :2], X[:, :2]), (None, True), "as many key/value heads"),
        ("efficient", (X, X, X), (BIAS.float(), True), "should match query's dtype"),
        ("efficient", (X, X, X), (BIAS[:, :1], True), "wrong shape"),
        ("efficient", (X, X, X), (BIAS.mT, True), "attn_bias must have a contiguous last dimension"),
        ("efficient", (X, X[:, :, :39], X[:, :, :39]), (BIAS[..., :39].contiguous(), True), "attn_bias's strides"),
    ],
)
def test_emulated_operator_refuses_what_torchs_own_refuses_or_would_misread(kind, tensors, options, message):
    with pytest.raises(RuntimeError, match=message):
        operator(kind)(*tensors, *options, scale=1.0)


LSE = torch.zeros(2, 4, 40)
PADDED = torch.nn.functional.pad(LSE, (0, 24), value=torch.inf)
TOKENS_FIRST = X.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize(
    ("kernel", "changed", "message"),
    [
        ("flash", {"logsumexp": LSE.mT.contiguous().mT}, "as if it were contiguous"),
        ("flash", {"logsumexp": LSE.double()}, "another dtype or shape"),
        ("flash", {"cum_seq_q": torch.zeros(3)}, "packed sequences"),
        ("cudnn", {"logsumexp": LSE}, "not as the forward pass gives it"),
        ("cudnn", {"out": TOKENS_FIRST}, "made for other strides"),
        ("cudnn", {"grad_out": TOKENS_FIRST}, "made for other strides"),
        ("efficient", {"logsumexp": LSE}, "64 rows"),
        ("efficient", {"logsumexp": torch.nn.functional.pad(LSE, (0, 24))}, "rows past the last query"),
        ("efficient", {"out": X}, "taken to be N \\* V"),
    ],
)
def test_emulated_backward_refuses_what_torchs_own_refuses_or_would_misread(kernel, changed, message):
    state = torch.zeros((), dtype=torch.uint64 if kernel == "flash" else torch.long)
    lse = {"flash": LSE, "cudnn": LSE.unsqueeze(-1), "efficient": PADDED}[kernel]
    if kernel == "cudnn" and emulator.TORCH < (2, 9):
        pytest.skip("this torch's log-sum-exp has three dims")
    arguments = dict(grad_out=X, query=X, key=X, value=X, out=X, logsumexp=lse, scale=1.0, dropout_p=0.0)
    arguments |= dict(philox_seed=state, philox_offset=state, is_causal=False)
    if kernel == "efficient":
        arguments["grad_out_"] = arguments.pop("grad_out")
        arguments |= dict(out=TOKENS_FIRST, attn_bias=None, grad_input_mask=[True, True, True, False])
    else:
        arguments |= dict(cum_seq_q=None, cum_seq_k=None, max_q=40, max_k=40)
    if kernel == "cudnn":
        arguments["attn_bias"] = None
    backward = operator(kernel, "_backward")
    backward(**arguments)
    with pytest.raises(RuntimeError, match=message):
        backward(**{**arguments, **changed})
