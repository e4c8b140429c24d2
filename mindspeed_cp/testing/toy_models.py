"""Toys of models that people train: Megatron's flags of each, small, with what makes its attention its own.

Heads per K/V head, head sizes beside the width, windows beside the length, experts and what they are chosen by, rotary
bases and scaling are those of the real configuration, or in its proportions. What attention and routing do not notice,
and Megatron's flags do not say, is left out; `left_out` names it.
"""

import shlex
from typing import NamedTuple


class ToyModel(NamedTuple):
    """A model of 64 features and 8 heads; the caller adds data, length and parallelism.

    of: the configuration that it is a toy of. own: what is its own about it, as the head of a table has it. flags:
    Megatron's, to be added to TOY_FLAGS and the sizes that `sizes` gives. left_out: what the real one has beside.
    """

    of: str
    own: str
    flags: tuple[str, ...]
    left_out: str = ""


def sizes(length: int) -> tuple[str, ...]:
    """Width, heads, layers and length of all toys, before their own flags: of a flag given twice the last counts."""
    width = ("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "8")
    return (*width, "--seq-length", str(length), "--max-position-embeddings", str(length))


_LLAMA = """
    --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --ffn-hidden-size 224
"""
"""What most of them have: a gated MLP of 3.5 times the width, no biases, an output layer of its own."""

_EXPERTS = "--moe-token-dispatcher-type alltoall --moe-ffn-hidden-size 32"


def _model(of: str, own: str, flags: str, left_out: str = "") -> ToyModel:
    return ToyModel(of, own, tuple(shlex.split(flags)), left_out)


TOY_MODELS = {
    "Llama 3": _model(
        "Llama 3.1 8B",
        "4 query heads for each K/V head, scaled rotary frequencies",
        f"""{_LLAMA} --group-query-attention --num-query-groups 2
        --rotary-base 500000 --use-rope-scaling --rope-scaling-factor 8""",
    ),
    "Qwen 3": _model(
        "Qwen3 4B",
        "norms of queries and keys, heads wider than their share",
        f"""{_LLAMA} --group-query-attention --num-query-groups 2 --kv-channels 16 --qk-layernorm
        --rotary-base 1000000""",
    ),
    "Mistral": _model(
        "Mistral 7B v0.1",
        "a window in every layer",
        f"{_LLAMA} --group-query-attention --num-query-groups 2 --window-size 15,0",
    ),
    "Gemma 3": _model(
        "Gemma 3 12B",
        "five layers with a window to one without, norms of queries and keys",
        """--normalization RMSNorm --quick-geglu --disable-bias-linear --ffn-hidden-size 256 --num-layers 6
        --group-query-attention --num-query-groups 4 --kv-channels 16 --qk-layernorm
        --window-size 15,0 --window-attn-skip-freq 6 --rotary-base 1000000""",
        "a rotary base of its own in local layers, norms after the branches, the tanh form of GELU",
    ),
    "gpt-oss": _model(
        "gpt-oss 20B",
        "learnable sinks, windows in every other layer, experts, YaRN",
        f"""--normalization RMSNorm --untie-embeddings-and-output-weights --disable-bias-linear --add-qkv-bias
        --kv-channels 16 --group-query-attention --num-query-groups 1 --softmax-type learnable
        --window-size 15,0 --window-attn-skip-freq 2
        --quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0
        {_EXPERTS} --num-experts 8 --moe-router-topk 4 --moe-router-load-balancing-type aux_loss
        --moe-aux-loss-coeff 1e-2
        --position-embedding-type yarn --rotary-base 150000 --rotary-scaling-factor 32
        --yarn-original-max-position-embeddings 16 --yarn-beta-fast 32 --yarn-beta-slow 1
        --no-yarn-correction-range-round-to-int""",
        "biases of experts, with which Megatron's local layers fail at any size, and of the output projection",
    ),
    "DeepSeek-V3": _model(
        "DeepSeek-V3",
        "latent attention, grouped experts after a dense layer, a shared one, a second prediction",
        f"""{_LLAMA} --num-layers 3 --multi-latent-attention --qk-layernorm
        --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16
        --rotary-scaling-factor 40 --mscale 1.0 --mscale-all-dim 1.0
        {_EXPERTS} --num-experts 8 --moe-layer-freq ([0]*1+[1]*2) --moe-shared-expert-intermediate-size 32
        --moe-router-topk 4 --moe-router-num-groups 4 --moe-router-group-topk 2
        --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5
        --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
        --mtp-num-layers 1 --mtp-loss-scaling-factor 0.1""",
    ),
    "Mixtral": _model(
        "Mixtral 8x7B",
        "8 experts of which 2 are chosen",
        f"""{_LLAMA} --group-query-attention --num-query-groups 2 --rotary-base 1000000
        --num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall
        --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2""",
    ),
    "GLM": _model(
        "GLM-4 9B",
        "2 K/V heads, half of each head is rotated, interleaved; biases of queries, keys and values",
        f"""{_LLAMA} --group-query-attention --num-query-groups 2 --add-qkv-bias
        --rotary-percent 0.5 --rotary-interleaved""",
    ),
}
"""By the name that people call them by."""
