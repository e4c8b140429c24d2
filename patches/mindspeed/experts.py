"""Mixtures of experts: sizes, layers, routers, dispatchers.

Source: Ascend/MindSpeed-LLM, mindspeed_llm/core/transformer/moe/{router,moe_utils,moe_layer}.py,
core/transformer/transformer_block.py and features_manager/{moe,arguments}; Megatron-LM, megatron/core/transformer/moe.
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

_BALANCING = "--moe-router-load-balancing-type"
_GROUPS = ("--moe-router-num-groups", "--n-group")
_GROUPS_CHOSEN = ("--moe-router-group-topk", "--topk-group")
_SCALINGS = ("--moe-router-topk-scaling-factor", "--routed-scaling-factor")


def _first_present(line: CommandLine, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if line.has(name)), None)


def _groups_differ(line: CommandLine) -> str | None:
    """Why other groups of experts would be chosen than in some of MindSpeed-LLM's releases; None where none would.

    2.0 and 2.1, and later ones with --topk-softmax-in-fp32, score a group by its two best experts; Megatron by its
    topk // group_topk best. Where all groups are chosen the score does not matter.
    """
    given = _first_present(line, _GROUPS_CHOSEN)
    if given is None:
        return None
    chosen, experts = line.whole(given), line.whole("--moe-router-topk", 2)
    if not chosen or not experts or chosen < 1:
        return f"{given} and --moe-router-topk have to be 1 or more"
    if experts // chosen == 2 or any(line.whole(name) == chosen for name in _GROUPS):
        return None
    return f"MindSpeed scores groups by 2 experts, Megatron by --moe-router-topk over {given}, {experts // chosen}"


def _in_groups(megatrons: str) -> Rule:
    def rule(value: str, line: CommandLine) -> Ruling:
        if int(value) < 1:
            return Ruling(Disposition.REFUSED, "it has to be 1 or more; give it such a number, or leave it out")
        if why := _groups_differ(line):
            return Ruling(
                Disposition.REFUSED,
                f"{why}; use a --moe-router-topk of twice the groups chosen, or Megatron's "
                f"{_GROUPS[0]} and {_GROUPS_CHOSEN[0]}",
            )
        return Ruling(Disposition.TRANSLATED, f"Megatron's {megatrons}", (megatrons, value))

    return rule


def _softmax_in_fp32(value: str, line: CommandLine) -> Ruling:
    if why := _groups_differ(line):
        return Ruling(
            Disposition.REFUSED, f"{why}; leave it out, or use a --moe-router-topk of twice the groups chosen"
        )
    return Ruling(Disposition.NOTED, "rounding alone")


def _first_dense(value: str, line: CommandLine) -> Ruling:
    """Layer i, from 0, holds experts where i >= K and --moe-layer-freq divides i."""
    layers, every = line.whole("--num-layers"), line.whole("--moe-layer-freq", 1)
    if layers is None:
        return Ruling(Disposition.REFUSED, "it needs --num-layers; give it")
    if not every:
        return Ruling(Disposition.REFUSED, "it needs a whole number as --moe-layer-freq; use 1, or leave this out")
    first = int(value)
    if not -1 <= first < layers:
        return Ruling(Disposition.REFUSED, f"--num-layers {layers} has no such layer; use 0 to {layers - 1}, or -1")
    if first == 0 and every not in (1, -1):
        return Ruling(Disposition.REFUSED, f"MindSpeed's releases differ in it with --moe-layer-freq {every}; use 1")
    pattern = [int(layer >= first and layer % every == 0) for layer in range(layers)]
    return Ruling(
        Disposition.TRANSLATED,
        "Megatron's --moe-layer-freq, layer by layer",
        ("--moe-layer-freq", _spell(pattern)),
        ("--moe-layer-freq",),
    )


def _spell(pattern: list[int]) -> str:
    """The pattern as short as people write it, where it is zeros and then ones."""
    dense = pattern.index(1) if 1 in pattern else len(pattern)
    if all(pattern):
        return "1"
    if all(pattern[dense:]):
        return f"([0]*{dense}+[1]*{len(pattern) - dense})"
    return str(pattern).replace(" ", "")


def _shared_experts(value: str, line: CommandLine) -> Ruling:
    if int(value) == 0:
        return Ruling(Disposition.NOTED, "it is off")
    if int(value) < 0:
        return Ruling(Disposition.REFUSED, "there are no fewer than 0; use 0 or more")
    names = ("--moe-ffn-hidden-size", "--moe-intermediate-size", "--ffn-hidden-size")
    name = _first_present(line, names)
    size = None if name is None else line.whole(name)
    if size is None or size < 1:
        return Ruling(Disposition.REFUSED, "it needs --moe-ffn-hidden-size; give it")
    return Ruling(
        Disposition.TRANSLATED,
        "Megatron's --moe-shared-expert-intermediate-size, as many times the expert's size",
        ("--moe-shared-expert-intermediate-size", str(int(value) * size)),
    )


def _shared_gate(value: str, line: CommandLine) -> Ruling:
    if line.number("--shared-expert-gate-output-dimension", 1) != 1:
        return Ruling(
            Disposition.REFUSED, "Megatron's gate has one output; use --shared-expert-gate-output-dimension 1"
        )
    return Ruling(Disposition.TRANSLATED, "Megatron's --moe-shared-expert-gate", ("--moe-shared-expert-gate",))


def _normalised(value: str, line: CommandLine) -> Ruling:
    """Read by aux_loss and softmax_topk alone (group_limited_greedy is refused).

    In aux_loss after scaling and dropping; in softmax_topk from 2.2 on.
    """
    balancing = line.text(_BALANCING, "aux_loss")
    if balancing == "softmax_topk":
        return Ruling(
            Disposition.REFUSED,
            f"with softmax_topk MindSpeed-LLM reads it from 2.2 on; leave it out for weights as they are, or use "
            f"{_BALANCING} none without it for weights that sum to 1",
        )
    if balancing != "aux_loss":
        return Ruling(Disposition.NOTED, f"{_BALANCING} {balancing} does not read it")
    if line.whole("--moe-router-topk", 2) == 1:
        return Ruling(Disposition.REFUSED, "of one expert it makes the weight 1, which Megatron does not; leave it out")
    if present := _first_present(line, _SCALINGS):
        return Ruling(Disposition.REFUSED, f"with aux_loss it undoes {present}; leave out that or this")
    if line.has("--moe-expert-capacity-factor"):
        return Ruling(
            Disposition.REFUSED,
            "with --moe-expert-capacity-factor it makes up for what is dropped, which Megatron does not; leave it out",
        )
    if not line.has("--moe-router-pre-softmax"):
        return Ruling(Disposition.NOTED, "the weights of the chosen experts sum to 1 in any case")
    if any(line.has(name) for name in _GROUPS):
        return Ruling(
            Disposition.REFUSED, "groups are chosen otherwise without --moe-router-pre-softmax; leave this out"
        )
    return Ruling(
        Disposition.TRANSLATED, "Megatron's router without --moe-router-pre-softmax", (), ("--moe-router-pre-softmax",)
    )


def _softmax_first(value: str, line: CommandLine) -> Ruling:
    """Softmax over all experts, then the k largest. MindSpeed-LLM scales them from 26.0 on."""
    different = ("--moe-router-enable-expert-bias", "--moe-expert-capacity-factor")
    if present := _first_present(line, different):
        return Ruling(Disposition.REFUSED, f"with {present} Megatron's router differs; leave that out")
    if present := _first_present(line, _SCALINGS):
        return Ruling(Disposition.REFUSED, f"MindSpeed's releases differ in it with {present}; leave that out")
    if line.text("--moe-router-score-function", "softmax") != "softmax":
        return Ruling(Disposition.REFUSED, "it is a softmax whatever the score function; use softmax")
    if any(line.has(name) for name in _GROUPS):
        return Ruling(Disposition.REFUSED, "it knows no groups of experts; leave out --moe-router-num-groups")
    return Ruling(
        Disposition.TRANSLATED,
        "Megatron's router without balancing, with --moe-router-pre-softmax",
        (_BALANCING, "none", "--moe-router-pre-softmax"),
        ("--moe-router-pre-softmax",),
    )


def _sequence_loss(value: str, line: CommandLine) -> Ruling:
    balancing = line.text(_BALANCING, "aux_loss")
    if balancing not in ("none", "noaux_tc") or line.number("--moe-aux-loss-coeff", 0) == 0:
        return Ruling(Disposition.NOTED, "there is no loss that it would change")
    return Ruling(Disposition.REFUSED, f"its loss is weighed otherwise than Megatron's; use {_BALANCING} seq_aux_loss")


def _dispatcher(value: str, line: CommandLine) -> Ruling:
    if line.has("--moe-expert-capacity-factor"):
        return Ruling(Disposition.REFUSED, "with --moe-expert-capacity-factor it drops other tokens; use alltoall")
    return Ruling(Disposition.TRANSLATED, "alltoall", ("--moe-token-dispatcher-type", "alltoall"))


def _jitter_off(value: str, line: CommandLine) -> Ruling:
    """Until 2.3 it switches the noise off, later it does nothing."""
    if line.number("--moe-input-jitter-eps", 0) == 0:
        return Ruling(Disposition.NOTED, "it is off")
    return Ruling(
        Disposition.REFUSED, "MindSpeed's releases differ in it with --moe-input-jitter-eps; leave out that or this"
    )


_OF_DEEPSPEED = "it belongs to --moe-model-type deepspeed_moe, which is refused"
_OTHER_ROUTER = "Megatron has no such router; use aux_loss, seq_aux_loss, global_aux_loss, sinkhorn or none"


def _model_type(value: str, line: CommandLine) -> Ruling:
    if value == "megatron_moe":
        return Ruling(Disposition.NOTED, "Megatron's mixture is the only one")
    return Ruling(Disposition.REFUSED, "Megatron's mixture is the only one; use megatron_moe")


EXPERTS = (
    *spelled_otherwise(
        "sizes and factors of a mixture of experts",
        {
            "--moe-intermediate-size N": "--moe-ffn-hidden-size",
            "--routed-scaling-factor X": "--moe-router-topk-scaling-factor",
        },
    ),
    *(
        Record(
            name,
            "N",
            "experts are chosen within the best groups of them",
            Disposition.TRANSLATED,
            f"{megatrons}; refused unless --moe-router-topk is twice the groups chosen, as releases differ",
            _in_groups(megatrons),
        )
        for name, megatrons in (("--n-group", _GROUPS[0]), ("--topk-group", _GROUPS_CHOSEN[0]))
    ),
    Record(
        "--first-k-dense-replace",
        "N",
        "the first layers have no experts",
        Disposition.TRANSLATED,
        "--moe-layer-freq, layer by layer",
        _first_dense,
    ),
    Record(
        "--n-shared-experts",
        "N",
        "experts that see all tokens",
        Disposition.TRANSLATED,
        "--moe-shared-expert-intermediate-size, as many times the expert's size; 0 noted, it is off",
        _shared_experts,
    ),
    Record(
        "--shared-expert-gate",
        "",
        "a gate on the shared experts",
        Disposition.TRANSLATED,
        "--moe-shared-expert-gate; refused where its output dimension is not 1",
        _shared_gate,
    ),
    *noted("outputs of that gate", "it belongs to --shared-expert-gate", "--shared-expert-gate-output-dimension N"),
    Record(
        "--norm-topk-prob",
        "",
        "the weights of the chosen experts sum to 1",
        Disposition.NOTED,
        "noted, they do in any case; with --moe-router-pre-softmax that is left out; refused with softmax_topk, with "
        "one expert, and where it undoes a scaling or a capacity",
        _normalised,
    ),
    Record(
        "--seq-aux",
        "",
        "a balancing loss for each sequence",
        Disposition.NOTED,
        "noted where MindSpeed does not read it; else use --moe-router-load-balancing-type seq_aux_loss",
        _sequence_loss,
    ),
    *spelled_otherwise("the router's scores in fp32", {"--router-gating-in-fp32": "--moe-router-dtype fp32"}),
    Record(
        "--topk-softmax-in-fp32",
        "",
        "where the router's weights are rounded, and how groups of experts are scored",
        Disposition.NOTED,
        "noted, rounding alone; refused where groups would be others",
        _softmax_in_fp32,
    ),
    *noted("where the router's weights are rounded", "rounding alone", "--moe-revert-type-after-topk"),
    *refused(
        "gives tokens to experts in turn, whatever the router says, to measure speed",
        "Megatron has no such router; measure with --moe-router-force-load-balancing, or leave it out",
        "--fix-router",
    ),
    *refused(
        "other routers and losses",
        "Megatron has no such router; leave it out",
        """
        --num-zero-experts N
        --n-hash-layers N =0
        --moe-device-level-aux-loss-coeff X =0
        --moe-comm-aux-loss-coeff X =0
        --use-global-aux-loss
        --moe-use-sinkhorn
        """,
    ),
    Record(
        "--input-jitter",
        "",
        "switches off noise on the router's input",
        Disposition.NOTED,
        "noted, it is off; refused with --moe-input-jitter-eps, MindSpeed's releases differ",
        _jitter_off,
    ),
    Record(
        "--moe-model-type",
        "{megatron_moe,deepspeed_moe}",
        "which mixture of experts",
        Disposition.REFUSED,
        "megatron_moe noted; deepspeed_moe is not there",
        _model_type,
    ),
    *noted(
        "DeepSpeed's mixture of experts",
        _OF_DEEPSPEED,
        """
        --expert-interval N
        --moe-train-capacity-factor X
        --moe-no-drop
        --moe-dynamic-padding
        --no-use-rts
        --noisy-gate-policy S
        --noisy_gate_policy S
        """,
    ),
)

EXPERTS_VALUES = (
    Record(
        _BALANCING,
        "softmax_topk",
        "softmax over all experts, then the largest",
        Disposition.TRANSLATED,
        "none, with --moe-router-pre-softmax; refused with bias, capacity, scaling, groups or --norm-topk-prob",
        _softmax_first,
    ),
    Record(
        _BALANCING,
        "noaux_tc",
        "no balancing loss",
        Disposition.TRANSLATED,
        "none",
        lambda value, line: Ruling(Disposition.TRANSLATED, "none", (_BALANCING, "none")),
    ),
    *records(
        Disposition.REFUSED,
        "other routers",
        _OTHER_ROUTER,
        f"""
        {_BALANCING} group_limited_greedy
        {_BALANCING} pai_megatron_aux_loss
        {_BALANCING} sparsemixer_topk
        """,
    ),
    *records(
        Disposition.REFUSED,
        "scores by the root of a softplus",
        "this Megatron does not have it; use softmax or sigmoid",
        "--moe-router-score-function sqrtsoftplus",
    ),
    *records(
        Disposition.REFUSED, "a router in fp8", "Megatron does not have it; use fp32 or fp64", "--moe-router-dtype fp8"
    ),
    Record(
        "--moe-token-dispatcher-type",
        "alltoall_seq",
        "sends tokens sequence by sequence",
        Disposition.TRANSLATED,
        "alltoall; refused with --moe-expert-capacity-factor, where it drops other tokens",
        _dispatcher,
    ),
)
