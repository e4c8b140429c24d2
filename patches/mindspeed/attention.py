"""Attention, its context parallelism and rotary embedding; who sees whom is in masks.

Source: Ascend/MindSpeed, docs/zh/features and mindspeed/features_manager/{context_parallel,transformer};
Ascend/MindSpeed-LLM, mindspeed_llm/core/models/common/embeddings/rotary_pos_embedding.py and
tasks/models/transformer/mla_dot_product_attention.py.
"""

from mindspeed_cp.patches.mindspeed.record import (
    CommandLine,
    Disposition,
    Record,
    Rule,
    Ruling,
    noted,
    records,
    refused,
    spelled_otherwise,
)


def _algorithm(ours: str) -> Rule:
    def rule(value: str, line: CommandLine) -> Ruling:
        return Ruling(
            Disposition.TRANSLATED, "the same results, in the order of the ranks", ("--context-parallel-algo", ours)
        )

    return rule


def _by_hand(value: str, line: CommandLine) -> Ruling:
    return Ruling(
        Disposition.NOTED,
        "its masks are set by a call of MindSpeed's, which is not here; with --attention-mask-type general the batch's "
        "mask says who sees whom, and causal attention is computed else",
        differs=True,
    )


def _shape_order(value: str, line: CommandLine) -> Ruling:
    if value == "BNSD":
        return Ruling(Disposition.TRANSLATED, "--megatron-cp-in-bnsd", ("--megatron-cp-in-bnsd",))
    return Ruling(Disposition.NOTED, "--megatron-cp-in-bnsd chooses the order")


def _mask_type(value: str, line: CommandLine) -> Ruling:
    if value == "full":
        return Ruling(
            Disposition.REFUSED,
            "it leaves out the batch's mask; use --attention-mask-type general, which takes the mask that is there",
        )
    return Ruling(Disposition.TRANSLATED, "--attention-mask-type", ("--attention-mask-type", value))


_ORIGINAL = "--rope-scaling-original-max-position-embeddings"
_YARN_ALONE = (_ORIGINAL, "--rope-scaling-mscale", "--rope-scaling-mscale-all-dim")
_SPELT_TWICE = {
    "--beta-fast": "--rope-scaling-beta-fast",
    "--beta-slow": "--rope-scaling-beta-slow",
    "--yarn-scaling-factor": "--rope-scaling-factor",
}
_LLAMA3_ALONE = ("--low-freq-factor", "--high-freq-factor", "--original-max-position-embeddings")


def _rope_scaling(value: str, line: CommandLine) -> Ruling:
    if value == "llama3":
        return _llama3(line)
    if value != "yarn":
        return Ruling(Disposition.REFUSED, f"Megatron has no {value} scaling; use llama3 or yarn, or leave it out", ())
    if not line.is_latent():
        return Ruling(
            Disposition.REFUSED,
            "without --multi-latent-attention Megatron has it from 0.19 on, spelt otherwise; use "
            "--position-embedding-type yarn with --rotary-scaling-factor and --yarn-original-max-position-embeddings",
        )
    return _latent_yarn(line)


def _llama3(line: CommandLine) -> Ruling:
    """Megatron's model builder has 1, 4 and 8192 written down, and passes no --rope-scaling-factor: it is 8."""
    built_in = {"--rope-scaling-factor": 8, **dict(zip(_LLAMA3_ALONE, (1, 4, 8192), strict=True))}
    if different := [name for name, number in built_in.items() if line.number(name) != number]:
        needed = " ".join(f"{name} {built_in[name]}" for name in different)
        return Ruling(Disposition.REFUSED, f"Megatron builds that scaling with fixed numbers; it needs {needed}")
    return Ruling(Disposition.TRANSLATED, "Megatron's --use-rope-scaling", ("--use-rope-scaling",), _LLAMA3_ALONE)


def _latent_yarn(line: CommandLine) -> Ruling:
    """The same frequencies and the same two factors on cosines and scores; three numbers have no flag of Megatron's."""
    for name, other in _SPELT_TWICE.items():
        if line.has(name) and line.has(other) and line.number(name) != line.number(other):
            both = f"{name} {line.text(name)} and {other} {line.text(other)}"
            return Ruling(Disposition.REFUSED, f"{both} are two values of one thing; leave out one of them")
    factor_name = "--yarn-scaling-factor" if line.has("--yarn-scaling-factor") else "--rope-scaling-factor"
    if not line.has(factor_name):
        return Ruling(Disposition.REFUSED, "MindSpeed's releases differ in its factor; give --rope-scaling-factor")
    if (line.number(factor_name) or 0) <= 0:
        return Ruling(Disposition.REFUSED, f"{factor_name} has to be a number above 0; give it such a one")
    fixed: dict[str, tuple[float, float | None]] = {
        _ORIGINAL: (4096, None),
        "--beta-fast": (32, line.number("--rope-scaling-beta-fast", 32)),
        "--beta-slow": (1, line.number("--rope-scaling-beta-slow", 1)),
    }
    different = [name for name, (number, default) in fixed.items() if line.number(name, default) != number]
    if different:
        needed = " ".join(f"{name} {fixed[name][0]}" for name in different)
        return Ruling(Disposition.REFUSED, f"Megatron has no flag for that; it needs {needed}")
    flags = {
        "--rope-type": "yarn",
        "--rotary-scaling-factor": line.text(factor_name),
        "--mscale": line.text("--rope-scaling-mscale", "1.0"),
        "--mscale-all-dim": line.text("--rope-scaling-mscale-all-dim", "0.0"),
    }
    return Ruling(
        Disposition.TRANSLATED,
        "Megatron's --rope-type yarn with its factors",
        tuple(word for pair in flags.items() for word in pair if word is not None),
        (*_SPELT_TWICE, *_SPELT_TWICE.values(), *_YARN_ALONE),
    )


def _of_yarn(number: int) -> Rule:
    """Megatron's own yarn has this number, and no flag for it; MindSpeed's flag of the same name sets it there."""

    def rule(value: str, line: CommandLine) -> Ruling:
        if line.text("--rope-type") == "yarn" and float(value) != number:
            return Ruling(Disposition.REFUSED, f"with --rope-type yarn Megatron has no flag for it; use {number}")
        return Ruling(Disposition.NOTED, _OF_SCALING)

    return rule


def _partial_rotary(value: str, line: CommandLine) -> Ruling:
    if float(value) == 0:
        return Ruling(Disposition.NOTED, "it is off")
    if not 0 < float(value) <= 1:
        return Ruling(Disposition.REFUSED, "it is a part of each head; use a number above 0 and up to 1")
    if line.is_latent():
        return Ruling(Disposition.REFUSED, "it has no counterpart in latent attention; leave it out")
    if line.number("--rotary-percent", 1) != 1:
        return Ruling(
            Disposition.REFUSED,
            "MindSpeed takes it of what --rotary-percent leaves; use --rotary-percent with both in one",
        )
    return Ruling(
        Disposition.TRANSLATED, "Megatron's --rotary-percent", ("--rotary-percent", value), ("--rotary-percent",)
    )


def _rotary_base(value: str, line: CommandLine) -> Ruling:
    if float(value) < 1:
        return Ruling(Disposition.REFUSED, "a rotary base is 1 or more; use a whole number")
    if float(value).is_integer():
        return Ruling(Disposition.TRANSLATED, "as a whole number", ("--rotary-base", str(int(float(value)))))
    return Ruling(Disposition.REFUSED, "Megatron takes whole numbers alone; use one")


_OF_ADAPTIVE = "it belongs to adaptive_cp_algo, whose results the ring computes without it"
_OF_SCALING = "it belongs to --rope-scaling-type"

ATTENTION = (
    *records(
        Disposition.SAME,
        "attention over context-parallel ranks",
        "the plugin's own flag",
        """
        --context-parallel-algo {ulysses_cp_algo,megatron_cp_algo,hybrid_cp_algo,kvallgather_cp_algo}
        --cp-window-size N
        --ulysses-degree-in-cp N
        --use-cp-send-recv-overlap
        --attention-mask-type {causal,general}
        --megatron-cp-in-bnsd
        --fix-sub-seq-length N
        --context-parallel-kv-cache-policy {full,half}
        --context-parallel-cache-interval N
        """,
    ),
    *noted(
        "how partial outputs are merged",
        "one way of doing it, with the same results",
        "--use-fused-ring-attention-update",
    ),
    *noted(
        "Ulysses of a larger degree than there are K/V heads",
        "Ulysses takes any number of K/V heads, and sends each once to every rank that reads it",
        """
        --use-ulysses-allgather-kv
        --kv-head-repeat-before-uly-alltoall
        """,
    ),
    *noted(
        "attention scheduled by the mask",
        _OF_ADAPTIVE,
        """
        --attention-mask-on-cpu
        --adaptive-cp-without-coarse
        --adaptive-cp-dynamic-attn-mask
        --adaptive-cp-only-reschedule
        """,
    ),
    Record(
        "--adaptive-cp-manually-set-mask-list",
        "",
        "masks that a program of one's own sets",
        Disposition.NOTED,
        "no such masks here: the batch's, with --attention-mask-type general, else causal attention",
        _by_hand,
    ),
    *noted(
        "which operator computes attention",
        "--context-parallel-kernels chooses what computes attention",
        """
        --use-flash-attn
        --use-fusion-attn-v2
        --mla-fa-without-pad
        --mla-fa-divide-qk
        --padded-base-length N
        """,
    ),
    Record(
        "--shape-order",
        "{SBH,BSH,BSND,BNSD}",
        "the order of the axes in the attention operator",
        Disposition.TRANSLATED,
        "BNSD: --megatron-cp-in-bnsd; others noted, that flag chooses the order",
        _shape_order,
    ),
    Record(
        "--cp-attention-mask-type",
        "{causal,general,full}",
        "who sees whom",
        Disposition.TRANSLATED,
        "--attention-mask-type; full is refused, it leaves out the batch's mask",
        _mask_type,
    ),
    *refused(
        "another formula for the scores",
        "Megatron's attention does not have it; leave it out",
        """
        --attn-logit-softcapping X
        --query-pre-attn-scalar N
        """,
    ),
    Record(
        "--rope-scaling-type",
        "{llama3,yarn,longrope,plm}",
        "how rotary frequencies are stretched",
        Disposition.TRANSLATED,
        "llama3 with 8, 1, 4, 8192: --use-rope-scaling; yarn with latent attention and 4096, 32, 1: --rope-type yarn, "
        "--rotary-scaling-factor, --mscale, --mscale-all-dim; others refused",
        _rope_scaling,
    ),
    *(
        Record(
            name,
            values,
            "numbers of the stretched rotary frequencies",
            Disposition.NOTED,
            f"noted, {_OF_SCALING}; with --rope-type yarn refused but for {number}",
            _of_yarn(number),
        )
        for name, values, number in (
            ("--original-max-position-embeddings", "X", 4096),
            ("--beta-fast", "N", 32),
            ("--beta-slow", "N", 1),
        )
    ),
    *noted(
        "numbers of the stretched rotary frequencies",
        _OF_SCALING,
        """
        --rope-scaling-original-max-position-embeddings N
        --rope-scaling-beta-fast N
        --rope-scaling-beta-slow N
        --rope-scaling-mscale X
        --rope-scaling-mscale-all-dim X
        --yarn-scaling-factor X
        --low-freq-factor X
        --high-freq-factor X
        --longrope-freqs-type {mul,outer}
        --long-factor S
        --short-factor S
        --long-mscale X
        --short-mscale X
        """,
    ),
    *refused(
        "the rotary base grows with the length", "Megatron does not have it; leave it out", "--dynamic-factor X =1"
    ),
    *spelled_otherwise(
        "rotates neighbours in pairs, as GLM does",
        {"--use-glm-rope": "--rotary-interleaved", "--use-partial-rope": "--rotary-interleaved"},
    ),
    Record(
        "--partial-rotary-factor",
        "X",
        "the part of each head that is rotated",
        Disposition.TRANSLATED,
        "--rotary-percent; 0 noted, it is off; refused with latent attention, and with a --rotary-percent beside it",
        _partial_rotary,
    ),
)

ATTENTION_VALUES = (
    *(
        Record(
            "--context-parallel-algo",
            theirs,
            f"attention scheduled by the mask{inside}",
            Disposition.TRANSLATED,
            f"{ours}: the same results, in the order of the ranks",
            _algorithm(ours),
        )
        for theirs, ours, inside in (
            ("adaptive_cp_algo", "megatron_cp_algo", ""),
            ("hybrid_adaptive_cp_algo", "hybrid_cp_algo", ", Ulysses inside"),
        )
    ),
    *records(
        Disposition.REFUSED,
        "the rotary embedding of DeepSeek-V4",
        "Megatron does not have it; use rope",
        "--position-embedding-type deepseek4",
    ),
    Record(
        "--rotary-base",
        "X",
        "the rotary base, not written as a whole number",
        Disposition.TRANSLATED,
        "the whole number that it is; others refused",
        _rotary_base,
    ),
)
