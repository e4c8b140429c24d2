"""Megatron's argument parser: the context-parallel flags, and every rule about them, checked right after parsing."""

import argparse
import functools
import math
import os
import sys
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from mindspeed_cp.choice import Choice
from mindspeed_cp.config import CHOICES, ConfigurationError, ContextParallelConfig, flag
from mindspeed_cp.device import accelerator
from mindspeed_cp.kernels import KERNELS
from mindspeed_cp.messages import divisors, or_list
from mindspeed_cp.patches.algorithm import choose_algorithm, dynamic_start_line, mark_default, start_line
from mindspeed_cp.patches.any_length import equal_lengths, length_of, refuse_length
from mindspeed_cp.patches.blockers import (
    Blocker,
    PartialArguments,
    UnknownValueError,
    blockers_of,
    found_by,
    none_for_unknown,
    raise_for,
)
from mindspeed_cp.patches.command_line import Examination, examine
from mindspeed_cp.patches.defaults import check_transformer_impl, note_on_defaults, set_defaults
from mindspeed_cp.patches.document_rule import DocumentRule
from mindspeed_cp.patches.dynamic_ranks import DynamicRanks
from mindspeed_cp.patches.dynamic_rules import as_documents, dynamic_blockers, num_dynamic_ranks, over_all
from mindspeed_cp.patches.help_text import escape_help
from mindspeed_cp.patches.kernel_forecast import check_kernels, kernel_names, kernel_notes
from mindspeed_cp.patches.latent_travel import latent_blockers, latent_notes
from mindspeed_cp.patches.mindspeed.translate import notes
from mindspeed_cp.patches.packing import Packing, PaddingCount
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.recomputation import refuse_kept_outputs, refuse_recomputed_biases
from mindspeed_cp.patches.unsupported import (
    WATCHING,
    difference_notes,
    note_on_windows_across_documents,
    packing_options,
    refuse_dropout_rate,
    refuse_lost_documents,
    refuse_mask_beside_window,
    refuse_unloadable_optimizer,
    refuse_unwatched_scores,
    unsupported,
)
from mindspeed_cp.patching import Patch, bind_by_name

ARGUMENTS = "megatron.training.arguments"
INITIALIZE = "megatron.training.initialize"


def argument_patches(plugin: Plugin, use_cpu: Callable[[], None]) -> tuple[Patch, ...]:
    """Patches of megatron.training.arguments.

    use_cpu: called when the arguments ask for training on the CPU.
    """
    defaults: dict[str, object] = {}  # Of Megatron's parser, which the messages about values that nobody gave name.
    return (
        Patch(
            target=f"{ARGUMENTS}:add_megatron_arguments",
            kind="wrap",
            function=functools.partial(_wrap_add, defaults),
            parameters=("parser",),
            needs=("megatron.training",),
            why="The context-parallel flags have to be known wherever Megatron's are.",
            remove_when="Never: these are the plugin's own flags.",
        ),
        *(
            Patch(
                target=f"{ARGUMENTS}:parse_args",
                kind="wrap",
                function=_wrap_parse,
                parameters=("extra_args_provider", "ignore_unknown_args"),
                aliases=aliases,
                needs=("megatron.training",),
                versions=versions,
                why="MindSpeed's flags become Megatron's before they are parsed; all that stands in the way is said.",
                remove_when="Never: MindSpeed's flags are not Megatron's.",
            )
            # Before 0.18 it is initialize_megatron that parses and validates.
            for versions, aliases in (("<0.18", (f"{INITIALIZE}:parse_args",)), (">=0.18", ()))
        ),
        *(
            Patch(
                target=f"{ARGUMENTS}:validate_args",
                kind="wrap",
                function=functools.partial(_wrap_validate, plugin, use_cpu, defaults),
                parameters=("args",),
                aliases=aliases,
                needs=("megatron.training",),
                versions=versions,
                why="Each rule is checked right after parsing, before any process group exists.",
                remove_when="Never: these are the plugin's own flags.",
            )
            # Before 0.18 it is initialize_megatron that parses and validates.
            for versions, aliases in (("<0.18", (f"{INITIALIZE}:validate_args",)), (">=0.18", ()))
        ),
        Patch(
            target=f"{INITIALIZE}:initialize_megatron",
            kind="wrap",
            function=_wrap_initialize,
            parameters=("allow_no_cuda",),
            aliases=("megatron.training:initialize_megatron", "megatron.training.training:initialize_megatron"),
            needs=("megatron.training",),
            why=(
                "It asserts that CUDA is available, before 0.18 even before it parses the flags. The patch of "
                "validate_args refuses a missing accelerator instead, unless the flags ask for the CPU."
            ),
            remove_when="pretrain passes allow_no_cuda on.",
        ),
    )


def _wrap_add(defaults: dict[str, object], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_megatron_arguments(*args: Any, **kwargs: Any) -> Any:
        parser = original(*args, **kwargs)
        defaults.update(_defaults_of(parser))
        with _ends_the_program():
            add_context_parallel_arguments(parser)
        _add_document_arguments(parser)
        set_defaults(parser)
        mark_default(parser)
        return parser

    return add_megatron_arguments


def _wrap_validate(
    plugin: Plugin, use_cpu: Callable[[], None], defaults: Mapping[str, object], original: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_args(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        with _ends_the_program():
            found = settled(args, defaults, at_start=True)
            if asks_for_cpu(args.distributed_backend):
                use_cpu()
        with _without_transformer_engines_rules(args, found.config), equal_lengths(args, found.config):
            result = original(args, *rest, **kwargs)
        with _ends_the_program():
            refuse_lost_documents(args, found.config, _release())
            refuse_unloadable_optimizer(args, found.config)
        _configure(plugin, args, found)
        if plugin.layer_document_rule is not None or getattr(args, "sft", False):
            # Documents are found in the tokens, and not in a mask; the data set of --sft asserts that none is made.
            args.create_attention_mask_in_dataloader = False
        if int(os.environ.get("RANK", "0")) == 0:
            for line in found.start_lines(args):
                print(line, flush=True)
            for sentence in notes_on_arguments(args, found.dynamic or found.config, defaults):
                warnings.warn(sentence, stacklevel=2)
        return result

    return validate_args


def _configure(plugin: Plugin, args: argparse.Namespace, found: "Settled") -> None:
    """Hand the plugin what the flags say."""
    plugin.config, plugin.seed = found.config, args.seed
    plugin.dynamic = None if found.dynamic is None else DynamicRanks(found.dynamic)
    plugin.document_rule = _document_rule(args)
    plugin.apart_by = _apart_by(args)
    plugin.length = length_of(args, found.config)
    plugin.packing = Packing(args.packed_sequence_layout)
    is_packed = found.dynamic is None and packing_options(args)
    plugin.padding = PaddingCount(args.log_interval) if is_packed else None


@contextmanager
def _ends_the_program() -> Iterator[None]:
    """Within it a rule that is broken ends the program as a wrong flag does, see `_exit_with`."""
    try:
        yield
    except ConfigurationError as error:
        _exit_with(error)


def _wrap_parse(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        named = bind_by_name(original, args, kwargs)
        add_others = named["extra_args_provider"]
        as_given = sys.argv

        def look_before_parsing(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            # All flags have been added now, and sys.argv is parsed next.
            parser = parser if add_others is None else add_others(parser)
            sys.argv = [as_given[0], *_understand(as_given[1:], parser, ignore_unknown=named["ignore_unknown_args"])]
            return parser

        try:
            return original(**{**named, "extra_args_provider": look_before_parsing})
        finally:
            sys.argv = as_given

    return parse_args


def _understand(argv: list[str], parser: argparse.ArgumentParser, *, ignore_unknown: bool) -> Sequence[str]:
    """The command line without MindSpeed's flags. Ends the program where something stands in the way of it."""
    if {"-h", "--help"} & {*argv}:
        escape_help(parser)
        return argv
    found = examine(argv, parser, ignore_unknown=ignore_unknown)
    if found.blockers:
        # Rules alone are left to validate_args, which knows what a checkpoint says.
        beside = _rules_broken(found.args, int(os.environ.get("WORLD_SIZE", "1")), _defaults_of(parser), at_start=True)
        _exit_with(ConfigurationError(*(each.sentence for each in (*found.blockers, *beside))))
    if int(os.environ.get("RANK", "0")) == 0:
        for sentence in (*notes(found.findings), *note_on_defaults(parser, argv)):
            warnings.warn(sentence, stacklevel=2)
    return found.argv


def examine_command_line(
    argv: Sequence[str],
    parser: argparse.ArgumentParser,
    *,
    num_ranks: int | None = None,
    unknown: Collection[str] = (),
) -> Examination:
    """All that there is to say of a command line before it runs, without side effects.

    parser: Megatron's, patched, with all flags added. num_ranks: ranks that it is to run on, where that is known.
    unknown: arguments whose values are not known; rules that read one say nothing.
    """
    found = examine(argv, parser)
    if unknown and found.args is not None:
        found = found._replace(args=PartialArguments(found.args, unknown))
    return found._replace(blockers=(*found.blockers, *_rules_broken(found.args, num_ranks, _defaults_of(parser))))


def notes_on_command_line(found: Examination, argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """What the first rank would say of `argv` when it starts, beside what is said of MindSpeed's flags."""
    said, defaults = note_on_defaults(parser, argv), _defaults_of(parser)
    settled = None if found.args is None else _examine_arguments(found.args, defaults)[0]
    if settled is None or found.args is None:
        return said
    try:
        start = settled.start_lines(found.args) if _knows_inner_ring(found.args) else []
        return [*said, *start, *notes_on_arguments(found.args, settled.dynamic or settled.config, defaults)]
    except UnknownValueError:
        return said


def _defaults_of(parser: argparse.ArgumentParser) -> dict[str, object]:
    """What the parser takes for options that nobody gives."""
    return {action.dest: parser.get_default(action.dest) for action in parser._actions}


def _rules_broken(
    args: argparse.Namespace | None,
    num_ranks: int | None,
    defaults: Mapping[str, object],
    *,
    at_start: bool = False,
) -> list[Blocker]:
    """The rules that parsed arguments break; none where there are none, or others may take their place later."""
    if args is None or "yaml_cfg" not in args or args.yaml_cfg is not None or args.use_checkpoint_args:
        return []
    args.world_size = num_ranks
    _, blockers = _examine_arguments(args, defaults, at_start=at_start)
    return blockers


def _wrap_initialize(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        named = bind_by_name(original, args, kwargs)
        named["allow_no_cuda"] = True
        return original(**named)

    return initialize_megatron


def add_context_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of ContextParallelConfig that Megatron does not have.

    Raises ConfigurationError where one is there already.
    """
    own = [option for option in fields(ContextParallelConfig) if option.name != "context_parallel_size"]
    if taken := [name for option in own if (name := flag(option.name)) in parser._option_string_actions]:
        raise ConfigurationError(
            f"{', '.join(taken)}: another plugin has added them to Megatron's parser already; "
            f"import either mindspeed_cp or that one (MindSpeed?), not both."
        )
    group = parser.add_argument_group(title="context parallel attention (mindspeed_cp)")
    hints = typing.get_type_hints(ContextParallelConfig)
    for option in own:
        group.add_argument(flag(option.name), **_argparse_options(option, hints[option.name]))


def _add_document_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(title="documents within a sequence (mindspeed_cp)")
    group.add_argument(
        "--fix-sub-seq-length",
        type=int,
        default=-1,
        help="With --reset-attention-mask: every document has so many tokens, whatever the data says, the last of a "
        "sequence what remains. 0 or less, or above --seq-length: documents are those of the data.",
    )
    group.add_argument(
        "--packed-sequence-layout",
        choices=["zigzag_by_document", "balanced"],
        default="zigzag_by_document",
        help="How packed streams (--sft, --dataloader-inter-document-masking) are dealt to the context-parallel ranks: "
        "an early and a late stretch of each document, or documents whole or cut, so that all compute as much.",
    )


def _release() -> str:
    from megatron.core import __version__

    return str(__version__)


def _document_length(args: argparse.Namespace) -> int | None:
    """Tokens of each document, where the flags say how many."""
    length: int = args.fix_sub_seq_length
    return length if args.reset_attention_mask and 0 < length <= (args.seq_length or 0) else None


def _document_rule(args: argparse.Namespace) -> DocumentRule | None:
    """How documents are found in the data; None where it is nothing to attention."""
    if not args.reset_attention_mask:
        return None
    return DocumentRule(positions_restart=args.reset_position_ids, length=_document_length(args))


def _apart_by(args: argparse.Namespace) -> str | None:
    """The flag that keeps documents apart."""
    if args.reset_attention_mask:
        return flag("reset_attention_mask")
    return next(map(flag, packing_options(args)), None)


def _ineffective_document_flags(args: argparse.Namespace) -> list[str]:
    if args.fix_sub_seq_length <= 0 or _document_length(args) is not None:
        return []
    reason = "it is above --seq-length" if args.reset_attention_mask else "it needs --reset-attention-mask"
    return [f"--fix-sub-seq-length {args.fix_sub_seq_length} has no effect: {reason}."]


def _argparse_options(option: "Field[Any]", hint: Any) -> dict[str, Any]:
    default, text = option.default, option.metadata["help"]
    if option.name == "context_parallel_algo":  # Where none is named, one is chosen.
        default = None
        text += " By default what --cp-comm-type asks for, else Ulysses where the heads allow it, a hybrid or the ring."
    shared = {"help": text, "default": default}
    if hint is bool:
        return {**shared, "action": "store_true"}
    if option.name in CHOICES:
        meanings = {"type": _algorithm} if option.name == "context_parallel_algo" else {}
        return {**shared, **meanings, "choices": CHOICES[option.name]}
    if typing.get_origin(hint) is tuple:
        return {**shared, "nargs": "+", "choices": KERNELS.names}
    return {**shared, "type": int}


def _algorithm(text: str) -> str:
    """A value of --context-parallel-algo: argparse says which there are, and not what they mean."""
    if text not in CHOICES["context_parallel_algo"]:
        raise argparse.ArgumentTypeError(
            f"{text} is unknown; use ulysses_cp_algo, megatron_cp_algo (the ring and the double ring), hybrid_cp_algo "
            f"(Ulysses inside, a ring outside) or kvallgather_cp_algo (all K/V gathered at once)"
        )
    return text


class Settled(NamedTuple):
    """The configuration that parsed arguments describe, and why it has its algorithm where they name none.

    dynamic: of a document that has all ranks, where each document has ranks of its own.
    """

    config: ContextParallelConfig
    choice: Choice | None
    dynamic: ContextParallelConfig | None = None

    def start_lines(self, args: argparse.Namespace) -> list[str]:
        """What a job says at its start of how its attention is computed; nothing where it is Megatron's own."""
        if self.dynamic is not None:
            return [dynamic_start_line(self.dynamic, self.choice, kernel_names(args, self.dynamic, _device(args)))]
        if self.config.context_parallel_size == 1:
            return []
        return [start_line(self.config, self.choice, kernel_names(args, self.config, _device(args)))]


def settled(
    args: argparse.Namespace, defaults: Mapping[str, object] = MappingProxyType({}), *, at_start: bool = False
) -> Settled:
    """The configuration that parsed arguments describe; the algorithm that was chosen is written into them.

    defaults: see unsupported. at_start: whether the job starts on this machine now.

    Raises ConfigurationError with all rules that they break.
    """
    found, blockers = _examine_arguments(args, defaults, at_start=at_start)
    raise_for(blockers)
    assert found is not None, "there is a configuration, or a rule that it breaks"
    args.context_parallel_algo = found.config.context_parallel_algo
    args.ulysses_degree_in_cp = found.config.ulysses_degree_in_cp
    return found


def _examine_arguments(
    args: argparse.Namespace, defaults: Mapping[str, object] = MappingProxyType({}), *, at_start: bool = False
) -> tuple[Settled | None, list[Blocker]]:
    """The configuration that parsed arguments describe, and all that stands in its way; None where it has no form.

    at_start: whether the job starts on this machine now.
    """
    if broken := _broken_sizes(args):
        return None, broken
    of_ranks = found_by(
        lambda: _check_world_size(args), lambda: _check_connections(args), lambda: check_transformer_impl(args)
    )
    if at_start:
        of_ranks += found_by(lambda: asks_for_cpu(args.distributed_backend))
    number = num_dynamic_ranks(args)
    of_options = found_by(
        lambda: raise_for(unsupported(none_for_unknown(args), args.context_parallel_size, defaults)),
        lambda: raise_for(dynamic_blockers(none_for_unknown(args), defaults)),
    )
    try:
        values = _configured(args)
        choice = choose_algorithm(args, number or args.context_parallel_size)
        if choice is not None:
            values |= {"context_parallel_algo": choice.algorithm, "ulysses_degree_in_cp": choice.degree}
        elif args.context_parallel_algo is None:
            del values["context_parallel_algo"]
        config = ContextParallelConfig(**values)
        dynamic = None if number is None else over_all(config, number)
    except ConfigurationError as error:
        return None, [*blockers_of(error), *of_options, *of_ranks]
    except UnknownValueError:
        return None, [*of_options, *of_ranks]
    if dynamic is not None:
        of_model = found_by(
            lambda: _check_model_over_all(args, dynamic),
            lambda: check_kernels(args, dynamic, _device(args)),
            lambda: refuse_unloadable_optimizer(args, config),
            lambda: refuse_unwatched_scores(args, dynamic),
            lambda: refuse_recomputed_biases(none_for_unknown(args), dynamic),
            lambda: refuse_kept_outputs(none_for_unknown(args), dynamic),
        )
        return Settled(config, choice, dynamic), [*of_options, *of_model, *of_ranks]
    of_model = found_by(
        lambda: refuse_length(none_for_unknown(args), config),
        lambda: _check_model(args, config),
        lambda: raise_for(latent_blockers(args, config)),
        lambda: check_kernels(args, config, _device(args)),
        lambda: refuse_lost_documents(args, config, _release()),
        lambda: refuse_unloadable_optimizer(args, config),
        lambda: refuse_unwatched_scores(args, config),
        lambda: refuse_dropout_rate(args, config),
        lambda: refuse_mask_beside_window(args, config),
        lambda: refuse_recomputed_biases(none_for_unknown(args), config),
        lambda: refuse_kept_outputs(none_for_unknown(args), config),
    )
    return Settled(config, choice), [*of_options, *of_model, *of_ranks]


def _knows_inner_ring(args: argparse.Namespace) -> bool:
    return none_for_unknown(args).cp_window_size is not None


def _configured(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a configuration, as parsed arguments have them."""
    names = [option.name for option in fields(ContextParallelConfig)]
    if not _knows_inner_ring(args):
        # No rule reads it but those about itself, which say nothing of the default.
        names.remove("cp_window_size")
    values: dict[str, Any] = {name: getattr(args, name) for name in names}
    values["context_parallel_kernels"] = tuple(values["context_parallel_kernels"])
    return values


_SIZES = (
    *("context_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_attention_heads"),
    *("num_query_groups", "hidden_size", "kv_channels", "seq_length", "encoder_seq_length"),
)


def _broken_sizes(args: argparse.Namespace) -> list[Blocker]:
    """Sizes below 1, with which no other rule can be looked at."""
    sizes = none_for_unknown(args)
    given = {flag(name): getattr(sizes, name) for name in _SIZES}
    return [
        Blocker(name, f"{name} {value} is below 1; use 1 or more.")
        for name, value in given.items()
        if value is not None and value < 1
    ]


def _check_model(args: argparse.Namespace, config: ContextParallelConfig) -> None:
    if args.num_attention_heads is None:
        return
    config.check_model(
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        num_layers=args.num_layers,
    )


def _check_model_over_all(args: argparse.Namespace, dynamic: ContextParallelConfig) -> None:
    try:
        _check_model(args, dynamic)
    except ConfigurationError as error:
        raise as_documents(error, dynamic.context_parallel_size) from None


def notes_on_arguments(
    args: argparse.Namespace, config: ContextParallelConfig, defaults: Mapping[str, object]
) -> list[str]:
    """A sentence for each flag that has no effect, or another one than with one rank, and for slow kernels."""
    return [
        *config.ineffective_flags(),
        *_ineffective_megatron_flags(args, config),
        *_ineffective_document_flags(args),
        *latent_notes(args, config),
        *difference_notes(args, config, defaults),
        *note_on_windows_across_documents(args, config),
        *kernel_notes(args, config, _device(args)),
    ]


def _ineffective_megatron_flags(args: argparse.Namespace, config: ContextParallelConfig) -> list[str]:
    """A sentence for each flag of Megatron's that is set and chooses among algorithms that are not in force."""
    if config.context_parallel_size == 1:
        return []
    two_levels = args.cp_comm_type is not None and "a2a+p2p" in args.cp_comm_type
    given = {
        "hierarchical_context_parallel_sizes": args.hierarchical_context_parallel_sizes is not None and not two_levels,
        "attention_backend": args.attention_backend.name != "auto",
        "flash_attention_version": getattr(args, "flash_attention_version", None) is not None,
    }
    ours = "--context-parallel-algo and --context-parallel-kernels are in force"
    return [f"{flag(name)} has no effect: it is TransformerEngine's, and {ours}." for name in given if given[name]]


@contextmanager
def _without_transformer_engines_rules(args: argparse.Namespace, config: ContextParallelConfig) -> Iterator[None]:
    """Within it Megatron does not ask for the TransformerEngine that would find the largest scores: they are ours."""
    ours = config.computes_attention or args.transformer_impl == "local"
    found = {name: getattr(args, name) for name in WATCHING if getattr(args, name, False)} if ours else {}
    vars(args).update(dict.fromkeys(found, False))
    yield
    vars(args).update(found)


def _device(args: argparse.Namespace) -> str | None:
    """Where attention will be computed; None where that takes an accelerator, and this machine has none."""
    return accelerator() or ("cpu" if args.distributed_backend == "gloo" else None)


def asks_for_cpu(distributed_backend: str) -> bool:
    """Whether training is to run on the CPU: the user said gloo, and there is no accelerator.

    Raises ConfigurationError where there is none and the user did not say so.
    """
    if accelerator() is not None:
        return False
    if distributed_backend != "gloo":
        raise ConfigurationError(
            f"--distributed-backend {distributed_backend} needs an accelerator, and neither torch.cuda nor torch.npu "
            f"finds one; use --distributed-backend gloo to train on the CPU."
        )
    return True


def _check_world_size(args: argparse.Namespace) -> None:
    """Say before Megatron does, with a way out, that the ranks cannot be split as configured."""
    names = ("context_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
    size, *others = (getattr(args, name) for name in names)
    ranks, beside = getattr(args, "world_size", None), math.prod(others)
    if size == 1 or ranks is None or ranks % (size * beside) == 0:
        return
    spelled = " * ".join(f"{flag(name)} {getattr(args, name)}" for name in names)
    fitting = [] if ranks % beside else divisors(ranks // beside)
    sizes = f"a --context-parallel-size of {or_list(fitting)}, or " if fitting else ""
    needed = size * beside
    raise ConfigurationError(
        f"{spelled} = {needed} does not divide the {ranks} ranks; use {sizes}a multiple of {needed} ranks."
    )


def _check_connections(args: argparse.Namespace) -> None:
    """Say before Megatron does, in one line, that it wants CUDA_DEVICE_MAX_CONNECTIONS=1."""
    sizes = {
        name: getattr(args, name)
        for name in ("context_parallel_size", "tensor_model_parallel_size")
        if getattr(args, name) > 1
    }
    if not sizes or os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1" or not _wants_one_connection(args):
        return
    spelled = " ".join(f"{flag(name)} {size}" for name, size in sizes.items())
    raise ConfigurationError(
        f"{spelled}: Megatron needs the environment variable CUDA_DEVICE_MAX_CONNECTIONS set to 1 here; "
        f"export CUDA_DEVICE_MAX_CONNECTIONS=1."
    )


def _wants_one_connection(args: argparse.Namespace) -> bool:
    """Whether Megatron will ask for it: not on Blackwell GPUs, nor beside features that need more connections."""
    if any(getattr(args, name, False) for name in ("use_torch_fsdp2", "use_megatron_fsdp")):
        return False
    if getattr(args, "overlap_moe_expert_parallel_comm", False):
        return False
    return accelerator() != "cuda" or torch.cuda.get_device_properties(0).major < 10


def _exit_with(error: Exception) -> typing.NoReturn:
    """End the program as argparse does for a wrong argument, without its usage: on stderr, status 2, no traceback."""
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)
