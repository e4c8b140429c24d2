"""Collective operations are called by names that torch does not warn of."""

import warnings

import pytest
import torch
import torch.distributed as dist

from mindspeed_cp.comm import ProcessGroupCommunicator


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collective_operations_give_no_warning(group_of_one):
    communicator, send = ProcessGroupCommunicator(), torch.arange(3.0).view(1, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(communicator.all_gather(send), send.unsqueeze(0))
        assert torch.equal(communicator.all_to_all(send), send)
