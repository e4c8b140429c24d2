"""Attention of latents in torch.compile(fullgraph=True), and under policies: one operator, as attention of keys is."""

import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mindspeed_cp.attention import AttentionTerms, ContextParallelAttention, Latent, LatentHeads, build_attention
from mindspeed_cp.attention.operators import num_kept
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.handles import with_handle
from mindspeed_cp.plan import AttentionPlan
from unit_tests.attention.test_compiled import assert_the_same, case_of, save_attention
from unit_tests.call_cases import ALGORITHMS
from unit_tests.compiled_cases import DOCUMENTS, Graphs, Layer, Step, on_virtual_ranks

L, R, U, V, N = 6, 2, 4, 5, 4
HEADS = LatentHeads(latent=L, unshared=U)


@with_handle
def expand(payload: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of one's own making: a function, and weights of more digits than the payload has."""
    return HEADS.expand(payload, up.to(payload.dtype))


@dataclass(frozen=True)
class LatentLayer(Layer):
    """Queries and a payload by a projection, attention, and something behind it. form: what travels."""

    form: str = "latent"

    def parameters(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Its weights."""
        generator = torch.Generator().manual_seed(2)
        sizes = {"weight": (16, N * (U + R) + L + R), "up": (N, U + V, L), "sinks": (N,)}
        made = {name: torch.rand(size, generator=generator, dtype=torch.float64) - 0.5 for name, size in sizes.items()}
        return {
            name: x.to(dtype if self.form != "wide" or name == "weight" else torch.float64) for name, x in made.items()
        }

    def __call__(
        self,
        attention: ContextParallelAttention,
        plan: AttentionPlan | None,
        x: Tensor,
        parameters: dict[str, Tensor],
        bias: Tensor | None = None,
        micro_batch: int = 0,
    ) -> tuple[Tensor, ...]:
        """What it makes of x [B, s, 16]."""
        q, payload = (x @ parameters["weight"]).split([N * (U + R), L + R], dim=-1)
        q, up = q.unflatten(-1, (N, -1)).transpose(1, 2), parameters["up"]
        terms = AttentionTerms(sinks=parameters["sinks"], bias=bias)
        if self.form == "absorbed":
            latent = Latent(payload, HEADS.absorbed)
            out = HEADS.values(attention.of_latent(HEADS.absorb(q, up), latent, scale=0.4, plan=plan, terms=terms), up)
        else:
            latent = Latent(payload, HEADS.expand if self.form == "latent" else expand, (up,))
            out = attention.of_latent(q, latent, scale=0.4, plan=plan, terms=terms)
        return (out.transpose(1, 2).flatten(2).cos(),)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("latent", ["ring"]),
        pytest.param("latent", ["ulysses", "hybrid", "double ring"], marks=pytest.mark.slow),
        pytest.param("absorbed", list(ALGORITHMS), marks=pytest.mark.slow),
        pytest.param("wide", ["hybrid"], marks=pytest.mark.slow),
    ],
)
def test_a_compiled_latent_is_the_eager_one_in_one_graph_for_every_plan(form, names):
    layer, graphs = LatentLayer(form=form), Graphs()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    counts = []
    for name in names:
        torch._dynamo.reset()  # Ranks that come at the same time may each compile it, and there is a limit to that.
        for documents in DOCUMENTS:
            assert_the_same(on_virtual_ranks(case_of(name), layer, compiled, Step(documents, biased=name == "hybrid")))
            counts.append(len(graphs.operators))
    assert counts[::2] == counts[1::2]  # Other documents compile nothing.
    assert all(operators == ["mindspeed_cp.attention"] for operators in graphs.operators)
    assert num_kept() == 0


@pytest.mark.slow
def test_gradients_of_weights_keep_the_digits_of_their_sum_in_a_graph():
    """Weights of fp64 under a payload of bfloat16, and gradients from two steps: nothing is rounded to that."""
    layer = LatentLayer(form="wide")
    compiled = torch.compile(layer, backend=Graphs(), fullgraph=True)
    results = on_virtual_ranks(case_of("ring"), layer, compiled, Step(DOCUMENTS[0], dtype=torch.bfloat16))
    assert_the_same(results, 0.0, 0.0)
    dup = results[0].compiled[3]
    assert dup.dtype == torch.float64 and not torch.equal(dup, dup.bfloat16().double())


def test_a_policy_keeps_the_attention_of_latents_too():
    attention, calls = build_attention(ContextParallelConfig()), []

    def expand(payload: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:  # Without a handle: nothing is compiled.
        calls.append(payload.size(1))
        return HEADS.expand(payload, up)

    def block(q: Tensor, payload: Tensor, up: Tensor) -> Tensor:
        return attention.of_latent(q.sin(), Latent(payload, expand, (up,))).cos()

    sizes = (1, N, 8, U + R), (1, 8, L + R), (N, U + V, L)
    given = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    plain = torch.autograd.grad(block(*given).sum(), given)
    without, calls[:] = calls[:], []
    contexts = functools.partial(create_selective_checkpoint_contexts, save_attention)
    out = checkpoint(block, *given, use_reentrant=False, context_fn=contexts)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), given), plain, rtol=1e-12, atol=1e-12)
    assert calls == without
    del out
    gc.collect()
    assert num_kept() == 0


def test_an_expand_without_a_handle_is_refused_in_a_graph_with_the_way_out():
    attention, q, payload = build_attention(ContextParallelConfig()), torch.zeros(1, 1, 4, 8), torch.zeros(1, 4, 8)

    def function(payload: Tensor) -> Tensor:
        return attention.of_latent(q, Latent(payload, lambda x: (x.unsqueeze(1),) * 2))

    with pytest.raises(Exception, match=r"a Latent whose expand has no handle; give the method of a LatentHeads, or"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(payload)


def test_heads_made_within_a_compiled_function_are_refused_with_the_way_out():
    attention = build_attention(ContextParallelConfig())

    def called(x: Tensor) -> Tensor:
        return attention.of_latent(x, Latent(x.sum(dim=1), LatentHeads(latent=L, unshared=U).absorbed), scale=0.5)

    x = torch.randn(1, 2, 5, L + R)
    with pytest.raises(Exception, match=r"a LatentHeads was made within a compiled function.*; make it outside"):
        torch.compile(called, backend="aot_eager", fullgraph=True)(x)
