"""What --hybrid-context-parallel needs of other options, said before Megatron asserts it, hangs or trains wrongly."""

import argparse
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig, flag
from mindspeed_cp.messages import or_list
from mindspeed_cp.patches.any_length import sample_length
from mindspeed_cp.patches.blockers import Blocker
from mindspeed_cp.patches.unsupported import PATTERNS, conversation_blockers, is_recurrent, refused_options

_ITS_FLAG = "--hybrid-context-parallel"


class _Rule(NamedTuple):
    """What does not go with it.

    options: by their names among Megatron's arguments, whose values are said. breaks: whether these arguments do it.
    """

    options: tuple[str, ...]
    breaks: Callable[[argparse.Namespace], bool]
    reason: str
    way_out: str


def _size(args: argparse.Namespace, name: str) -> int:
    return getattr(args, name, None) or 1


def _balances_experts(args: argparse.Namespace) -> bool:
    given = getattr(args, "moe_aux_loss_coeff", None)
    return bool(getattr(args, "num_experts", None)) and any(given if isinstance(given, list) else [given])


def _has_recurrent_layers(name: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: is_recurrent(getattr(args, name, None))


_RULES = (
    _Rule(
        ("context_parallel_size",),
        lambda args: _size(args, "context_parallel_size") > 1,
        "documents get their ranks from all data-parallel ones, and one that has a single rank would be given the "
        "rotary embeddings of a part",
        "use --context-parallel-size 1",
    ),
    _Rule(
        ("pipeline_model_parallel_size",),
        lambda args: _size(args, "pipeline_model_parallel_size") > 1,
        "Megatron schedules it without pipeline stages alone",
        "use --pipeline-model-parallel-size 1",
    ),
    _Rule(
        ("sft",),
        lambda args: not getattr(args, "sft", None),
        "Megatron takes the conversations of --sft apart, and cuts no other data by the ranks of a document",
        "add --sft",
    ),
    _Rule(
        ("calculate_per_token_loss",),
        lambda args: not args.calculate_per_token_loss,
        "a document of few tokens would weigh as much as one of many",
        "add --calculate-per-token-loss",
    ),
    _Rule(
        ("dataloader_type",),
        lambda args: args.dataloader_type not in (None, "single"),
        "Megatron has a sampler of whole global batches for that of one pass alone",
        "use --dataloader-type single",
    ),
    _Rule(
        ("rampup_batch_size",),
        lambda args: bool(args.rampup_batch_size),
        "Megatron's sampler takes --global-batch-size samples for every step",
        "leave it out",
    ),
    _Rule(
        ("attention_dropout",),
        lambda args: (args.attention_dropout or 0) > 0,
        "ranks that share a document have drawn for other numbers of documents before",
        "use --attention-dropout 0",
    ),
    _Rule(
        ("multi_latent_attention",),
        lambda args: bool(args.multi_latent_attention),
        "Megatron's latent attention asserts that there is none",
        "leave out one of the two",
    ),
    _Rule(
        ("mtp_num_layers",),
        lambda args: bool(args.mtp_num_layers),
        "Megatron finds the successors of tokens among the static ranks",
        "leave it out",
    ),
    _Rule(
        ("expert_model_parallel_size",),
        lambda args: _size(args, "expert_model_parallel_size") > 1,
        "ranks compute different numbers of documents in a step, and those that share experts would wait for each "
        "other",
        "use --expert-model-parallel-size 1",
    ),
    _Rule(
        ("moe_aux_loss_coeff",),
        _balances_experts,
        "experts would be balanced in each rank's part of a document, which weighs as much as a whole one",
        "use 0, or --moe-router-enable-expert-bias",
    ),
    _Rule(
        ("moe_z_loss_coeff",),
        lambda args: bool(getattr(args, "num_experts", None) and getattr(args, "moe_z_loss_coeff", None)),
        "it is a mean over each rank's part of a document, which weighs as much as a whole one",
        "leave it out",
    ),
    _Rule(
        ("sequence_parallel", "tensor_model_parallel_size"),
        lambda args: args.sequence_parallel and _size(args, "tensor_model_parallel_size") > 1,
        "tensor-parallel ranks take equal parts of a document's tokens, of which there may be any number",
        "leave out --sequence-parallel",
    ),
    _Rule(
        ("micro_batch_size", "tensor_model_parallel_size"),
        lambda args: _size(args, "micro_batch_size") > 1 and _size(args, "tensor_model_parallel_size") > 1,
        "a document is a micro-batch by itself, and tensor-parallel ranks wait for as many",
        "use --micro-batch-size 1",
    ),
    *(
        _Rule(
            (name,),
            _has_recurrent_layers(name),
            "recurrent layers know the static ranks alone",
            "use a pattern without M and G",
        )
        for name in PATTERNS
    ),
)


def num_dynamic_ranks(args: argparse.Namespace) -> int | None:
    """Among how many ranks each document gets its own; None where that is not asked for, or not known."""
    if not getattr(args, "hybrid_context_parallel", None) or getattr(args, "world_size", None) is None:
        return None
    beside = _size(args, "tensor_model_parallel_size") * _size(args, "pipeline_model_parallel_size")
    number: int = args.world_size // beside
    return number


def dynamic_blockers(args: argparse.Namespace, defaults: Mapping[str, object] = MappingProxyType({})) -> list[Blocker]:
    """All that does not go with --hybrid-context-parallel, where that is given. args: Megatron's.

    defaults: see refused_options.
    """
    if not getattr(args, "hybrid_context_parallel", None):
        return []
    # Above 1 they are refused already, as beside context parallelism in any form.
    alone = _size(args, "context_parallel_size") == 1
    blockers = [*refused_options(args, _ITS_FLAG, defaults), *conversation_blockers(args, _ITS_FLAG)] if alone else []
    blockers += [
        Blocker(flag(options[0]), f"{_spelled(args, options)} with {_ITS_FLAG}: {reason}; {way_out}.")
        for options, breaks, reason, way_out in _RULES
        if breaks(args)
    ]
    sentence = _wrong_ranks(args) or _wrong_length(args)
    return [*blockers, Blocker(_ITS_FLAG, sentence)] if sentence else blockers


def over_all(config: ContextParallelConfig, number: int) -> ContextParallelConfig:
    """The configuration of a document that has all of so many ranks.

    Raises ConfigurationError where these cannot be split as configured.
    """
    try:
        return ContextParallelConfig(**{**vars(config), "context_parallel_size": number})
    except ConfigurationError as error:
        raise as_documents(error, number) from None


def as_documents(error: ConfigurationError, number: int) -> ConfigurationError:
    """The same of a document that has all of so many ranks."""
    return ConfigurationError(
        *(f"{_ITS_FLAG}: a document may have all {number} ranks, and then {each}" for each in error.sentences)
    )


def _spelled(args: argparse.Namespace, options: tuple[str, ...]) -> str:
    words = []
    for name in options:
        value = getattr(args, name, None)
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        words.append(flag(name) if value is True else f"no {flag(name)}" if not value else f"{flag(name)} {shown}")
    return " ".join(words)


def _wrong_ranks(args: argparse.Namespace) -> str | None:
    number = num_dynamic_ranks(args)
    if number is None or (number > 1 and number & (number - 1) == 0):
        return None
    below = 1 << max(number.bit_length() - 1, 1)
    fitting = or_list([below] if number < 2 else [below, 2 * below])
    return (
        f"{_ITS_FLAG} on {number} ranks: Megatron makes groups of 2, 4, 8 and so on, up to all, and a document may "
        f"need one that is not there; use {fitting} ranks."
    )


def _wrong_length(args: argparse.Namespace) -> str | None:
    tokens, number = getattr(args, "max_seqlen_per_dp_cp_rank", None), num_dynamic_ranks(args)
    length = sample_length(args)
    needed = None if number is None or length is None else -(-length // number)
    if tokens is not None and tokens > 0 and (needed is None or tokens >= needed):
        return None
    advice = "1 or more" if needed is None else f"{needed} or more"
    if tokens is None:
        return (
            f"{_ITS_FLAG} needs --max-seqlen-per-dp-cp-rank, the tokens of a document that a rank takes before it is "
            f"given another; use {advice}."
        )
    if tokens < 1 or needed is None:
        return f"--max-seqlen-per-dp-cp-rank {tokens} is below 1; use {advice}."
    return (
        f"--max-seqlen-per-dp-cp-rank {tokens} on {number} ranks holds {tokens * (number or 1)} tokens of a document, "
        f"which may have --seq-length {length}; use {advice}."
    )
