"""Flags of Megatron's that MindSpeed's scripts use and not every supported release has: dropped since 0.12, or new.

Source: Megatron-LM, megatron/training/arguments.py at core_v0.12.1 and at the releases that are supported.
"""

from mindspeed_cp.patches.mindspeed.record import noted, refused

OLDER = (
    *noted(
        "communication and operators of an older Megatron",
        "the same results",
        """
        --no-async-tensor-model-parallel-allreduce
        --no-scatter-gather-tensors-in-pipeline
        --moe-use-legacy-grouped-gemm
        --moe-extended-tp
        """,
    ),
    *refused(
        "models of an older Megatron",
        "this Megatron has those of megatron.core alone; leave it out",
        "--use-legacy-models",
    ),
    *refused(
        "the mixture of layers of an older Megatron",
        "this Megatron spells it otherwise; use --hybrid-layer-pattern",
        """
        --hybrid-attention-ratio X
        --hybrid-mlp-ratio X
        """,
    ),
    *refused(
        "options of the Muon optimizer",
        "this Megatron does not have it yet; leave it out, or take a later release",
        """
        --muon-coefficient-type S
        --muon-nesterov
        --muon-scalar-optimizer S
        """,
    ),
)
