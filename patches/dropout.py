"""Attention dropout of Megatron's layers, the same on any number of context-parallel ranks.

Note [Draws]
~~~~~~~~~~~~
A layer draws for each micro-batch anew, and for its recomputation again what it has drawn. How often it has drawn is
kept where Megatron keeps the states of its random generators (`get_cuda_rng_tracker`): activation checkpointing takes
these states with it and puts them back before it recomputes, and a training checkpoint stores them. A state of ours is
the number of draws of one layer, a tensor on the CPU, which nobody waits for. It is replaced and never changed: a
checkpoint holds the tensor itself. Every rank that works on a sample has drawn as often as the others, whatever the
pipeline's schedule, so that nothing has to be said between them.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_cp.kernels import Dropout
from mindspeed_cp.patches.process_groups import layer_group


@dataclass(frozen=True)
class LayerDropout:
    """The dropout of one layer's attention. Its fields are those of `mindspeed_cp.kernels.Dropout`.

    layer: Megatron's number of it, over all pipeline stages.
    """

    rate: float
    seed: int
    layer: int
    data_parallel_rank: int
    first_head: int

    @classmethod
    def of_layer(cls, rate: float, seed: int, layer_number: int, num_heads: int, pg_collection: Any) -> "LayerDropout":
        """That of a layer with so many heads on each tensor-parallel rank.

        pg_collection: the layer's process groups, where it was given some of its own; else Megatron's are asked.
        """
        data_parallel, tensor_parallel = layer_group(pg_collection, "dp"), layer_group(pg_collection, "tp")
        return cls(rate, seed, layer_number, data_parallel.rank(), tensor_parallel.rank() * num_heads)

    def draw(self) -> Dropout:
        """What the layer drops in the micro-batch at hand; see Note [Draws]."""
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        states: dict[str, Any] = get_cuda_rng_tracker().states_
        name = f"mindspeed_cp: draws of attention dropout in layer {self.layer}"
        drawn = int(states[name]) if name in states else 0
        states[name] = torch.tensor(drawn + 1, dtype=torch.int64)
        return Dropout(
            rate=self.rate,
            seed=self.seed,
            layer=self.layer,
            micro_batch=drawn,
            data_parallel_rank=self.data_parallel_rank,
            first_head=self.first_head,
        )
