"""State of sharded modules: as whole tensors, and in torch's distributed checkpoint format, from mesh to mesh."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mindspeed_cp.tensor_parallel.collectives import gather_tensor, shard_tensor
from mindspeed_cp.tensor_parallel.mesh import TensorMesh
from mindspeed_cp.tensor_parallel.module import ShardedModule, Whole


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a module's state, on all ranks, by the names that the unsharded module has."""
    return gather_parts(module, module.state_dict())


def gather_parts(module: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors from every rank's parts of them. parts: by the name of the parameter that they lie like."""
    places, whole = _places(module), {}
    with torch.no_grad():
        for name, part in parts.items():
            place = places.get(name)
            whole[name] = (
                part.clone() if place is None else gather_tensor(part, place.whole.placement, place.mesh).clone()
            )
    return whole


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state of whole tensors, which all ranks have.

    Raises RuntimeError for names or shapes that are not the module's, as nn.Module.load_state_dict does.
    """
    parts = dict(state)
    for name, place in _places(module).items():
        if name in parts and parts[name].shape == place.whole.shape:
            parts[name] = shard_tensor(parts[name], place.whole.placement, place.mesh)
        elif name in parts:
            raise RuntimeError(
                f"{name} is {tuple(parts[name].shape)} in the state, and {tuple(place.whole.shape)} here; load the "
                f"whole state of a model of these sizes, see full_state_dict."
            )
    module.load_state_dict(parts)


def save_checkpoint(path: str | Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Save the state of a module, and that of its optimizer, in torch's distributed checkpoint format.

    Each number is written once, by one of the ranks that have it. Of the optimizer, what belongs to parameters is
    saved; learning rates and other settings are the program's. Called by all ranks of the mesh, which are processes.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    save(_checkpoint(module, optimizer), checkpoint_id=path, process_group=_mesh_of(module).group)


def load_checkpoint(path: str | Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load what `save_checkpoint` has saved, on whatever mesh that was, in place. Called by all ranks of the mesh."""
    from torch.distributed.checkpoint.state_dict_loader import load

    if optimizer is not None:
        _make_state(optimizer)
    load(_checkpoint(module, optimizer), checkpoint_id=path, process_group=_mesh_of(module).group)


class _Place(NamedTuple):
    whole: Whole
    mesh: TensorMesh


def _places(module: nn.Module) -> dict[str, _Place]:
    """Which part of what each parameter is, by its full name."""
    return {
        f"{prefix}.{name}".lstrip("."): _Place(whole, part.mesh)
        for prefix, part in module.named_modules()
        if isinstance(part, ShardedModule)
        for name, whole in part.wholes.items()
    }


def _mesh_of(module: nn.Module) -> TensorMesh:
    for part in module.modules():
        if isinstance(part, ShardedModule):
            return part.mesh
    raise ValueError("no part of this module is sharded; save it by torch.distributed.checkpoint itself.")


def _checkpoint(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Everything that is saved, by name: parts as DTensors over their memory, so that loading fills it."""
    places = _places(module)
    state = {
        f"model.{name}": _as_dtensor(tensor, places[name]) if name in places else tensor
        for name, tensor in module.state_dict().items()
    }
    if optimizer is not None:
        for name, parameter in module.named_parameters():
            for key, tensor in optimizer.state.get(parameter, {}).items():
                like_parameter = tensor.shape == parameter.shape and name in places
                state[f"optimizer.{name}.{key}"] = _as_dtensor(tensor, places[name]) if like_parameter else tensor
    return state


def _as_dtensor(part: Tensor, place: _Place) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    (shape, placement), mesh = place
    if mesh.device_mesh is None:
        raise ValueError("virtual ranks have no distributed checkpoint; save full_state_dict instead.")
    for axes in placement:
        assert list(axes) == sorted(axes, key=mesh.grid.axes.index), f"DTensor cuts by {mesh.grid.axes}, not {axes}"
    dim_of = {axis: dim for dim, axes in enumerate(placement) for axis in axes}
    placements = [Shard(dim_of[axis]) if axis in dim_of else Replicate() for axis in mesh.grid.axes]
    stride = torch.empty(shape, device="meta").stride()
    whole: Tensor = DTensor.from_local(part.detach(), mesh.device_mesh, placements, shape=shape, stride=stride)
    return whole


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state of an optimizer that has taken no step yet, by one that changes nothing."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
