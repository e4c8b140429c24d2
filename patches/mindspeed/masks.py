"""Who sees whom, and how far: the attention operator's kinds of mask, windows, and ALiBi.

Source: Ascend/MindSpeed, mindspeed/core/transformer/flash_attention and mindspeed/core/context_parallel;
Ascend/MindSpeed-LLM, mindspeed_llm/core/transformer/custom_dot_product_attention.py and
tasks/models/transformer/transformer_layer.py. What a mode lets be seen is said by the operator, npu_fusion_attention.
"""

from mindspeed_cp.patches.mindspeed.record import CommandLine, Disposition, Record, Rule, Ruling, noted

_MODE, _BEHIND, _AHEAD, _SLIDING = "--sparse-mode", "--pre-tockens", "--next-tockens", "--sliding-window"
_DEFAULT, _BAND = 0, 4
_ALL = 1_048_576
"""How far back attention reaches where nothing is said of it."""
_AS_MASK_TYPE = {
    _DEFAULT: "the whole mask: --attention-mask-type says which",
    1: "the whole mask: --attention-mask-type says which",
    2: "causal: --attention-mask-type says who sees whom",
    3: "causal, as there are as many keys as queries: --attention-mask-type says who sees whom",
    7: "causal within each document, which --reset-attention-mask keeps apart",
    8: "causal within each document, which --reset-attention-mask keeps apart",
}
_PREFIXES = (5, 6)
_GENERAL = ("--attention-mask-type", "general")


def _mode(line: CommandLine) -> int | None:
    return line.whole(_MODE, _DEFAULT)


def _length(line: CommandLine) -> int | None:
    # Two names of one thing, of which one is given.
    return line.whole("--seq-length", line.whole("--encoder-seq-length"))


def _reads_window(line: CommandLine) -> bool:
    """Whether MindSpeed's mask is cut by the reach, or the mode says that it is to be."""
    if _mode(line) != _DEFAULT:
        return _mode(line) == _BAND
    # Flash attention, without which there is no context parallelism, takes a compressed mask of mode 2 instead.
    flash = line.has("--use-flash-attn") or line.has("--use-fusion-attn-v2")
    return not flash and line.whole("--context-parallel-size", 1) == 1


def _sparse_mode(value: str, line: CommandLine) -> Ruling:
    mode = int(value)
    if mode in _PREFIXES:
        return Ruling(
            Disposition.TRANSLATED,
            "MindSpeed gives the operator no prefix and ends there; here it is that of the batch's mask, and where the "
            "batch carries none attention is causal",
            _GENERAL,
            differs=True,
        )
    if mode == _BAND:
        return _window(_MODE, line)
    if mode not in _AS_MASK_TYPE:
        return Ruling(Disposition.REFUSED, "MindSpeed has no such mode; use 0 to 8")
    return Ruling(Disposition.NOTED, _AS_MASK_TYPE[mode])


def _reach(name: str) -> Rule:
    def rule(value: str, line: CommandLine) -> Ruling:
        if _reads_window(line):
            return _window(name, line)
        length = _length(line)
        if int(value) >= 0 and (name == _AHEAD or (length is not None and int(value) >= length - 1)):
            return Ruling(Disposition.NOTED, "the mask alone says who sees whom")
        return Ruling(
            Disposition.NOTED,
            f"MindSpeed does not read it with {_MODE} {_mode(line)}, and nor is it read here; a window is "
            f"{_MODE} {_BAND}, or Megatron's --window-size",
            differs=True,
        )

    return rule


def _window(name: str, line: CommandLine) -> Ruling:
    """The operator's band: a query sees so many keys before its own and behind it. Said by the first flag of it."""
    is_band = _mode(line) == _BAND
    given = [flag for flag in (*[_MODE] * is_band, _BEHIND, _AHEAD) if line.has(flag)]
    behind, ahead, length = line.whole(_BEHIND, _ALL), line.whole(_AHEAD, 0), _length(line)
    if behind is None or ahead is None:
        return Ruling(Disposition.NOTED, "the other flags of its window are no numbers")
    if line.has(_SLIDING):
        return Ruling(Disposition.NOTED, f"{_SLIDING} says how far attention reaches")
    for flag, tokens in ((_BEHIND, behind), (_AHEAD, ahead)):
        if tokens < 0:
            reason = "it hides each token from itself; use 0 or more"
            return Ruling(Disposition.REFUSED, reason) if name == flag else Ruling(Disposition.NOTED, f"with {flag}")
    if ahead == 0 and length is not None and behind >= length - 1:
        return Ruling(Disposition.NOTED, "it reaches to the start of every sequence: attention is causal")
    if name != given[0]:
        return Ruling(Disposition.NOTED, f"with {given[0]}")
    there = "; MindSpeed computes causal attention there" * is_band
    return Ruling(
        Disposition.TRANSLATED,
        f"a query sees {behind} tokens before its own and {ahead} behind it{there}",
        ("--window-size", f"{behind},{ahead}"),
        (_BEHIND, _AHEAD),
        differs=is_band,
    )


def _sliding(value: str, line: CommandLine) -> Ruling:
    behind, length = int(value), _length(line)
    if behind < 0:
        return Ruling(Disposition.REFUSED, "it is a number of tokens before a query's own; use 0 or more")
    if length is not None and behind >= length:
        return Ruling(Disposition.NOTED, "it reaches to the start of every sequence")
    return Ruling(
        Disposition.TRANSLATED, f"a query sees {behind} tokens before its own", ("--window-size", f"{behind},0")
    )


def _interleaved(value: str, line: CommandLine) -> Ruling:
    tokens = int(value)
    if tokens < 1:
        return Ruling(Disposition.REFUSED, "a query sees its own token at least; use 1 or more")
    return Ruling(
        Disposition.TRANSLATED,
        f"in every other layer, from the first on, a query sees {tokens} tokens; MindSpeed has that only in layers "
        f"that are given a mask, which context parallelism gives to none",
        ("--window-size", f"{tokens - 1},0", "--window-attn-skip-freq", "2"),
        differs=True,
    )


_ALIBI = ("--position-embedding-type", "alibi")
_OPERATOR = "--alibi-fusion-attn-type"


def _has_alibi(line: CommandLine) -> bool:
    return line.text(_ALIBI[0]) == _ALIBI[1]


def _position_embedding(value: str, line: CommandLine) -> Ruling:
    sentence = "scores fall with the distance, and there is no other position embedding"
    differs = not line.has(_OPERATOR)
    if differs:
        sentence += f"; MindSpeed without MindSpeed-LLM leaves both out where {_OPERATOR} is not given"
    return Ruling(Disposition.TRANSLATED, sentence, ("--position-embedding-type", "none", "--use-alibi"), (), differs)


def _alibi_operator(value: str, line: CommandLine) -> Ruling:
    if int(value) not in (0, 2):
        return Ruling(Disposition.REFUSED, "MindSpeed has 0 and 2; use one of them")
    if _has_alibi(line):
        return Ruling(Disposition.NOTED, "one way of adding it, with the same results")
    return Ruling(
        Disposition.NOTED,
        "without --position-embedding-type alibi MindSpeed adds ALiBi under context parallelism alone, and it is not "
        "added here; --use-alibi adds it beside any position embedding",
        differs=True,
    )


def _opposite(value: str, line: CommandLine) -> Ruling:
    if line.text(_GENERAL[0]) != _GENERAL[1]:
        return Ruling(Disposition.NOTED, "it is about later keys, which no query sees")
    return Ruling(
        Disposition.NOTED,
        "in MindSpeed the scores of later keys rise with their distance, and here they fall as those of earlier ones",
        differs=True,
    )


MASKS = (
    Record(
        _MODE,
        "N",
        "the attention operator's kind of mask",
        Disposition.NOTED,
        "4 is a window, Megatron's --window-size, of --pre-tockens and --next-tockens; 5 and 6: --attention-mask-type "
        "general, and the prefix is that of the batch's mask; 0 to 3, 7 and 8 noted, --attention-mask-type and "
        "--reset-attention-mask say who sees whom",
        _sparse_mode,
    ),
    Record(
        _BEHIND,
        "N",
        "how far back attention reaches",
        Disposition.NOTED,
        "the window's tokens before a query's own with --sparse-mode 4, and at CP = 1 without flash attention; else "
        "not read, there as here",
        _reach(_BEHIND),
    ),
    Record(
        _AHEAD,
        "N",
        "how far ahead attention reaches",
        Disposition.NOTED,
        "the window's tokens behind a query's own, as --pre-tockens",
        _reach(_AHEAD),
    ),
    Record(
        _SLIDING,
        "N",
        "sliding windows",
        Disposition.TRANSLATED,
        "Megatron's --window-size, so many tokens before a query's own; noted where it reaches to the start",
        _sliding,
    ),
    Record(
        "--interleave-sliding-window",
        "N",
        "sliding windows in every other layer",
        Disposition.TRANSLATED,
        "Megatron's --window-size, so many tokens with a query's own, and --window-attn-skip-freq 2",
        _interleaved,
    ),
    *noted(
        "sliding windows of DeepSeek-V4's attention",
        "it belongs to --position-embedding-type deepseek4, which is refused",
        "--sliding-window-size N",
    ),
    Record(
        _OPERATOR,
        "N",
        "which operator adds attention's bias by distance",
        Disposition.NOTED,
        "one way of adding it; without --position-embedding-type alibi it is not added here, --use-alibi does",
        _alibi_operator,
    ),
    Record(
        "--alibi-diagonal-opposite",
        "",
        "the sign of the bias of later keys",
        Disposition.NOTED,
        "under a causal mask there are none; under a general one their scores fall here, and there they rise",
        _opposite,
    ),
    *noted(
        "how the bias by distance and its mask are laid out",
        "the same probabilities; here without rounding the bias to the model's type",
        """
        --square-alibi-mask
        --fill-neg-inf
        """,
    ),
)

MASKS_VALUES = (
    Record(
        *_ALIBI,
        "attention biased by distance",
        Disposition.TRANSLATED,
        "--position-embedding-type none with --use-alibi",
        _position_embedding,
    ),
)
