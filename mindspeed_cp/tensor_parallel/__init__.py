"""Tensor parallelism in one, two, two and a half and three dimensions, and x*y, on plain tensors."""

from mindspeed_cp.tensor_parallel.block import MLP, SelfAttention, TransformerBlock
from mindspeed_cp.tensor_parallel.checkpoint import full_state_dict, load_full_state_dict
from mindspeed_cp.tensor_parallel.collectives import shard, unshard
from mindspeed_cp.tensor_parallel.costs import best, block_shapes, choices, comm_volume, memory, mlp_shapes
from mindspeed_cp.tensor_parallel.dropout import Dropout
from mindspeed_cp.tensor_parallel.grid import Grid
from mindspeed_cp.tensor_parallel.kinds import KINDS, Kind, KindName, LinearLayouts, choose_grid, grids
from mindspeed_cp.tensor_parallel.layout import Layout, Sharded
from mindspeed_cp.tensor_parallel.linear import Linear
from mindspeed_cp.tensor_parallel.mesh import TensorMesh, on_virtual_ranks, plan_mesh
from mindspeed_cp.tensor_parallel.norms import LayerNorm, RMSNorm
from mindspeed_cp.tensor_parallel.vocabulary import Embedding, TiedEmbedding, cross_entropy, shard_tokens

__all__ = [
    "KINDS",
    "MLP",
    "Dropout",
    "Embedding",
    "Grid",
    "Kind",
    "KindName",
    "LayerNorm",
    "Layout",
    "Linear",
    "LinearLayouts",
    "RMSNorm",
    "SelfAttention",
    "Sharded",
    "TensorMesh",
    "TiedEmbedding",
    "TransformerBlock",
    "best",
    "block_shapes",
    "choices",
    "choose_grid",
    "comm_volume",
    "cross_entropy",
    "full_state_dict",
    "grids",
    "load_full_state_dict",
    "memory",
    "mlp_shapes",
    "on_virtual_ranks",
    "plan_mesh",
    "shard",
    "shard_tokens",
    "unshard",
]
