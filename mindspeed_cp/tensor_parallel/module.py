"""A module whose parameters are parts of whole ones."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mindspeed_cp.tensor_parallel.collectives import shard_tensor
from mindspeed_cp.tensor_parallel.layout import Placement
from mindspeed_cp.tensor_parallel.mesh import TensorMesh


class Whole(NamedTuple):
    """The tensor that a parameter is a part of, and which axes shard its dims."""

    shape: torch.Size
    placement: Placement


class ShardedModule(nn.Module):
    """A module that knows of each of its own parameters which part of the whole one it is.

    wholes: by the parameter's name. Along the axes that shard no dim of it, a parameter has replicas: its gradients
    are summed in the backward pass where these have seen different rows, so that they stay equal by themselves.
    """

    def __init__(self, mesh: TensorMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.wholes: dict[str, Whole] = {}

    def keep_part(self, name: str, whole: Tensor | None, placement: Placement) -> None:
        """Make this rank's part of a whole parameter, which all ranks have alike, a parameter of this name."""
        if whole is None:
            self.register_parameter(name, None)
            return
        part = shard_tensor(whole.detach(), placement, self.mesh)
        self.register_parameter(name, nn.Parameter(part.clone(), requires_grad=whole.requires_grad))
        self.wholes[name] = Whole(whole.shape, placement)
