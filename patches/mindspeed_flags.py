"""MindSpeed's flags about attention and context parallelism that are not the plugin's own.

A flag that changes nothing here is taken with a note, so that a MindSpeed user's script runs as it is; one that would
change the results is refused with the nearest thing. Names, defaults and meanings: Ascend/MindSpeed, the branches
core_r0.12.1 to core_r0.18.0, mindspeed/features_manager and docs/zh/features.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from mindspeed_cp.config import ConfigurationError


class MindSpeedFlag(NamedTuple):
    """A flag of MindSpeed's.

    name: its spelling. shape: what argparse is told of it; a flag that is not given is None or False.
    note: why it changes nothing, the end of "--name has no effect: "; empty where it is refused whenever it is set.
    refusal: what is not there and what to use instead, the end of "--name value: "; empty where it is never refused.
    is_refused: whether this value, among these arguments, is refused.
    """

    name: str
    shape: dict[str, Any]
    note: str = ""
    refusal: str = ""
    is_refused: Callable[[Any, argparse.Namespace], bool] = lambda value, args: False

    @property
    def dest(self) -> str:
        """Its name among the parsed arguments."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def disposition(self) -> str:
        """What becomes of it, in a word or three."""
        return " or ".join(word for word, sentence in (("noted", self.note), ("refused", self.refusal)) if sentence)


_SWITCH: dict[str, Any] = {"action": "store_true"}
_INTEGER: dict[str, Any] = {"type": int}
_OF_ADAPTIVE_CP = "it belongs to adaptive_cp_algo, which is not available"
_OF_ALIBI = "it belongs to --position-embedding-type alibi, which is not available"
_KERNEL = "--context-parallel-kernels chooses what computes attention"
_BAND = "sliding windows are not available yet; leave it out"

MINDSPEED_FLAGS = (
    MindSpeedFlag(
        "--use-fused-ring-attention-update",
        _SWITCH,
        note="partial outputs are merged in one way, in fp32",
    ),
    MindSpeedFlag(
        "--context-parallel-kv-cache-policy",
        {"choices": ("full", "half")},
        note="what is kept for the backward pass is not a choice; results are the same",
    ),
    MindSpeedFlag(
        "--context-parallel-cache-interval",
        _INTEGER,
        note="it belongs to --context-parallel-kv-cache-policy",
    ),
    MindSpeedFlag(
        "--use-ulysses-allgather-kv",
        _SWITCH,
        note="Ulysses sends K/V by all-to-all; results are the same",
    ),
    MindSpeedFlag("--attention-mask-on-cpu", _SWITCH, note=_OF_ADAPTIVE_CP),
    MindSpeedFlag("--adaptive-cp-without-coarse", _SWITCH, note=_OF_ADAPTIVE_CP),
    MindSpeedFlag("--adaptive-cp-dynamic-attn-mask", _SWITCH, note=_OF_ADAPTIVE_CP),
    MindSpeedFlag("--adaptive-cp-only-reschedule", _SWITCH, note=_OF_ADAPTIVE_CP),
    MindSpeedFlag("--adaptive-cp-manually-set-mask-list", _SWITCH, note=_OF_ADAPTIVE_CP),
    MindSpeedFlag("--use-flash-attn", _SWITCH, note=_KERNEL),
    MindSpeedFlag("--use-fusion-attn-v2", _SWITCH, note=_KERNEL),
    MindSpeedFlag("--shape-order", {"choices": ("SBH", "BSH", "BSND")}, note="--megatron-cp-in-bnsd chooses the order"),
    MindSpeedFlag(
        "--sparse-mode",
        _INTEGER,
        note="--attention-mask-type says who sees whom",
        refusal=(
            "bands, prefixes and unmasked attention have no mode here; use 0 or 2, or --attention-mask-type general "
            "with the batch's mask"
        ),
        is_refused=lambda mode, args: mode not in (0, 2),
    ),
    MindSpeedFlag(
        "--pre-tockens",
        _INTEGER,
        note="it reaches back to the start of every sequence",
        refusal=_BAND,
        is_refused=lambda tokens, args: tokens < (args.seq_length or 0),
    ),
    MindSpeedFlag(
        "--next-tockens",
        _INTEGER,
        note="the mask alone says what lies ahead",
        refusal=_BAND,
        is_refused=lambda tokens, args: tokens < 0,
    ),
    MindSpeedFlag("--alibi-fusion-attn-type", _INTEGER, note=_OF_ALIBI),
    MindSpeedFlag("--alibi-diagonal-opposite", _SWITCH, note=_OF_ALIBI),
    MindSpeedFlag("--square-alibi-mask", _SWITCH, note=_OF_ALIBI),
    MindSpeedFlag("--fill-neg-inf", _SWITCH, note=_OF_ALIBI),
    MindSpeedFlag(
        "--fix-sub-seq-length",
        _INTEGER,
        note="documents keep their lengths",
        refusal=(
            "documents of one given length are not available; leave it out, --reset-attention-mask takes them from the "
            "data"
        ),
        is_refused=lambda length, args: length > 0,
    ),
)
"""Those that Megatron's parser lacks are added to it; some releases have one or the other."""

_ADAPTIVE = "attention scheduled by the mask is not available; megatron_cp_algo with --attention-mask-type general"

REFUSED_VALUES: dict[str, dict[str, str]] = {
    "--context-parallel-algo": {
        "adaptive_cp_algo": f"{_ADAPTIVE} computes the same",
        "hybrid_adaptive_cp_algo": f"{_ADAPTIVE}, or hybrid_cp_algo with it, computes the same",
        "kvallgather_cp_algo": "gathering all K/V is not available yet; megatron_cp_algo computes the same",
    },
    "--position-embedding-type": {
        "alibi": "attention bias is not available yet; use rope or learned_absolute",
    },
}
"""Values that MindSpeed adds to flags which are there, and what the parser answers."""


def add_mindspeed_arguments(parser: argparse.ArgumentParser) -> None:
    """Let the parser know MindSpeed's flags, those that it lacks, and the values that it is to refuse by name."""
    group = parser.add_argument_group(title="flags of MindSpeed's (mindspeed_cp)")
    for each in MINDSPEED_FLAGS:
        if each.name not in parser._option_string_actions:
            help_text = f"MindSpeed's: {each.disposition}, {each.note or each.refusal}."
            group.add_argument(each.name, help=help_text, **each.shape)
    for option, values in REFUSED_VALUES.items():
        action = parser._option_string_actions[option]
        # Before the choices are looked at, so that the answer names the nearest thing. Both options hold text.
        action.type = functools.partial(_refuse_value, values)


def _refuse_value(values: dict[str, str], text: str) -> str:
    if text in values:
        raise argparse.ArgumentTypeError(f"{text} is MindSpeed's: {values[text]}.")
    return text


def refuse_mindspeed_flags(args: argparse.Namespace) -> None:
    """Raise ConfigurationError for the first of MindSpeed's flags whose value would change the results."""
    for each, value in _given(args):
        if each.is_refused(value, args):
            raise ConfigurationError(f"{each.name} {value}: {each.refusal}.")


def mindspeed_notes(args: argparse.Namespace) -> list[str]:
    """A sentence for each of MindSpeed's flags that is given and changes nothing."""
    return [f"{each.name} has no effect: {each.note}." for each, _ in _given(args)]


def _given(args: argparse.Namespace) -> list[tuple[MindSpeedFlag, Any]]:
    values = ((each, getattr(args, each.dest, None)) for each in MINDSPEED_FLAGS)
    return [(each, value) for each, value in values if value is not None and value is not False]
