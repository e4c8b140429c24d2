"""What the ranks run for attention/test_compiled.py: a layer that calls attention, as it is and compiled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.attention import AttentionTerms, ContextParallelAttention, Dropout, build_attention
from mindspeed_cp.batch import LayoutName, PackedBatch
from mindspeed_cp.comm import ContextParallelGroups
from mindspeed_cp.plan import AttentionPlan
from unit_tests.call_cases import run_virtually
from unit_tests.ulysses_cases import Case

LENGTH, BATCH, HEAD_SIZE = 24, 2, 8
DOCUMENTS = [0, 5, LENGTH], [0, 9, 17, LENGTH]


@dataclass(frozen=True)
class Layer:
    """A projection, attention, and something behind it. told: names of its terms, see `terms`."""

    heads: int = 4
    kv_heads: int = 2
    told: tuple[str, ...] = ()
    wanted: str = "__call__"
    scale: float | None = None

    def parameters(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Its weight, and what its terms learn; the same in every process."""
        generator = torch.Generator().manual_seed(2)
        width = (self.heads + 2 * self.kv_heads) * HEAD_SIZE
        sizes = {"weight": (16, width), "sinks": (self.heads,), "slopes": (self.heads,)}
        made = {name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
        made["weight"] -= 0.5
        return {name: x.to(dtype) for name, x in made.items() if name == "weight" or name in self.told}

    def __call__(
        self,
        attention: ContextParallelAttention,
        plan: AttentionPlan | None,
        x: Tensor,
        parameters: dict[str, Tensor],
        bias: Tensor | None = None,
        micro_batch: int = 0,
    ) -> tuple[Tensor, ...]:
        """What it makes of x [B, s, 16]: three heads of a projection that lie in one tensor, as in most models."""
        qkv = (x @ parameters["weight"]).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        terms = AttentionTerms(
            sinks=parameters.get("sinks", 0.0 if "off by one" in self.told else None),
            alibi_slopes=parameters.get("slopes"),
            softcap=2.0 if "softcap" in self.told else None,
            dropout=Dropout(rate=0.3, seed=1, micro_batch=micro_batch) if "dropout" in self.told else None,
            bias=bias,
        )
        found = getattr(attention, self.wanted)(q.sin(), k, v, scale=self.scale, plan=plan, terms=terms)
        out, *more = (found,) if self.wanted == "__call__" else found
        return out.transpose(1, 2).flatten(2).cos(), *more


class Graphs:
    """A backend of torch.compile that counts the graphs, and what ours they hold."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.backend = torch._dynamo.lookup_backend(backend)
        self.operators: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        targets = (str(node.target) for node in graph.graph.nodes)
        self.operators.append([name for name in targets if name.startswith("mindspeed_cp")])
        return self.backend(graph, example)


class Results(NamedTuple):
    """Of one call: what came of it, and the gradients of its inputs; as it is, and compiled."""

    plain: list[Tensor]
    compiled: list[Tensor]


def both(
    layer: Layer,
    compiled: Callable[..., tuple[Tensor, ...]],
    attention: ContextParallelAttention,
    plan: AttentionPlan | None,
    x: Tensor,
    bias: Tensor | None = None,
    micro_batch: int = 0,
) -> Results:
    """The layer's results for this rank's x."""
    results = []
    for function in (layer, compiled):
        wanted = {"x": x, **layer.parameters(x.dtype), "bias": bias}
        wanted = {name: y.detach().clone().requires_grad_() for name, y in wanted.items() if y is not None}
        x_, bias_ = wanted["x"], wanted.get("bias")
        found = function(attention, plan, x_, {**wanted}, bias_, micro_batch)
        loss = sum(y.masked_fill(y.isinf(), 0.0).sum() for y in found if y.requires_grad)
        assert isinstance(loss, Tensor)
        gradients = torch.autograd.grad(loss, list(wanted.values()))
        results.append([y.detach() for y in (*found, *gradients)])
    return Results(*results)


@dataclass
class Step:
    """One batch: its documents, how they are dealt, and what a query sees; None is no plan."""

    documents: Sequence[int] | None = None
    layout: LayoutName = "zigzag"
    window: tuple[int, int] | None = None
    micro_batch: int = 0
    biased: bool = False
    dtype: torch.dtype = torch.float64
    length: int = field(default=LENGTH)

    def on(self, rank: int, size: int, layer: Layer) -> tuple[AttentionPlan | None, Tensor, Tensor | None]:
        """The plan, and this rank's x and rows of a bias."""
        documents = [0, self.length] if self.documents is None else self.documents
        batch = PackedBatch.from_cu_seqlens(documents, size, layout=self.layout, window_size=self.window)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(BATCH, self.length, 16, generator=generator, dtype=torch.float64).to(self.dtype)
        bias = torch.randn(1, layer.heads, self.length, self.length, generator=generator, dtype=torch.float64)
        rows = batch.shard(bias, rank, dim=2).to(self.dtype) if self.biased else None
        return None if self.documents is None else batch.plan, batch.shard(x, rank), rows


def on_virtual_ranks(case: Case, layer: Layer, compiled: Callable[..., Any], step: Step) -> list[Results]:
    """What each rank gets of a step."""

    def on_rank(attention: ContextParallelAttention, rank: int) -> Results:
        plan, x, bias = step.on(rank, case.size, layer)
        return both(layer, compiled, attention, plan, x, bias, step.micro_batch)

    return run_virtually(case, on_rank)


def over_gloo(
    group: dist.ProcessGroup | None, case: Case, layer: Layer, backend: str
) -> tuple[list[Results], int] | None:
    """What this rank gets of steps with other documents, and the number of graphs that were compiled for them."""
    if group is None:
        ContextParallelGroups.take_part(case.topology, overlap=False)
        return None
    torch._dynamo.reset()
    graphs = Graphs(backend)
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    groups = ContextParallelGroups.build(case.topology, group, overlap=False)
    attention, rank = build_attention(case.config, groups), dist.get_rank(group)
    results = []
    for documents in DOCUMENTS:
        plan, x, _ = Step(documents).on(rank, case.size, layer)
        results.append(both(layer, compiled, attention, plan, x))
    dist.barrier(group)  # Nobody closes a connection over which another one still receives.
    groups.destroy()
    return results, len(graphs.operators)
