"""Megatron's training loop on a CPU: what it asks of torch.cuda is answered by the processor.

Only applied when the user asks for it, with `--distributed-backend gloo` on a machine without an accelerator: to train
on a CPU by accident is worse than to stop. torch.cuda.is_available() stays False, so that torch itself is not misled.
"""

import os
import resource
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from mindspeed_cp.patching import Patch, PatchedCall

_WHY_DEVICE = "Megatron names the device 'cuda' in many places, and asks torch.cuda for streams, seeds and memory."
_WHEN_DEVICE = "Megatron's training loop takes the device from torch.accelerator."


class CpuStream(torch.cpu.Stream):
    """A stream of the CPU, which has one: everything on it has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":  # type: ignore[override]
        """An event that has happened."""
        return event or CpuEvent()


class CpuEvent(torch.cpu.Event):
    """An event of the CPU's only stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


class _CpuGenerators:
    """The generator of each device: there is one, whatever the index."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _ignore(*args: Any, **kwargs: Any) -> None:
    """What has no meaning on a CPU."""


def _stay_on_cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The tensor or module itself: it is where it is wanted."""
    return self


def _call_now(call: Callable[[], None], **kwargs: Any) -> None:
    """What torch.cuda puts off until a GPU is initialised, as setting a random state: here that would be for ever."""
    call()


def _resident_bytes(*args: Any, **kwargs: Any) -> int:
    """Memory of this process at present; a CPU has no allocator of its own to ask."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _peak_resident_bytes(*args: Any, **kwargs: Any) -> int:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_stats(*args: Any, **kwargs: Any) -> dict[str, int]:
    """What TensorBoard logging reads."""
    return {
        "reserved_bytes.all.current": _resident_bytes(),
        "allocated_bytes.all.current": _resident_bytes(),
        "allocated_bytes.all.peak": _peak_resident_bytes(),
        "allocation.all.current": 0,
    }


def _device_count() -> int:
    """One device for each rank on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _device_properties(device: Any = None) -> SimpleNamespace:
    """A device older than any GPU, so that whatever Megatron asks of older GPUs is asked here too."""
    return SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    )


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.random.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.random.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


_CUDA_ANSWERS: dict[str, Any] = {
    "torch.cuda:current_device": torch.cpu.current_device,
    "torch.cuda:device_count": _device_count,
    "torch.cuda:set_device": _ignore,
    "torch.cuda:synchronize": _ignore,
    "torch.cuda:empty_cache": _ignore,
    "torch.cuda:reset_peak_memory_stats": _ignore,
    "torch.cuda:get_device_properties": _device_properties,
    "torch.cuda:Stream": CpuStream,
    "torch.cuda:Event": CpuEvent,
    "torch.cuda:stream": torch.cpu.stream,
    "torch.cuda:set_stream": _ignore,
    "torch.cuda:current_stream": lambda device=None: CpuStream(),
    "torch.cuda:default_stream": lambda device=None: CpuStream(),
    "torch.cuda:is_current_stream_capturing": lambda: False,
    "torch.cuda:get_rng_state": _get_rng_state,
    "torch.cuda:set_rng_state": _set_rng_state,
    "torch.cuda:manual_seed": _manual_seed,
    "torch.cuda:default_generators": _CpuGenerators(),
    "torch.cuda.random:get_rng_state": _get_rng_state,
    "torch.cuda.random:set_rng_state": _set_rng_state,
    "megatron.core.tensor_parallel.random:_lazy_call": _call_now,
    "megatron.core.tensor_parallel.random:_lazy_init": _ignore,
    "torch.cuda:memory_allocated": _resident_bytes,
    "torch.cuda:memory_reserved": _resident_bytes,
    "torch.cuda:max_memory_allocated": _peak_resident_bytes,
    "torch.cuda:max_memory_reserved": _peak_resident_bytes,
    "torch.cuda:memory_stats": _memory_stats,
    "torch:Tensor.cuda": _stay_on_cpu,
    "torch.nn:Module.cuda": _stay_on_cpu,
}
"""What Megatron asks of CUDA, and who answers."""

_TAKE_A_DEVICE = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
    "Tensor.to",
)
"""What of torch takes a device and gives a tensor on it."""


def cpu_device_patches() -> tuple[Patch, ...]:
    """Patches that let Megatron train on a CPU."""
    answers = tuple(
        Patch(
            target=target,
            kind="replace",
            function=answer,
            package="torch" if target.startswith("torch") else "megatron.core",
            why=_WHY_DEVICE,
            remove_when=_WHEN_DEVICE,
        )
        for target, answer in _CUDA_ANSWERS.items()
    )
    take_a_device = tuple(
        Patch(
            target=f"torch:{name}",
            kind="wrap",
            function=_on_cpu,
            package="torch",
            why=_WHY_DEVICE,
            remove_when=_WHEN_DEVICE,
        )
        for name in _TAKE_A_DEVICE
    )
    return (*answers, *take_a_device, *_OTHERS)


def _on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` with the device 'cuda' taken for the CPU, and no pinned memory, which a CPU has no use for."""

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            if "pin_memory" in kwargs:
                kwargs["pin_memory"] = False
        if any(_is_cuda(arg) for arg in args):
            args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        return original(*args, **kwargs)

    return on_cpu


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _move_to_cpu(call: PatchedCall) -> Any:
    moved = call.proceed()
    return moved.numpy() if call["as_numpy"] and isinstance(moved, torch.Tensor) else moved


def _type_as_on_cuda(call: PatchedCall) -> Any:
    answer = call.proceed()
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer


_OTHERS = (
    Patch(
        target="torch:Tensor.type",
        kind="around",
        function=_type_as_on_cuda,
        package="torch",
        why="Megatron's optimizers compare the name of a parameter's type with that of a CUDA tensor.",
        remove_when="Megatron's optimizers compare dtypes.",
    ),
    Patch(
        target="megatron.training.initialize:_warmup_jit_function",
        kind="replace",
        function=_ignore,
        needs=("megatron.training",),
        why=(
            "It warms up compiled functions, of which a CPU has none, with random tensors whose size depends on "
            "the context-parallel size: weights drawn after them (a MoE router's) would not be those of CP = 1."
        ),
        remove_when="Megatron draws them from a generator of their own.",
    ),
    Patch(
        target="megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
        kind="around",
        function=_move_to_cpu,
        parameters=("tensor", "as_numpy"),
        aliases=("megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",),
        why="It leaves tensors on the CPU as they are, and torch takes no tensors for the sizes of an all-to-all.",
        remove_when="Megatron turns them into numbers wherever they are.",
    ),
    Patch(
        target="megatron.legacy.fused_kernels:load",
        kind="replace",
        function=_ignore,
        needs=("megatron.legacy",),
        versions="<0.17",
        why="It asks CUDA's compiler for its version, and builds nothing.",
        remove_when="Megatron 0.16 is no longer supported.",
    ),
)
"""What Megatron does with a device and not by asking for one."""
