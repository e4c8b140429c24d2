"""Megatron's argument parser: what is added to it, what is looked at before it parses, and checked right after."""

import argparse
import functools
import os
import sys
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig, flag
from mindspeed_cp.patches.algorithm import mark_default
from mindspeed_cp.patches.any_length import equal_lengths, length_of
from mindspeed_cp.patches.blockers import Blocker, PartialArguments, UnknownValueError
from mindspeed_cp.patches.command_line import Examination, examine
from mindspeed_cp.patches.defaults import note_on_defaults, set_defaults
from mindspeed_cp.patches.document_rule import DocumentRule
from mindspeed_cp.patches.dynamic_ranks import DynamicRanks
from mindspeed_cp.patches.flags import add_context_parallel_arguments, add_document_arguments
from mindspeed_cp.patches.help_text import escape_help
from mindspeed_cp.patches.mindspeed.translate import notes
from mindspeed_cp.patches.packing import Packing, PaddingCount
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.rules import (
    Settled,
    asks_for_cpu,
    examine_arguments,
    fixed_document_length,
    installed_release,
    knows_inner_ring,
    notes_on_arguments,
    settled,
)
from mindspeed_cp.patches.unsupported import (
    WATCHING,
    packing_options,
    refuse_lost_documents,
    refuse_unloadable_optimizer,
)
from mindspeed_cp.patching import Patch, PatchedCall

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
            kind="around",
            function=functools.partial(_add_megatron_arguments, defaults),
            parameters=("parser",),
            needs=("megatron.training",),
            why="The context-parallel flags have to be known wherever Megatron's are.",
            remove_when="Never: these are the plugin's own flags.",
        ),
        *(
            Patch(
                target=f"{ARGUMENTS}:parse_args",
                kind="around",
                function=_parse_args,
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
                kind="around",
                function=functools.partial(_validate_args, plugin, use_cpu, defaults),
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
            kind="around",
            function=_initialize_megatron,
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


def _add_megatron_arguments(defaults: dict[str, object], call: PatchedCall) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = call.proceed()
    defaults.update(_defaults_of(parser))
    with _ends_the_program():
        add_context_parallel_arguments(parser)
    add_document_arguments(parser)
    set_defaults(parser)
    mark_default(parser)
    return parser


def _validate_args(
    plugin: Plugin, use_cpu: Callable[[], None], defaults: Mapping[str, object], call: PatchedCall
) -> Any:
    args: argparse.Namespace = call["args"]
    with _ends_the_program():
        found = settled(args, defaults, at_start=True)
        if asks_for_cpu(args.distributed_backend):
            use_cpu()
    with _without_transformer_engines_rules(args, found.config), equal_lengths(args, found.config):
        result = call.proceed()
    with _ends_the_program():
        refuse_lost_documents(args, found.config, installed_release())
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


def _configure(plugin: Plugin, args: argparse.Namespace, found: Settled) -> None:
    """Hand the plugin what the flags say."""
    is_packed = found.dynamic is None and packing_options(args)
    plugin.configure(
        found.config,
        seed=args.seed,
        packing=Packing(args.packed_sequence_layout),
        length=length_of(args, found.config),
        dynamic=None if found.dynamic is None else DynamicRanks(found.dynamic),
        document_rule=_document_rule(args),
        apart_by=_apart_by(args),
        padding=PaddingCount(args.log_interval) if is_packed else None,
    )


@contextmanager
def _ends_the_program() -> Iterator[None]:
    """Within it a rule that is broken ends the program as a wrong flag does, see `_exit_with`."""
    try:
        yield
    except ConfigurationError as error:
        _exit_with(error)


def _parse_args(call: PatchedCall) -> Any:
    add_others, as_given = call["extra_args_provider"], sys.argv

    def look_before_parsing(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        # All flags have been added now, and sys.argv is parsed next.
        parser = parser if add_others is None else add_others(parser)
        sys.argv = [as_given[0], *_understand(as_given[1:], parser, ignore_unknown=call["ignore_unknown_args"])]
        return parser

    try:
        return call.proceed(extra_args_provider=look_before_parsing)
    finally:
        sys.argv = as_given


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
    described = None if found.args is None else examine_arguments(found.args, defaults)[0]
    if described is None or found.args is None:
        return said
    try:
        start = described.start_lines(found.args) if knows_inner_ring(found.args) else []
        return [*said, *start, *notes_on_arguments(found.args, described.dynamic or described.config, defaults)]
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
    _, blockers = examine_arguments(args, defaults, at_start=at_start)
    return blockers


def _initialize_megatron(call: PatchedCall) -> Any:
    return call.proceed(allow_no_cuda=True)


def _document_rule(args: argparse.Namespace) -> DocumentRule | None:
    """How documents are found in the data; None where it is nothing to attention."""
    if not args.reset_attention_mask:
        return None
    return DocumentRule(positions_restart=args.reset_position_ids, length=fixed_document_length(args))


def _apart_by(args: argparse.Namespace) -> str | None:
    """The flag that keeps documents apart."""
    if args.reset_attention_mask:
        return flag("reset_attention_mask")
    return next(map(flag, packing_options(args)), None)


@contextmanager
def _without_transformer_engines_rules(args: argparse.Namespace, config: ContextParallelConfig) -> Iterator[None]:
    """Within it Megatron does not ask for the TransformerEngine that would find the largest scores: they are ours."""
    ours = config.computes_attention or args.transformer_impl == "local"
    found = {name: getattr(args, name) for name in WATCHING if getattr(args, name, False)} if ours else {}
    vars(args).update(dict.fromkeys(found, False))
    yield
    vars(args).update(found)


def _exit_with(error: Exception) -> typing.NoReturn:
    """End the program as argparse does for a wrong argument, without its usage: on stderr, status 2, no traceback."""
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)
