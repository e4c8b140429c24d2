"""Attention dropout of Megatron's layers, the same on any number of context-parallel ranks.

Note [Draws]
    A layer draws for each micro-batch anew, and for its recomputation again what it has drawn. How often it has drawn
    is kept where Megatron keeps the states of its random generators (`get_cuda_rng_tracker`): activation checkpointing
    takes these states with it and puts them back before it recomputes, and a training checkpoint stores them. A state
    of ours is the number of draws of one layer, a tensor on the CPU, which nobody waits for. It is replaced and never
    changed: a checkpoint holds the tensor itself. Every rank that works on a sample has drawn as often as the others,
    whatever the pipeline's schedule, so that nothing has to be said between them.

    Layers draw apart by their numbers. Megatron numbers those of multi-token prediction anew, from 1 on: here they
    follow the decoder's, as they do in Megatron 0.16. Else such a layer would draw in turn with a decoder layer where
    both are on one pipeline stage, and drop what that layer drops where they are not.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from mindspeed_cp.kernels import Dropout
from mindspeed_cp.patches.process_groups import layer_group
from mindspeed_cp.patching import Patch, PatchedCall


def dropout_patches() -> tuple[Patch, ...]:
    """Patch of the layers of multi-token prediction."""
    return (
        Patch(
            target="megatron.core.transformer.multi_token_prediction:MultiTokenPredictionLayer.__init__",
            kind="around",
            function=_init_prediction_layer,
            parameters=("config",),
            versions=">=0.17",
            why="Its attention has the number of a decoder layer, and would draw its dropout with that one.",
            remove_when="Megatron gives it a number of its own, or TransformerEngine's dropout is the same on any "
            "number of ranks.",
        ),
    )


def _init_prediction_layer(call: PatchedCall) -> None:
    call.proceed()
    layer = call.instance
    for module in layer.modules():
        if (attention := getattr(module, "core_attention", None)) is not None:
            _draw_as(attention, call["config"].num_layers + layer.layer_number)


def _draw_as(attention: Any, number: int) -> None:
    attention.drawing_number = number
    ours = getattr(attention, "context_parallel_attention", None)
    if ours is not None and ours.dropout is not None:
        attention.context_parallel_attention = replace(ours, dropout=replace(ours.dropout, layer=number))


def drawing_number(attention: Any) -> int:
    """By which a layer's core attention draws apart from others', see Note [Draws]."""
    number: int = getattr(attention, "drawing_number", attention.layer_number)
    return number


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
