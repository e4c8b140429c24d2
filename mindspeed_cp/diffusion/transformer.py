"""A diffusion transformer on a mesh: where its tokens are split and gathered, and which of its layers are split.

The transformer's code stays as it is, and so does its caller's: every rank gives whole inputs and gets the whole
output.

    inputs, whole    embed    | split     blocks      gather |    output, whole
    on every rank             | each rank its tokens         |    on every rank

Within the blocks attention runs over the mesh (intercept.py), and linear layers have a part of their weights
(linear.py).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mindspeed_cp.diffusion.guidance import GuidanceParallel, refuse_one_branch
from mindspeed_cp.diffusion.intercept import AttentionCalls, digest_of_all
from mindspeed_cp.diffusion.linear import ColumnLinear, ColumnRMSNorm, RowLinear
from mindspeed_cp.diffusion.mesh import AXES, Axis, ParallelMesh
from mindspeed_cp.diffusion.pending import PendingBranches
from mindspeed_cp.diffusion.tokens import Shares, gather, split
from mindspeed_cp.kernels import KERNELS, KernelRegistry

Guidance = Literal["batch", "calls"]
"""How a caller computes the branches of a step: stacked along the batch of one call, or in calls one after another."""


class Split(NamedTuple):
    """Where whole tokens become this rank's share.

    module: its path, in which * is anything; "" is the transformer. tensor: the name of an argument of its forward, or
    the place of an output where it is a number. dim: of the tokens; an argument with fewer dims has none, and stays as
    it is.
    """

    module: str
    tensor: str | int
    dim: int = 1


class Gather(NamedTuple):
    """Where shares become whole again: the output of a module. tokens: the tensor of the Split that began it."""

    module: str
    tokens: str = "hidden_states"
    dim: int = 1


@dataclass(frozen=True, kw_only=True)
class TransformerPlan:
    """What is split where. Names of layers are patterns, in which * is anything (fnmatch).

    splits, gathers: of tokens. Without any the transformer runs on all tokens.
    columns: linear layers that are split by columns, and of how many blocks of equal width their outputs consist (3 for
    q, k and v in one). rows: those that are split by rows, and the layers beside them whose outputs they take, by their
    paths from the parent, where these are several. norms: RMS norms over all heads. heads: the attribute in which the
    parent of a column-split layer keeps its number of heads.
    guidance: how the transformer's caller computes branches; None where it shares them itself (GuidanceParallel). With
    "batch" every argument whose first dim is as long as the batch is dealt out by rows.
    optional: whether patterns may match nothing, as in a plan for several versions of a model.
    """

    splits: tuple[Split, ...] = ()
    gathers: tuple[Gather, ...] = ()
    columns: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    heads: str = "heads"
    guidance: Guidance | None = None
    optional: bool = False


class ParallelTransformer:
    """A transformer that runs on a mesh; `parallelize` makes it.

    model: with its layers split and its forward replaced. mesh, plan: as they were given.
    """

    def __init__(
        self, model: nn.Module, mesh: ParallelMesh, plan: TransformerPlan, kernels: KernelRegistry = KERNELS
    ) -> None:
        self.model, self.mesh, self.plan = model, mesh, plan
        self._name = type(model).__name__
        self._calls = AttentionCalls(mesh, kernels)
        self._branches = GuidanceParallel(mesh)
        self._pending = PendingBranches(self._branches)
        self._totals: dict[str, int] = {}
        self._handles: list[Any] = []
        self._forward: Callable[..., Any] = model.forward
        self._signature = inspect.signature(model.forward)
        self._splits = self._check()
        if mesh.shape.tp > 1:
            _split_layers(model, plan, mesh)
        if mesh.shape.sequence > 1:
            self._handles = list(self._hooks())
        model.forward = self._replaced

    def remove(self) -> None:
        """Give the transformer its own forward back. Raises ValueError where weights have been split."""
        if self.mesh.shape.tp > 1:
            raise ValueError(f"tp={self.mesh.shape.tp}: this rank has a part of the weights; load the model anew.")
        for handle in self._handles:
            handle.remove()
        del self.model.forward

    def _replaced(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward: whole inputs to whole output, on every rank."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        tensors = [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
        if torch.is_grad_enabled() and any(each.requires_grad for each in (*tensors, *self.model.parameters())):
            raise ValueError(f"{self._name} on a mesh computes no gradients; call it within torch.no_grad().")
        self._compare(arguments, tensors[0].device)
        if self.mesh.shape.cfg == 1 or self.plan.guidance is None:
            return self._run(arguments)
        like = tensors[0]
        if self.plan.guidance == "calls":
            return self._wrapped(self._pending.ask(lambda: self._sample(arguments), like), arguments)
        rows = like.size(0)
        refuse_one_branch(rows, self.mesh.shape.cfg)
        mine = range(self.mesh.index("cfg"), rows, self.mesh.shape.cfg)
        outputs: dict[int, Tensor] = {}
        if mine:
            own = tree_map(lambda x: x[mine.start :: mine.step] if _has_rows(x, rows) else x, arguments)
            outputs = dict(zip(mine, self._sample(own).unbind(), strict=True))
        return self._wrapped(torch.stack(self._branches.share(outputs, rows, like)), arguments)

    def _run(self, arguments: dict[str, Any]) -> Any:
        """The transformer's own forward, its tokens shared."""
        shapes = tuple(tuple(each.shape) for each in tree_leaves(arguments) if isinstance(each, Tensor))
        self._totals = {}
        arguments = self._split_arguments("", dict(arguments))
        with self._calls.of_pass(self._name, shapes):
            # By position what has no name: a forward may take *args and **kwargs.
            bound = self._signature.bind_partial()
            bound.arguments.update(arguments)
            return self._forward(*bound.args, **bound.kwargs)

    def _sample(self, arguments: dict[str, Any]) -> Tensor:
        """The prediction itself."""
        output = self._run(arguments)
        if isinstance(output, Tensor):
            return output
        sample: Tensor = output[0] if isinstance(output, tuple) else output.sample
        return sample

    def _wrapped(self, sample: Tensor, arguments: Mapping[str, Any]) -> Any:
        """The prediction as the transformer returns it."""
        if "return_dict" not in arguments:
            return sample
        if not arguments["return_dict"]:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def _compare(self, arguments: Mapping[str, Any], device: torch.device) -> None:
        """Raise ValueError, on every rank, where ranks have come with other inputs than the rest."""
        axes: tuple[Axis, ...] = AXES if self.plan.guidance else ("ring", "ulysses", "tp")
        if not any(axis in self.mesh.communicators for axis in axes):
            return
        digests = [digest_of_all(value) for value in arguments.values()]
        rows = self.mesh.all_gather(torch.tensor([self.mesh.rank, *digests], device=device), axes).tolist()
        for place, (name, value) in enumerate(arguments.items(), start=1):
            ranks: dict[int, list[int]] = {}
            for row in rows:
                ranks.setdefault(row[place], []).append(row[0])
            if len(ranks) > 1:
                groups = " and ".join(f"ranks {sorted(each)}" for each in ranks.values())
                mine = f"{tuple(value.shape)} {value.dtype} here" if isinstance(value, Tensor) else f"{value!r} here"
                raise ValueError(
                    f"{name} of {self._name} differs between {groups} ({mine}): all ranks denoise one picture; give "
                    f"them the same prompts, and a generator of the same seed."
                )

    def _hooks(self) -> Iterator[Any]:
        """Those that split and gather tokens on the way."""
        for path in dict.fromkeys(each.module for each in self._splits if each.module):
            module = self.model.get_submodule(path)
            yield module.register_forward_pre_hook(
                self._splitting(path, inspect.signature(module.forward)), with_kwargs=True
            )
        for place in self._splits:
            if not isinstance(place.tensor, str):
                yield self.model.get_submodule(place.module).register_forward_hook(self._splitting_output(place))
        for end in self.plan.gathers:
            yield self.model.get_submodule(end.module).register_forward_hook(self._gathering(end))

    def _splitting(self, path: str, signature: inspect.Signature) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.arguments.update(self._split_arguments(path, bound.arguments))
            return bound.args, bound.kwargs

        return hook

    def _splitting_output(self, place: Split) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            assert isinstance(place.tensor, int)
            if isinstance(output, Tensor):
                return split(output, self.mesh, place.dim)
            parts = list(output)
            parts[place.tensor] = split(parts[place.tensor], self.mesh, place.dim)
            return tuple(parts)

        return hook

    def _gathering(self, end: Gather) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            shares = Shares.of(self._totals[end.tokens], self.mesh.shape.sequence)
            return gather(output, shares, self.mesh, end.dim)

        return hook

    def _split_arguments(self, path: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a module, those that its splits name being this rank's share."""
        if self.mesh.shape.sequence == 1:
            return arguments
        for module, tensor, dim in self._splits:
            if module != path or not isinstance(tensor, str):
                continue
            whole = arguments.get(tensor)
            if isinstance(whole, Tensor) and whole.dim() > dim:
                self._totals[tensor] = whole.size(dim)
                arguments[tensor] = split(whole, self.mesh, dim)
        return arguments

    def _check(self) -> list[Split]:
        """The splits, each of one module. Raises ValueError where the plan speaks of what the transformer has not."""
        modules = dict(self.model.named_modules())
        for path in (*(each.module for each in self.plan.splits), *(each.module for each in self.plan.gathers)):
            if not any(fnmatchcase(name, path) for name in modules):
                names = ", ".join(name for name, _ in self.model.named_children())
                raise ValueError(f"{self._name} has no module {path!r}; the plan names one of {names}, or below them.")
        splits = [
            place._replace(module=name)
            for place in self.plan.splits
            for name in modules
            if fnmatchcase(name, place.module) and name.count(".") == place.module.count(".")
        ]
        for place in splits:
            parameters = inspect.signature(modules[place.module].forward).parameters
            if isinstance(place.tensor, str) and place.tensor not in parameters:
                raise ValueError(
                    f"the forward of {place.module or self._name!r} takes {', '.join(parameters)} and no "
                    f"{place.tensor!r}; split one of those."
                )
        begun = {each.tensor for each in self.plan.splits}
        for end in self.plan.gathers:
            if end.tokens not in begun:
                raise ValueError(f"{end} gathers what no split begins; name one of {', '.join(map(str, begun))}.")
        if self.mesh.shape.sequence > 1 and not self.plan.splits:
            raise ValueError(
                f"{self.mesh.shape}: the plan of {self._name} splits no tokens; give it splits and gathers, or use "
                f"ring=1, ulysses=1."
            )
        if self.mesh.shape.tp > 1 and not self.plan.columns:
            raise ValueError(
                f"tp={self.mesh.shape.tp}: the plan of {self._name} splits no layers; give columns and rows."
            )
        if self.mesh.shape.cfg > 1 and self.plan.guidance is None and "return_dict" in self._signature.parameters:
            raise ValueError(
                f"cfg={self.mesh.shape.cfg}: the plan of {self._name} does not say how its caller computes branches; "
                f"give guidance='batch' or 'calls'."
            )
        return splits


def parallelize(
    model: nn.Module, mesh: ParallelMesh, plan: TransformerPlan, *, kernels: KernelRegistry = KERNELS
) -> ParallelTransformer:
    """Have a transformer run on a mesh: each rank gives its forward whole inputs, and gets the whole output.

    model: changed in place, the same weights on every rank before. kernels: of attention, to choose from.

    Raises ValueError for a plan that does not fit the model, and for sizes that do not fit its layers or heads.
    """
    return ParallelTransformer(model, mesh, plan, kernels)


def _has_rows(x: Any, rows: int) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and x.size(0) == rows


def _split_layers(model: nn.Module, plan: TransformerPlan, mesh: ParallelMesh) -> None:
    """Put layers with a part of the weights in the place of those that the plan names."""
    along = mesh.communicators["tp"]
    widths = {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parents: dict[str, nn.Module] = {}
    for name, blocks in _matches(model, plan, plan.columns):
        _replace(model, name, ColumnLinear(_linear(model, name), along, blocks=blocks))
        parent = name.rpartition(".")[0]
        parents[parent] = model.get_submodule(parent)
    for name, beside in _matches(model, plan, plan.rows):
        parent = name.rpartition(".")[0]
        blocks = [widths[f"{parent}.{each}" if parent else each] for each in beside] or None
        _replace(model, name, RowLinear(_linear(model, name), along, widths=blocks))
    for name, _ in _matches(model, plan, dict.fromkeys(plan.norms, ())):
        norm = model.get_submodule(name)
        if isinstance(norm, nn.RMSNorm):
            _replace(model, name, ColumnRMSNorm(norm, along))
        elif not isinstance(norm, nn.Identity):
            raise ValueError(
                f"{name} is a {type(norm).__name__}: over all heads torch.nn.RMSNorm alone can be split; use tp=1."
            )
    for path, parent_module in parents.items():
        heads = getattr(parent_module, plan.heads, None)
        if isinstance(heads, int):
            if heads % along.size:
                raise ValueError(
                    f"tp={along.size} does not divide the {heads} heads of {path}; use a divisor of {heads}."
                )
            setattr(parent_module, plan.heads, heads // along.size)


def _matches(model: nn.Module, plan: TransformerPlan, patterns: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The modules that patterns name, each with what is said of it."""
    found = []
    names = [name for name, _ in model.named_modules()]
    for pattern, said in patterns.items():
        fitting = [(name, said) for name in names if fnmatchcase(name, pattern)]
        if not fitting and not plan.optional:
            raise ValueError(
                f"no layer of {type(model).__name__} is named {pattern!r}; name some that it has, or leave it out."
            )
        found += fitting
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is a {type(layer).__name__}, and torch.nn.Linear alone is split; name another layer.")
    return layer


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
