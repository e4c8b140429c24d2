"""State of sharded modules: as whole tensors, and in torch's distributed checkpoint format, from mesh to mesh."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mindspeed_cp.tensor_parallel.collectives import gather_tensor, shard_tensor
from mindspeed_cp.tensor_parallel.layout import Placement
from mindspeed_cp.tensor_parallel.mesh import TensorMesh
from mindspeed_cp.tensor_parallel.module import ShardedModule


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a module's state, on all ranks, by the names that the unsharded module has."""
    return gather_parts(module, module.state_dict())


def gather_parts(module: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors from every rank's parts of them; parts: by the name of the parameter that they lie like."""
    places = _places(module)
    whole = {}
    with torch.no_grad():
        for name, part in parts.items():
            whole[name] = gather_tensor(part, *places[name]).clone() if name in places else part.clone()
    return whole


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state of whole tensors, which all ranks have. Raises as nn.Module.load_state_dict does."""
    places = _places(module)
    parts = {name: shard_tensor(x, *places[name]) if name in places else x for name, x in state.items()}
    module.load_state_dict(parts)


def _places(module: nn.Module) -> dict[str, tuple[Placement, TensorMesh]]:
    """How each parameter lies, and on which mesh, by its full name."""
    return {
        f"{prefix}.{name}".lstrip("."): (placement, part.mesh)
        for prefix, part in module.named_modules()
        if isinstance(part, ShardedModule)
        for name, placement in part.placements.items()
    }
