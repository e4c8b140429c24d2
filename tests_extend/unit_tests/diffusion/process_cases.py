"""What gloo ranks run for test_processes.py."""

import os
import signal

import torch
import torch.distributed as dist

from mindspeed_cp.comm import ProcessGroupCommunicator
from mindspeed_cp.diffusion import ParallelMesh
from unit_tests.diffusion.mesh_cases import denoised, model


def paint(group, sizes, joint, tokens):
    """What a rank has painted, and what it has sent along each axis."""
    mesh = ParallelMesh(**sizes, group=group)
    picture = denoised(mesh, model(joint=joint), joint=joint, tokens=tokens)
    return picture, {axis: traffic.bytes_sent.total() for axis, traffic in mesh.traffic.items()}


def paint_until_killed(group, sizes, victim):
    """The error of a rank whose peer is killed within a step; the victim gives none."""
    mesh = ParallelMesh(**sizes, group=group)
    exchange, calls = ProcessGroupCommunicator.exchange, []

    def killing(self, *args):
        calls.append(args)
        if dist.get_rank() == victim and len(calls) > 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return exchange(self, *args)

    ProcessGroupCommunicator.exchange = killing
    try:
        denoised(mesh, model(joint=True, dtype=torch.float32), joint=True, tokens=35)
    finally:
        ProcessGroupCommunicator.exchange = exchange
