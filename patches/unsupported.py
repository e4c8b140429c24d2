"""Options of Megatron's that context parallelism cannot honour, refused by name, or honours within each rank."""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from packaging.version import Version

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig, flag
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


def _is_given(value: Any) -> bool:
    return value is not None


def _reaches_below_zero(window: Any) -> bool:
    return window is not None and min(window) < 0


def _spell(option: str, value: Any, defaults: Mapping[str, object] = MappingProxyType({})) -> str:
    """The option and its value as on the command line, and whether it is what Megatron takes if nobody gives one."""
    if value is True:
        return flag(option)
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    spelled = f"{flag(option)} {' '.join(map(str, value)) if isinstance(value, list) else value}"
    return f"{spelled} (Megatron's default)" if value == defaults.get(option) else spelled


_MASK_IS_MADE = "create_attention_mask_in_dataloader"
_RL_LOOP = (
    "Megatron's loop of reinforcement learning gives each rank of a sequence the whole of it; a program may cut its "
    "bins by megatron_adaptor.shard_batch"
)
_GRAPHS = "attention has not been tried within a captured graph"
_OWN_ATTENTION = "it has an attention of its own"

_REFUSALS = (
    _Refusal("cache_mla_latents", _is_set, "inference is not available", "leave it out"),
    _Refusal("experimental_attention_variant", _is_set, _OWN_ATTENTION, "leave it out"),
    _Refusal("use_kitchen_attention", _is_set, _OWN_ATTENTION, "leave it out"),
    _Refusal("cuda_graph_impl", lambda kind: kind not in (None, "none"), _GRAPHS, "use none"),
    _Refusal("enable_cuda_graph", _is_set, _GRAPHS, "leave it out"),
    _Refusal("external_cuda_graph", _is_set, _GRAPHS, "leave it out"),
    _Refusal("fp8_dot_product_attention", _is_set, "attention in fp8 is not available", "leave it out"),
    _Refusal("fp8_multi_head_attention", _is_set, "attention in fp8 is not available", "leave it out"),
    _Refusal("batch_invariant_mode", _is_set, "no kernel here makes that promise", "leave it out"),
    _Refusal(
        "window_size",
        _reaches_below_zero,
        "below 0 Megatron's own attention hides each token from itself, and TransformerEngine's sees all",
        "use two numbers from 0 on, or leave it out",
    ),
    _Refusal("perform_rl_step", _is_set, _RL_LOOP, "leave it out"),
    _Refusal("rl_use_sequence_packing", _is_set, _RL_LOOP, "leave it out"),
    _Refusal(
        "position_embedding_type",
        lambda kind: kind == "relative",
        "T5 alone has it, whose batches Megatron does not cut for the ranks of a sequence",
        "use rope or learned_absolute",
    ),
)


PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")
"""Options that say of each layer what it is, a letter each; the second is the name of older releases."""


_PACKING = ("sft", "dataloader_inter_document_masking")


def packing_options(options: Any) -> list[str]:
    """Those that are set of the options by which batches are packed streams. options: Megatron's arguments."""
    return [name for name in _PACKING if getattr(options, name, False)]


def balances_by(kind: str, kinds: str | Sequence[str] | None) -> bool:
    """Whether a kind is among those of --moe-router-load-balancing-type: one, or several of them."""
    return kind in ([kinds] if isinstance(kinds, str) else kinds or ())


def is_recurrent(pattern: str | None) -> bool:
    """Whether some layers of a pattern are Mamba's (M) or gated delta nets (G)."""
    return not {"M", "G"}.isdisjoint(pattern or "")


class _Difference(NamedTuple):
    """An option that is honoured, but within each rank: the losses are not those of one rank.

    option: its name among Megatron's arguments. differs: whether it does so with this value.
    """

    option: str
    differs: Callable[[Any], bool]
    reason: str


_OWN_DRAWS = "each rank draws the random numbers of its own tokens"
_OWN_DROPS = "each rank drops tokens among its own, as data-parallel ranks do"

_DIFFERENCES = (
    _Difference("hidden_dropout", _is_set, _OWN_DRAWS),
    _Difference("moe_input_jitter_eps", _is_set, _OWN_DRAWS),
    _Difference("moe_router_force_load_balancing", _is_set, _OWN_DRAWS),
    _Difference("moe_router_force_biased", _is_given, _OWN_DRAWS),
    _Difference("moe_expert_capacity_factor", _is_given, _OWN_DROPS),
    _Difference("moe_expert_rank_capacity_factor", _is_given, _OWN_DROPS),
    _Difference(
        "moe_router_load_balancing_type",
        functools.partial(balances_by, "sinkhorn"),
        "each rank balances its own tokens, as data-parallel ranks do",
    ),
)


def difference_notes(
    args: argparse.Namespace, config: ContextParallelConfig, defaults: Mapping[str, object] = MappingProxyType({})
) -> list[str]:
    """A sentence for each option that is set and makes the losses others than those of CP = 1.

    args: Megatron's parsed arguments; what this release lacks is not set. defaults: see refuse_unsupported.
    """
    if config.context_parallel_size == 1:
        return []
    notes = [
        f"{_spell(option, value, defaults)}: {reason}, so the losses are not those of --context-parallel-size 1."
        for option, differs, reason in _DIFFERENCES
        if hasattr(args, option) and differs(value := getattr(args, option))
    ]
    return [*notes, *_note_on_streams_as_sequences(args)]


def _note_on_streams_as_sequences(args: argparse.Namespace) -> list[str]:
    """A sentence where experts are balanced in a stream of several samples, not in each of them."""
    packed = packing_options(args)
    balanced = balances_by("seq_aux_loss", getattr(args, "moe_router_load_balancing_type", None))
    if not getattr(args, "num_experts", None) or not balanced or not packed or args.micro_batch_size == 1:
        return []
    return [
        f"--moe-router-load-balancing-type seq_aux_loss with {flag(packed[0])} and --micro-batch-size "
        f"{args.micro_batch_size}: the samples of a micro-batch are one stream, and experts are balanced in all of "
        f"it; --micro-batch-size 1 balances them in each sample, as Megatron's script does with one rank."
    ]


def refused_options(options: Any, beside: str, defaults: Mapping[str, object] = MappingProxyType({})) -> list[Blocker]:
    """All options that are set and that attention over several ranks cannot honour, however these are chosen.

    options: Megatron's parsed arguments, or a TransformerConfig; what one of them lacks is not checked.
    beside: what has several ranks share a sequence, for messages.
    defaults: what Megatron takes for options that nobody gives; the message says so of a value that is one.
    """
    return [
        Blocker(flag(option), f"{_spell(option, value, defaults)} with {beside}: {reason}; {way_out}.")
        for option, refused, reason, way_out in _REFUSALS
        if refused(value := getattr(options, option, None))
    ]


def conversation_blockers(options: Any, beside: str) -> list[Blocker]:
    """The options that the data set of --sft asserts are not there, in the midst of the first batch.

    options, beside: see refused_options.
    """
    if not getattr(options, "sft", False):
        return []
    return [
        Blocker(
            flag(option),
            f"{flag(option)} with --sft and {beside}: its data set says {what} itself, and asserts that nobody else "
            f"does, at CP = 1 too; leave out {flag(option)}.",
        )
        for option, what in (("reset_position_ids", "positions"), ("reset_attention_mask", "where documents end"))
        if getattr(options, option, False)
    ]


def unsupported(options: Any, size: int, defaults: Mapping[str, object] = MappingProxyType({})) -> list[Blocker]:
    """All options that are set and cannot be honoured with this context-parallel size.

    options, defaults: see refused_options.
    """
    if size == 1:
        return []
    beside = f"--context-parallel-size {size}"
    blockers = [*refused_options(options, beside, defaults), *conversation_blockers(options, beside)]
    makes_no_mask = not getattr(options, _MASK_IS_MADE, True) and not getattr(options, "sft", False)
    if getattr(options, "reset_attention_mask", False) and makes_no_mask:
        sentence = (
            f"--reset-attention-mask with --context-parallel-size {size} and --no-create-attention-mask-in-dataloader: "
            f"no mask is made, so documents would see each other; leave out one of the two."
        )
        blockers.append(Blocker("--reset-attention-mask", sentence))
    packed = packing_options(options)
    if packed and getattr(options, "apply_rope_fusion", False):
        blockers.append(
            Blocker(
                flag(packed[0]),
                f"{flag(packed[0])} with --context-parallel-size {size} and fused rotary embeddings: these take all "
                f"documents to be cut in lengths that 2 x CP divides; add --no-rope-fusion.",
            )
        )
    recurrent = next((name for name in PATTERNS if is_recurrent(getattr(options, name, None))), None)
    if packed and recurrent:
        blockers.append(
            Blocker(
                flag(packed[0]),
                f"{flag(packed[0])} with --context-parallel-size {size} and "
                f"{_spell(recurrent, getattr(options, recurrent))}: its recurrent layers take all documents to be cut "
                f"in lengths that 2 x CP divides; leave out one of the two.",
            )
        )
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


def refuse_unsupported(
    options: Any, config: ContextParallelConfig, defaults: Mapping[str, object] = MappingProxyType({})
) -> None:
    """Raise ConfigurationError with all options that are set and cannot be honoured with `config`.

    options, defaults: see unsupported.
    """
    raise_for(unsupported(options, config.context_parallel_size, defaults))


def refuse_lost_documents(args: argparse.Namespace, config: ContextParallelConfig, release: str) -> None:
    """Raise ConfigurationError where packed streams are cut into pipeline stages that are not told where they end.

    args: Megatron's arguments; only after validate_args is it known how many virtual stages a layout makes. release: of
    megatron.core.
    """
    size = config.context_parallel_size
    # get_batch of pretrain_gpt.py: of the stages between the first and the last only --sft has a data set, since 0.17.
    lost = [flag("dataloader_inter_document_masking")] * getattr(args, "dataloader_inter_document_masking", False)
    lost += [flag("sft")] * (getattr(args, "sft", False) and Version(release) < Version("0.17"))
    stages = args.pipeline_model_parallel_size * (getattr(args, "virtual_pipeline_model_parallel_size", None) or 1)
    if size > 1 and lost and stages > 2:
        raise ConfigurationError(
            f"{lost[0]} with --context-parallel-size {size} and {stages} pipeline stages, virtual ones included: "
            f"Megatron {release} tells the first and the last alone where documents end; use "
            f"--pipeline-model-parallel-size 1, or 2 without virtual stages, or --reset-attention-mask."
        )


WATCHING = ("qk_clip", "log_max_attention_logit")
"""Options that ask for the largest score of each head, by their names among Megatron's arguments."""


def refuse_dropout_rate(args: argparse.Namespace, config: ContextParallelConfig) -> None:
    """Raise ConfigurationError for a share of probabilities that attention cannot drop."""
    if config.computes_attention and not 0.0 <= args.attention_dropout < 1.0:
        raise ConfigurationError(
            f"--attention-dropout {args.attention_dropout} is not from 0 on and below 1, the share of probabilities "
            f"that is dropped; use 0.1, or 0 for none."
        )


def refuse_unwatched_scores(args: argparse.Namespace, config: ContextParallelConfig) -> None:
    """Raise ConfigurationError where the largest scores are asked for and Megatron's clip_qk could not take them.

    args: Megatron's arguments, before validate_args.
    """
    watching = [flag(name) for name in WATCHING if getattr(args, name, False)]
    if not watching or not (config.computes_attention or args.transformer_impl == "local"):
        return
    broken = []
    if not args.bf16 and not args.fp16:
        broken.append(
            f"{watching[0]} in fp32: Megatron looks for the layers within the module that casts to half precision, at "
            f"CP = 1 too; use --bf16 or --fp16."
        )
    if getattr(args, "qk_clip", False):
        if getattr(args, "use_distributed_optimizer", False):
            broken.append(
                "--qk-clip with --use-distributed-optimizer: Megatron's clip_qk takes the fp32 copy of a weight for "
                "the whole matrix, and that optimizer has a flat part of it, at CP = 1 too; leave out one of the two."
            )
        if args.tensor_model_parallel_size > 1 and not args.multi_latent_attention:
            broken.append(
                f"--qk-clip with --tensor-model-parallel-size {args.tensor_model_parallel_size}: Megatron's clip_qk "
                f"takes a rank's part of the weights for the whole matrix, and ends in a RuntimeError when it first "
                f"clips, at CP = 1 too; use --tensor-model-parallel-size 1, or --multi-latent-attention."
            )
        if not 0.0 < args.qk_clip_alpha < 1.0:
            broken.append(f"--qk-clip-alpha {args.qk_clip_alpha} is not between 0 and 1; use 0.5.")
        if args.qk_clip_threshold <= 0:
            broken.append(f"--qk-clip-threshold {args.qk_clip_threshold} is not above 0; use 100.")
    if broken:
        raise ConfigurationError(*broken)


def refuse_mask_beside_window(args: argparse.Namespace, config: ContextParallelConfig) -> None:
    """Raise ConfigurationError where layers with a window would be given a mask tensor: each says who sees whom.

    args: Megatron's arguments, before validate_args.
    """
    if not config.computes_attention or config.attention_mask_type == "causal" or args.window_size is None:
        return
    if not getattr(args, _MASK_IS_MADE, True) or args.reset_attention_mask or packing_options(args):
        return  # No mask comes, or none is read.
    window = ",".join(map(str, args.window_size))
    raise ConfigurationError(
        f"--window-size {window} with --attention-mask-type {config.attention_mask_type}: the batch's mask says who "
        f"sees whom too; use --attention-mask-type causal, or --no-create-attention-mask-in-dataloader."
    )


def note_on_windows_across_documents(args: argparse.Namespace, config: ContextParallelConfig) -> list[str]:
    """A sentence where Megatron's own attention lets documents see each other, which this plugin's does not."""
    if config.computes_attention or not args.reset_attention_mask or args.window_size is None:
        return []
    if args.transformer_impl != "local":
        return []
    return [
        f"--window-size {','.join(map(str, args.window_size))} with --reset-attention-mask and --context-parallel-size "
        f"{config.context_parallel_size}: Megatron's local attention replaces the mask of the documents by the window, "
        f"so that they see each other; add --attention-on-one-rank for the losses of context parallelism."
    ]


def refuse_unloadable_optimizer(args: argparse.Namespace, config: ContextParallelConfig) -> None:
    """Raise ConfigurationError where the distributed optimizer's state is to be loaded, and Adam is torch's.

    DistributedOptimizer looks for the number of steps where apex has it, and ends in a bare AssertionError (torch_dist)
    or KeyError (torch), at CP = 1 too.

    args: Megatron's arguments; validate_args may still leave the state out.
    """
    if config.context_parallel_size == 1 or not args.use_distributed_optimizer or args.load is None:
        return
    if args.no_load_optim or args.finetune or not _holds_training_state(Path(args.load)):
        return
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    if not HAVE_APEX_OR_TE:
        raise ConfigurationError(
            f"--use-distributed-optimizer with --load {args.load} and --context-parallel-size "
            f"{config.context_parallel_size}: Megatron loads its state into TransformerEngine's or apex's Adam alone, "
            f"at CP = 1 too, and neither is installed; install one, or start Adam anew with --no-load-optim."
        )


def _holds_training_state(folder: Path) -> bool:
    """Whether there is a checkpoint of a training run, and not of weights alone."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    return tracker.is_file() and tracker.read_text().strip().isdigit()
