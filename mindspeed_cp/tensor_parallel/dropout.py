"""Dropout of activations of which each rank holds a part."""

import torch
from torch import nn

from mindspeed_cp.tensor_parallel.layout import Sharded
from mindspeed_cp.tensor_parallel.mesh import TensorMesh


class Dropout(nn.Module):
    """nn.Dropout whose shards draw independently, and whose replicas draw alike.

    At each call one number is drawn from a generator that is in the same state on all ranks, and each shard's own one
    is seeded by it and by the shard's place. So there is one state to save, the same on every mesh, and activation
    recomputation, which restores it, drops the same numbers again.
    """

    def __init__(self, p: float, mesh: TensorMesh, *, generator: torch.Generator | None = None) -> None:
        """p: the part that is dropped. generator: of the CPU; torch's own by default, which all ranks seed alike.

        Raises ValueError for a p that is not from 0 to 1.
        """
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout drops a part p={p}; use one from 0 to 1.")
        self.p, self.mesh, self.generator = p, mesh, generator

    def forward(self, x: Sharded) -> Sharded:
        """Numbers are zeroed with probability p and else divided by 1 - p; nothing happens outside training."""
        if not self.training or self.p == 0.0:
            return x
        drawn = int(torch.randint(2**62, (), generator=self.generator))
        place = self.mesh.index(x.layout.rows + x.layout.features)
        own = torch.Generator(x.local.device).manual_seed((drawn + place * _STRIDE) % 2**63)
        kept = torch.empty_like(x.local, dtype=torch.float32).bernoulli_(1.0 - self.p, generator=own)
        factor = 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0
        return x.map(lambda local: local * (kept * factor).to(local.dtype))


_STRIDE = 0x9E3779B97F4A7C15 % 2**62
"""Between the seeds of neighbouring shards: far apart, and never the same for two places."""
