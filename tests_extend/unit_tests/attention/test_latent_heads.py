"""Attention of latents where Ulysses deals heads unevenly, or gives a member a K/V head more than once."""

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention import ContextParallelAttention, Latent, LatentHeads
from mindspeed_cp.topology import CPTopology
from unit_tests.call_cases import run_virtually
from unit_tests.ring_cases import case_on, grid_name

L, R, U, V, TOKENS = 4, 2, 3, 5, 4
HEADS = LatentHeads(latent=L, unshared=U)


@pytest.mark.parametrize(
    ("topology", "num_heads", "num_kv_heads"),
    [
        (CPTopology(ulysses=2), 12, 3),
        (CPTopology(ulysses=4), 6, 2),
        (CPTopology(ulysses=4), 7, 1),
        (CPTopology(inner=2, ulysses=2), 12, 3),
    ],
    ids=lambda value: grid_name(value) if isinstance(value, CPTopology) else str(value),
)
def test_a_latent_of_repeated_heads_gives_what_its_keys_and_values_give(topology, num_heads, num_kv_heads):
    def on_rank(attention: ContextParallelAttention, rank: int) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(rank)
        sizes = (1, num_heads, TOKENS, U + R), (1, TOKENS, L + R)
        q, payload = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
        up = torch.linspace(-1.0, 1.0, num_kv_heads * (U + V) * L, dtype=torch.float64).view(num_kv_heads, U + V, L)
        given = [x.requires_grad_() for x in (q, payload, up)]
        results = []
        for out in (
            attention(q, *HEADS.expand(payload, up)),
            attention.of_latent(q, Latent(payload, HEADS.expand, (up,))),
        ):
            results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), given)])
        return results[0], results[1]

    expanded, latent = zip(*run_virtually(case_on(topology), on_rank), strict=True)
    # Outputs and gradients of each rank's own; of a weight the ranks have parts, whose sum is the same.
    for one, other in zip(latent, expanded, strict=True):
        torch.testing.assert_close(one[:3], other[:3], rtol=1e-12, atol=1e-12)
    sums = [sum(each[3] for each in ranks) for ranks in (latent, expanded)]
    torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-12)
