"""Parallel diffusion inference: guidance, Ulysses, ring and tensor parallelism on one mesh."""

from mindspeed_cp.diffusion.attention import QKV, DimOrder, MeshAttention
from mindspeed_cp.diffusion.guidance import GuidanceParallel, guide
from mindspeed_cp.diffusion.intercept import parallel_attention
from mindspeed_cp.diffusion.linear import ColumnLinear, RowLinear
from mindspeed_cp.diffusion.mesh import AXES, Axis, MeshShape, ParallelMesh, on_virtual_ranks
from mindspeed_cp.diffusion.tokens import Shares, gather, split
from mindspeed_cp.diffusion.transformer import Gather, ParallelTransformer, Split, TransformerPlan, parallelize

__all__ = [
    "AXES",
    "QKV",
    "Axis",
    "ColumnLinear",
    "DimOrder",
    "Gather",
    "GuidanceParallel",
    "MeshAttention",
    "MeshShape",
    "ParallelMesh",
    "ParallelTransformer",
    "RowLinear",
    "Shares",
    "Split",
    "TransformerPlan",
    "gather",
    "guide",
    "on_virtual_ranks",
    "parallel_attention",
    "parallelize",
    "split",
]
