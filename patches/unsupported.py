"""Options of Megatron's that context parallelism cannot honour, refused by name, or honours within each rank."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from mindspeed_cp.config import ContextParallelConfig, flag
from mindspeed_cp.patches.blockers import Blocker, raise_for


class _Refusal(NamedTuple):
    """An option that is refused where `refused` says so of its value.

    option: its name among Megatron's arguments, and in TransformerConfig where it has a field there.
    """

    option: str
    refused: Callable[[Any], bool]
    reason: str
    way_out: str


def _is_set(value: Any) -> bool:
    return bool(value)


def _spell(option: str, value: Any) -> str:
    """The option and its value as on the command line."""
    if value is True:
        return flag(option)
    return f"{flag(option)} {' '.join(map(str, value)) if isinstance(value, list) else value}"


_PACKED = "packed sequences are not available yet"
_GRAPHS = "attention has not been tried within a captured graph"
_OWN_ATTENTION = "it has an attention of its own"

_REFUSALS = (
    _Refusal(
        "attention_dropout",
        lambda rate: bool(rate and rate > 0),
        "attention dropout is not available yet",
        "set --attention-dropout 0",
    ),
    _Refusal("window_size", _is_set, "sliding windows are not available yet", "leave it out"),
    _Refusal(
        "softmax_type",
        lambda kind: kind not in (None, "vanilla"),
        "softmax sinks are not available yet",
        "use vanilla",
    ),
    _Refusal("cache_mla_latents", _is_set, "inference is not available", "leave it out"),
    _Refusal("experimental_attention_variant", _is_set, _OWN_ATTENTION, "leave it out"),
    _Refusal("use_kitchen_attention", _is_set, _OWN_ATTENTION, "leave it out"),
    _Refusal("cuda_graph_impl", lambda kind: kind not in (None, "none"), _GRAPHS, "use none"),
    _Refusal("enable_cuda_graph", _is_set, _GRAPHS, "leave it out"),
    _Refusal("external_cuda_graph", _is_set, _GRAPHS, "leave it out"),
    _Refusal("qk_clip", _is_set, "the largest score of each head is not collected", "leave it out"),
    _Refusal("log_max_attention_logit", _is_set, "the largest score of each head is not collected", "leave it out"),
    _Refusal("fp8_dot_product_attention", _is_set, "attention in fp8 is not available", "leave it out"),
    _Refusal("fp8_multi_head_attention", _is_set, "attention in fp8 is not available", "leave it out"),
    _Refusal("sft", _is_set, _PACKED, "leave it out"),
    _Refusal("dataloader_inter_document_masking", _is_set, _PACKED, "leave it out"),
    _Refusal("rl_use_sequence_packing", _is_set, _PACKED, "leave it out"),
    _Refusal(
        "hybrid_context_parallel",
        _is_set,
        "it changes the context-parallel size from batch to batch",
        "leave it out",
    ),
    _Refusal(
        "position_embedding_type",
        lambda kind: kind == "relative",
        "attention bias is not available yet",
        "use rope or learned_absolute",
    ),
)


class _Difference(NamedTuple):
    """An option that is honoured, but within each rank: the losses are not those of one rank.

    option: its name among Megatron's arguments. differs: whether it does so with this value.
    """

    option: str
    differs: Callable[[Any], bool]
    reason: str


_OWN_DRAWS = "each rank draws the random numbers of its own tokens"

_DIFFERENCES = (
    _Difference("hidden_dropout", _is_set, _OWN_DRAWS),
    _Difference("moe_input_jitter_eps", _is_set, _OWN_DRAWS),
    _Difference(
        "moe_expert_capacity_factor",
        lambda factor: factor is not None,
        "each rank drops tokens among its own, as data-parallel ranks do",
    ),
    _Difference(
        "moe_router_load_balancing_type",
        lambda kinds: "sinkhorn" in ([kinds] if isinstance(kinds, str) else kinds),
        "each rank balances its own tokens, as data-parallel ranks do",
    ),
)


def difference_notes(args: argparse.Namespace, config: ContextParallelConfig) -> list[str]:
    """A sentence for each option that is set and makes the losses others than those of CP = 1.

    args: Megatron's parsed arguments.
    """
    if config.context_parallel_size == 1:
        return []
    return [
        f"{_spell(option, value)}: {reason}, so the losses are not those of --context-parallel-size 1."
        for option, differs, reason in _DIFFERENCES
        if differs(value := getattr(args, option))
    ]


def unsupported(options: Any, size: int) -> list[Blocker]:
    """All options that are set and cannot be honoured with this context-parallel size.

    options: Megatron's parsed arguments, or a TransformerConfig; what one of them lacks is not checked.
    """
    if size == 1:
        return []
    blockers = []
    for option, refused, reason, way_out in _REFUSALS:
        value = getattr(options, option, None)
        if refused(value):
            sentence = f"{_spell(option, value)} with --context-parallel-size {size}: {reason}; {way_out}."
            blockers.append(Blocker(flag(option), sentence))
    masked_mtp = ("mtp_num_layers", "eod_mask_loss", "calculate_per_token_loss")
    if all(getattr(options, option, None) for option in masked_mtp):
        spelled = " ".join(_spell(option, getattr(options, option)) for option in masked_mtp)
        blockers.append(
            Blocker(
                flag(masked_mtp[0]),
                f"{spelled} with --context-parallel-size {size}: that loss would be weighed by the tokens of "
                f"each rank; leave out --calculate-per-token-loss.",
            )
        )
    return blockers


def refuse_unsupported(options: Any, config: ContextParallelConfig) -> None:
    """Raise ConfigurationError with all options that are set and cannot be honoured with `config`."""
    raise_for(unsupported(options, config.context_parallel_size))
