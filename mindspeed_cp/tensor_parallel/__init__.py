"""Tensor parallelism in one, two, two and a half and three dimensions, and x*y, on plain tensors."""

from mindspeed_cp.tensor_parallel.checkpoint import full_state_dict, load_full_state_dict
from mindspeed_cp.tensor_parallel.collectives import shard, unshard
from mindspeed_cp.tensor_parallel.grid import Grid
from mindspeed_cp.tensor_parallel.kinds import KINDS, Kind, KindName, LinearLayouts, choose_grid, grids
from mindspeed_cp.tensor_parallel.layout import Layout, Sharded
from mindspeed_cp.tensor_parallel.linear import Linear
from mindspeed_cp.tensor_parallel.mesh import TensorMesh, on_virtual_ranks, plan_mesh

__all__ = [
    "KINDS",
    "Grid",
    "Kind",
    "KindName",
    "Layout",
    "Linear",
    "LinearLayouts",
    "Sharded",
    "TensorMesh",
    "choose_grid",
    "full_state_dict",
    "grids",
    "load_full_state_dict",
    "on_virtual_ranks",
    "plan_mesh",
    "shard",
    "unshard",
]
