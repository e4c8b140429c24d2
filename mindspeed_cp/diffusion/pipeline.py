"""A pipeline of diffusers on a mesh: its transformer, its guidance and the decoding of its latents.

The pipeline's own code runs on every rank, with its scheduler, callbacks and progress bar; every rank has the picture.
"""

from typing import Any

from torch import nn

from mindspeed_cp.diffusion.families import plan_for
from mindspeed_cp.diffusion.mesh import ParallelMesh
from mindspeed_cp.diffusion.tiles import share_tiles
from mindspeed_cp.diffusion.transformer import Guidance, ParallelTransformer, TransformerPlan, parallelize
from mindspeed_cp.kernels import KERNELS, KernelRegistry

_TRANSFORMERS = ("transformer", "transformer_2")
"""Where pipelines keep theirs; some have one for the early steps and one for the late ones."""


def parallelize_pipeline(
    pipeline: Any,
    mesh: ParallelMesh,
    *,
    plan: TransformerPlan | None = None,
    guidance: Guidance | None = None,
    kernels: KernelRegistry = KERNELS,
) -> list[ParallelTransformer]:
    """Have a pipeline of diffusers run on a mesh; it is then called as before, on every rank alike.

    pipeline: changed in place; its weights are the same on every rank before. plan: of its transformer, where that is
    neither one of `FAMILIES` nor declares itself what is split. guidance: how the pipeline computes branches, for the
    latter. kernels: of attention, to choose from.

    Where tiling is on (pipeline.vae.enable_tiling()) tiles are decoded by all ranks; else each rank decodes the whole.

    Raises ValueError for a pipeline without a transformer, and as `parallelize` does.
    """
    names = [name for name in _TRANSFORMERS if isinstance(getattr(pipeline, name, None), nn.Module)]
    if not names:
        raise ValueError(
            f"{type(pipeline).__name__} has no transformer, and a U-Net's convolutions need the tokens of other ranks; "
            f"use a pipeline with a transformer, or GuidanceParallel for its guidance alone."
        )
    if mesh.rank:
        pipeline.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}) | {"disable": True})
    models = [getattr(pipeline, name) for name in names]
    made = [parallelize(model, mesh, plan or plan_for(model, guidance), kernels=kernels) for model in models]
    vae = getattr(pipeline, "vae", None)
    if mesh.shape.size > 1 and hasattr(vae, "tiled_decode"):
        share_tiles(vae, mesh)
    return made
