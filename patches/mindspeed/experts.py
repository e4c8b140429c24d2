"""Mixtures of experts: sizes, layers, routers, dispatchers.

Source: Ascend/MindSpeed-LLM, mindspeed_llm/core/transformer/moe/{router,moe_utils,moe_layer}.py,
core/transformer/transformer_block.py and features_manager/{moe,arguments}; Megatron-LM, megatron/core/transformer/moe.
"""

from mindspeed_cp.patches.mindspeed.record import (
    CommandLine,
    Disposition,
    Record,
    Ruling,
    noted,
    records,
    refused,
    spelled_otherwise,
)

_BALANCING = "--moe-router-load-balancing-type"
_GROUPS = ("--moe-router-num-groups", "--n-group")


def _first_dense(value: str, line: CommandLine) -> Ruling:
    """Layer i, from 0, holds experts where i >= K and --moe-layer-freq divides i."""
    layers, every = line.number("--num-layers"), line.number("--moe-layer-freq", 1)
    if layers is None:
        return Ruling(Disposition.REFUSED, "it needs --num-layers; give it")
    if not every:
        return Ruling(Disposition.REFUSED, "it needs a whole number as --moe-layer-freq; use 1")
    first = int(value)
    if first == 0 and every not in (1, -1):
        return Ruling(Disposition.REFUSED, f"MindSpeed's releases differ in it with --moe-layer-freq {every:g}; use 1")
    pattern = [int(layer >= first and layer % every == 0) for layer in range(int(layers))]
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
    names = ("--moe-ffn-hidden-size", "--moe-intermediate-size", "--ffn-hidden-size")
    size = next((line.number(name) for name in names if line.has(name)), None)
    if size is None:
        return Ruling(Disposition.REFUSED, "it needs --moe-ffn-hidden-size; give it")
    return Ruling(
        Disposition.TRANSLATED,
        "Megatron's --moe-shared-expert-intermediate-size, as many times the expert's size",
        ("--moe-shared-expert-intermediate-size", str(int(value) * int(size))),
    )


def _shared_gate(value: str, line: CommandLine) -> Ruling:
    if line.number("--shared-expert-gate-output-dimension", 1) != 1:
        return Ruling(
            Disposition.REFUSED, "Megatron's gate has one output; use --shared-expert-gate-output-dimension 1"
        )
    return Ruling(Disposition.TRANSLATED, "Megatron's --moe-shared-expert-gate", ("--moe-shared-expert-gate",))


def _normalised(value: str, line: CommandLine) -> Ruling:
    """Read by aux_loss and softmax_topk alone (group_limited_greedy is refused); in aux_loss after the scaling."""
    balancing = line.text(_BALANCING, "aux_loss")
    if balancing == "softmax_topk":
        return Ruling(Disposition.NOTED, f"Megatron's router normalises; {_BALANCING} softmax_topk is translated so")
    if balancing != "aux_loss":
        return Ruling(Disposition.NOTED, f"{_BALANCING} {balancing} does not read it")
    undone = ("--moe-router-topk-scaling-factor", "--routed-scaling-factor")
    if present := [name for name in undone if line.has(name)]:
        return Ruling(Disposition.REFUSED, f"with aux_loss it undoes {present[0]}; leave out that or this")
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
    """Softmax over all experts, then the k largest. Normalised, they are the softmax of the k largest scores."""
    different = ("--moe-router-enable-expert-bias", "--moe-expert-capacity-factor")
    if present := [name for name in different if line.has(name)]:
        return Ruling(Disposition.REFUSED, f"with {present[0]} Megatron's router differs; leave that out")
    if line.text("--moe-router-score-function", "softmax") != "softmax":
        return Ruling(Disposition.REFUSED, "it is a softmax whatever the score function; use softmax")
    if any(line.has(name) for name in _GROUPS):
        return Ruling(Disposition.REFUSED, "it knows no groups of experts; leave out --moe-router-num-groups")
    pre_softmax = () if line.has("--norm-topk-prob") else ("--moe-router-pre-softmax",)
    return Ruling(
        Disposition.TRANSLATED,
        "Megatron's router without balancing, normalised or with --moe-router-pre-softmax",
        (_BALANCING, "none", *pre_softmax),
        ("--moe-router-pre-softmax",),
    )


def _sequence_loss(value: str, line: CommandLine) -> Ruling:
    balancing = line.text(_BALANCING, "aux_loss")
    if balancing not in ("none", "noaux_tc") or not line.number("--moe-aux-loss-coeff", 0):
        return Ruling(Disposition.NOTED, "there is no loss that it would change")
    return Ruling(Disposition.REFUSED, f"its loss is weighed otherwise than Megatron's; use {_BALANCING} seq_aux_loss")


def _dispatcher(value: str, line: CommandLine) -> Ruling:
    if line.has("--moe-expert-capacity-factor"):
        return Ruling(Disposition.REFUSED, "with --moe-expert-capacity-factor it drops other tokens; use alltoall")
    return Ruling(Disposition.TRANSLATED, "alltoall", ("--moe-token-dispatcher-type", "alltoall"))


_OF_DEEPSPEED = "it belongs to --moe-model-type deepspeed_moe, which is refused"
_OTHER_ROUTER = "Megatron has no such router; use aux_loss, seq_aux_loss, global_aux_loss, sinkhorn or none"


def _model_type(value: str, line: CommandLine) -> Ruling:
    if value == "megatron_moe":
        return Ruling(Disposition.NOTED, "Megatron's mixture is the only one")
    return Ruling(Disposition.REFUSED, "Megatron's mixture is the only one; use megatron_moe")


EXPERTS = (
    *spelled_otherwise(
        "sizes and groups of a mixture of experts",
        {
            "--moe-intermediate-size N": "--moe-ffn-hidden-size",
            "--n-group N": "--moe-router-num-groups",
            "--topk-group N": "--moe-router-group-topk",
            "--routed-scaling-factor X": "--moe-router-topk-scaling-factor",
        },
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
        "noted, they do in any case; with --moe-router-pre-softmax that is left out; refused where it undoes a scaling",
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
    *noted(
        "where the router's weights are rounded",
        "rounding alone",
        """
        --topk-softmax-in-fp32
        --moe-revert-type-after-topk
        """,
    ),
    *refused(
        "other routers and losses",
        "Megatron has no such router; leave it out",
        """
        --fix-router
        --num-zero-experts N
        --n-hash-layers N =0
        --moe-device-level-aux-loss-coeff X =0
        --moe-comm-aux-loss-coeff X =0
        --use-global-aux-loss
        --moe-use-sinkhorn
        """,
    ),
    *noted(
        "switches off noise on the router's input", "it is off; --moe-input-jitter-eps is Megatron's", "--input-jitter"
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
        "none, with --moe-router-pre-softmax unless --norm-topk-prob; refused with bias, capacity or groups",
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
