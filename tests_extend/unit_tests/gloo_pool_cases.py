"""What the ranks run for test_gloo_pool.py."""

import os
import subprocess
import time

import torch
import torch.distributed as dist


def place(group, text):
    return dist.get_rank(group), dist.get_world_size(group), text


def pid(group):
    return os.getpid()


def pass_on(group):
    rank = dist.get_rank(group)
    received, sent = torch.empty(1), torch.full((1,), float(rank))
    works = [
        dist.irecv(received, group=group, group_src=1 - rank),
        dist.isend(sent, group=group, group_dst=1 - rank),
    ]
    for work in works:
        work.wait()
    return received.item()


def fail(group, culprit):
    if dist.get_rank(group) == culprit:
        return 1 / 0
    dist.barrier(group)


def start_another(group):
    """The process that this rank starts, which would go on for minutes."""
    return subprocess.Popen(["sleep", "600"]).pid


def hang(group, culprit):
    if dist.get_rank(group) == culprit:
        time.sleep(600)


def die(group):
    os._exit(7)
