"""Sequences of any length: shards that differ by a token, where 2 x CP does not divide --seq-length.

Megatron asserts that it does, and cuts by equal views. Here the samples are a zigzag over the ranks all the same, of
chunks that differ by a token or two (layouts.Zigzag): batches and rotary embeddings are cut by it, attention computes
by its plan, and pipeline stages are told this rank's tokens.

Shapes: B samples, S tokens of a whole sample, s of this rank.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig, flag
from mindspeed_cp.messages import or_list
from mindspeed_cp.patches.packing import cut_samples, layout_of_length
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.unsupported import PATTERNS, is_recurrent
from mindspeed_cp.patching import Patch, bind_by_name
from mindspeed_cp.sharding import shard

_EMBEDDINGS = "megatron.core.models.common.embeddings"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_REMOVE_WHEN = "Megatron takes sequences that 2 x CP does not divide."
_WANT_EQUAL_SHARDS: dict[str, Callable[[Any], bool]] = {
    "sft": bool,
    "dataloader_inter_document_masking": bool,
    "mtp_num_layers": bool,
    "num_experts": bool,
    **dict.fromkeys(PATTERNS, is_recurrent),
}
"""Options that take each rank to have as many tokens as any other."""


def length_of(args: argparse.Namespace, config: ContextParallelConfig) -> int | None:
    """Tokens of a whole sample where the ranks get unequal shards of it; None where equal ones, or nothing is known."""
    length, size = _length(args), config.context_parallel_size
    return length if size > 1 and length is not None and length % (2 * size) else None


def _length(args: argparse.Namespace) -> int | None:
    """Tokens of a whole sample, which has two names, of which one is given."""
    length: int | None = args.encoder_seq_length if args.seq_length is None else args.seq_length
    return length


def refuse_length(args: argparse.Namespace, config: ContextParallelConfig) -> None:
    """Raise ConfigurationError where the ranks cannot be given such shards."""
    length = _length(args)
    size, tensor_parallel = config.context_parallel_size, args.tensor_model_parallel_size
    if size == 1 or length is None:
        return
    wanting = [flag(name) for name, wants in _WANT_EQUAL_SHARDS.items() if wants(getattr(args, name, None))]
    wanting += ["--attention-mask-type general"] * (config.attention_mask_type == "general")
    unit, rule = size, f"--context-parallel-size {size}"
    if wanting:
        unit, rule = 2 * size, f"2 * --context-parallel-size {size} = {2 * size}, which {wanting[0]} needs"
    split = args.sequence_parallel and tensor_parallel > 1
    if split and size * tensor_parallel % unit == 0:
        unit = size * tensor_parallel
        rule = (
            f"--context-parallel-size {size} * --tensor-model-parallel-size {tensor_parallel} = {unit}, which "
            f"--sequence-parallel needs"
        )
    below = length // unit * unit
    lengths = or_list(each for each in (below, below + unit) if each)
    if (wanting or split) and length % unit:
        raise ConfigurationError(f"--seq-length {length} is not a multiple of {rule}; use {lengths}.")
    if length < size:
        raise ConfigurationError(f"--seq-length {length} is below {rule}; use {size} or more.")
    positions = args.max_position_embeddings
    if length % (2 * size) and positions is not None and positions < length:
        raise ConfigurationError(
            f"--max-position-embeddings {positions} is below --seq-length {length}; use {length} or more."
        )


@contextmanager
def equal_lengths(args: argparse.Namespace, config: ContextParallelConfig) -> Iterator[None]:
    """Within it the length is one that Megatron's rules take; all that it derives from it is the length itself."""
    length = length_of(args, config)
    if length is None:
        yield
        return
    names = [name for name in ("seq_length", "encoder_seq_length") if getattr(args, name) is not None]
    for name in names:
        setattr(args, name, length - length % (2 * config.context_parallel_size))
    yield
    args.seq_length = args.encoder_seq_length = length


def any_length_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of rotary embeddings and of the pipeline schedules."""

    def wrap_positions(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def get_pos_emb_on_this_cp_rank(*args: Any, **kwargs: Any) -> Tensor:
            named = bind_by_name(original, args, kwargs)
            embeddings, dim = named["pos_emb"], named["seq_dim"]
            if plugin.length is None or embeddings.size(dim) != plugin.length:
                return original(*args, **kwargs)
            rank, size = plugin.place
            return shard(embeddings, layout_of_length(plugin.length, size), rank, dim)

        return get_pos_emb_on_this_cp_rank

    def wrap_schedule(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward_backward(*args: Any, **kwargs: Any) -> Any:
            named = bind_by_name(original, args, kwargs)
            if plugin.length is not None and named["seq_length"] == plugin.length:
                # It is divided by the size again, for the shapes of what travels between stages.
                rank, size = plugin.place
                named["seq_length"] = layout_of_length(plugin.length, size).num_tokens(rank) * size
            return original(**named)

        return forward_backward

    return (
        Patch(
            target=f"{_EMBEDDINGS}.rope_utils:get_pos_emb_on_this_cp_rank",
            kind="wrap",
            function=wrap_positions,
            aliases=tuple(
                f"{_EMBEDDINGS}.{module}:get_pos_emb_on_this_cp_rank"
                for module in ("rotary_pos_embedding", "yarn_rotary_pos_embedding")
            ),
            parameters=("pos_emb", "seq_dim", "cp_group"),
            why="It cuts by equal views.",
            remove_when=_REMOVE_WHEN,
        ),
        *(
            Patch(
                target=f"{_SCHEDULES}:forward_backward_pipelining_{how}_interleaving",
                kind="wrap",
                function=wrap_schedule,
                parameters=("seq_length",),
                why="The shapes of what travels between stages are those of equal shards.",
                remove_when=_REMOVE_WHEN,
            )
            for how in ("without", "with")
        ),
    )


def cut_unequal(plugin: Plugin, batch: dict[str, Any]) -> bool:
    """Replace whole samples by this rank's tokens where the ranks get unequal shards; else leave the batch alone.

    batch: see packing.cut_samples. Returns whether it was cut.
    """
    if plugin.length is None:
        return False
    rank, size = plugin.place
    layout = layout_of_length(plugin.length, size)
    cut_samples(batch, lambda tensor, dim: shard(tensor, layout, rank, dim))
    return True
