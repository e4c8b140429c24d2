"""What the examples share: processes on this machine's devices, and a verdict in the end."""

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from mindspeed_cp.device import accelerator

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


def start() -> torch.device:
    """Join the other processes that torchrun has started; the device of this one."""
    kind = accelerator() or "cpu"
    if kind == "npu":
        import torch_npu  # noqa: F401
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, local_rank)
    if kind != "cpu":
        getattr(torch, kind).set_device(device)
    dist.init_process_group(BACKENDS[kind])
    return device


def run_as_script(example: Callable[[torch.device], dict[str, float]], tolerance: float = 1e-5) -> int:
    """Run an example among torchrun's processes; 1 where a result differs from one rank's by more than `tolerance`.

    example: gives the largest difference of each result, by its name.
    """
    if "WORLD_SIZE" not in os.environ:
        print(f"start it as: torchrun --nproc-per-node 4 {sys.argv[0]}", file=sys.stderr)
        return 2
    differences = example(start())
    if dist.get_rank() == 0:
        for name, difference in differences.items():
            print(f"{name}: largest difference from one rank {difference:.1e}")
    dist.destroy_process_group()
    return int(max(differences.values()) > tolerance)
