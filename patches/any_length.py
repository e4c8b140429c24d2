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
from typing import Any, NamedTuple

from torch import Tensor

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.messages import or_list
from mindspeed_cp.patches.packing import cut_samples, layout_of_length
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.unsupported import PATTERNS, balances_by, is_recurrent
from mindspeed_cp.patching import Patch, PatchedCall
from mindspeed_cp.sharding import shard

_EMBEDDINGS = "megatron.core.models.common.embeddings"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_REMOVE_WHEN = "Megatron takes sequences that 2 x CP does not divide."


class _Need(NamedTuple):
    """What takes each rank to have as many tokens as any other.

    applies: whether these arguments ask for it. spelled: how. reason: why. instead: what to use in place of another
    length. parts: in which a rank's tokens are cut, all alike.
    """

    applies: Callable[[argparse.Namespace], bool]
    spelled: str
    reason: str
    instead: str
    parts: int = 1


def _asks(*names: str) -> Callable[[argparse.Namespace], bool]:
    """Whether all of these options are set; those that a release lacks are not."""
    return lambda args: all(getattr(args, name, None) for name in names)


def _spans_ranks(args: argparse.Namespace) -> bool:
    """Whether experts are shared by ranks that hold different tokens of a sequence."""
    tensor_parallel: int = args.tensor_model_parallel_size or 1
    of_experts: int = getattr(args, "expert_tensor_parallel_size", None) or tensor_parallel
    size = (getattr(args, "expert_model_parallel_size", None) or 1) * of_experts
    return bool(getattr(args, "num_experts", None)) and size > tensor_parallel


_NEEDS = (
    _Need(
        lambda args: _spans_ranks(args) and getattr(args, "moe_token_dispatcher_type", None) == "allgather",
        "--moe-token-dispatcher-type allgather with experts on several ranks",
        "Megatron gathers as many tokens of each rank",
        "--moe-token-dispatcher-type alltoall",
    ),
    _Need(
        lambda args: _spans_ranks(args) and bool(getattr(args, "moe_pad_expert_input_to_capacity", None)),
        "--moe-pad-expert-input-to-capacity with experts on several ranks",
        "Megatron takes the capacity of an expert to be that of this rank on all",
        "no --moe-pad-expert-input-to-capacity",
    ),
    _Need(
        lambda args: (
            _asks("num_experts")(args)
            and balances_by("quantile_balancing", getattr(args, "moe_router_load_balancing_type", None))
        ),
        "--moe-router-load-balancing-type quantile_balancing",
        "Megatron gathers as many scores of each rank",
        "another --moe-router-load-balancing-type",
    ),
    _Need(
        _asks("num_experts", "moe_z_loss_coeff", "calculate_per_token_loss"),
        "--moe-z-loss-coeff with --calculate-per-token-loss",
        "Megatron weighs that loss by the tokens of each rank",
        "no --calculate-per-token-loss",
    ),
    _Need(
        _asks("mtp_num_layers", "calculate_per_token_loss"),
        "--mtp-num-layers with --calculate-per-token-loss",
        "Megatron weighs that loss by the tokens of each rank",
        "no --calculate-per-token-loss",
    ),
    _Need(
        lambda args: any(is_recurrent(getattr(args, name, None)) for name in PATTERNS),
        "--hybrid-layer-pattern with recurrent layers",
        "Megatron puts a sequence together of equal chunks",
        "a pattern without M and G",
        parts=2,
    ),
)


def length_of(args: argparse.Namespace, config: ContextParallelConfig) -> int | None:
    """Tokens of a whole sample where the ranks get unequal shards of it; None where equal ones, or nothing is known."""
    return if_unequal(sample_length(args), config)


def if_unequal(length: int | None, config: ContextParallelConfig) -> int | None:
    """A length that 2 x CP does not divide; None else."""
    size = config.context_parallel_size
    return length if size > 1 and length is not None and length % (2 * size) else None


def sample_length(args: argparse.Namespace) -> int | None:
    """Tokens of a whole sample, which has two names, of which one is given."""
    length: int | None = args.encoder_seq_length if args.seq_length is None else args.seq_length
    return length


def refuse_length(args: argparse.Namespace, config: ContextParallelConfig) -> None:
    """Raise ConfigurationError where the ranks cannot be given such shards."""
    length = sample_length(args)
    size, tensor_parallel = config.context_parallel_size, args.tensor_model_parallel_size
    if size == 1 or length is None:
        return
    if args.sequence_parallel and tensor_parallel > 1 and length % (unit := size * tensor_parallel):
        raise ConfigurationError(
            f"--seq-length {length} is not a multiple of --context-parallel-size {size} * --tensor-model-parallel-size "
            f"{tensor_parallel} = {unit}, which --sequence-parallel needs; use {or_list(_multiples(length, unit))}."
        )
    for need in _NEEDS:
        unit = need.parts * size
        if length % unit and need.applies(args):
            times = "" if need.parts == 1 else f"{need.parts} * "
            raise ConfigurationError(
                f"--seq-length {length} is not a multiple of {times}--context-parallel-size {size}, which "
                f"{need.spelled} needs: {need.reason}; use {or_list([*_multiples(length, unit), need.instead])}."
            )
    refuse_short(length, size)
    positions = args.max_position_embeddings
    if length % (2 * size) and positions is not None and positions < length:
        raise ConfigurationError(
            f"--max-position-embeddings {positions} is below --seq-length {length}; use {length} or more."
        )


def refuse_short(length: int, size: int) -> None:
    """Raise ConfigurationError where a sample has fewer tokens than ranks."""
    if length < size:
        raise ConfigurationError(f"--seq-length {length} is below --context-parallel-size {size}; use {size} or more.")


def _multiples(length: int, unit: int) -> list[int]:
    """Those next to a length that is none."""
    below = length // unit * unit
    return [each for each in (below, below + unit) if each]


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
    return (
        Patch(
            target=f"{_EMBEDDINGS}.rope_utils:get_pos_emb_on_this_cp_rank",
            kind="around",
            function=_cut_positions,
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
                kind="around",
                function=functools.partial(_run_schedule, plugin),
                parameters=("seq_length", "micro_batch_size"),
                why="The shapes of what travels between stages are those of equal shards, and of a micro-batch whose "
                "samples are no stream.",
                remove_when=_REMOVE_WHEN,
            )
            for how in ("without", "with")
        ),
    )


def _cut_positions(call: PatchedCall) -> Tensor:
    embeddings, dim, group = call["pos_emb"], call["seq_dim"], call["cp_group"]
    if group is None or embeddings.size(dim) % (2 * group.size()) == 0:
        equal: Tensor = call.proceed()
        return equal
    # Of any number of positions: YaRN's constructor makes as many as its original length, whatever the job's.
    layout = layout_of_length(embeddings.size(dim), group.size())
    return shard(embeddings, layout, group.rank(), dim)


def _run_schedule(plugin: Plugin, call: PatchedCall) -> Any:
    changed = {"seq_length": call["seq_length"]}
    if plugin.packs_streams:
        # The samples of a micro-batch are one stream, and so is what travels between stages.
        changed = {"seq_length": call["seq_length"] * call["micro_batch_size"], "micro_batch_size": 1}
    rank, size = plugin.place
    if changed["seq_length"] % (2 * size):
        # It is divided by the size again, for the shapes of what travels between stages.
        changed["seq_length"] = layout_of_length(changed["seq_length"], size).num_tokens(rank) * size
    return call.proceed(**changed)


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
