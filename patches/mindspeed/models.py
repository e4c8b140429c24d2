"""The model beside its attention scores and experts: latent attention, norms, activations, other kinds of layers.

Source: Ascend/MindSpeed-LLM, mindspeed_llm/features_manager/{models,transformer,common,arguments};
Ascend/MindSpeed, mindspeed/features_manager/transformer.
"""

from mindspeed_cp.patches.mindspeed.record import (
    CommandLine,
    Disposition,
    Record,
    Ruling,
    noted,
    refused,
    spelled_otherwise,
)


def _loss_scale(value: str, line: CommandLine) -> Ruling:
    if line.has("--mtp-num-layers"):
        return Ruling(
            Disposition.REFUSED, "with --mtp-num-layers Megatron spells it otherwise; use --mtp-loss-scaling-factor"
        )
    return Ruling(Disposition.NOTED, _PREDICTION)


_INDEXER = "it belongs to --enable-dsa-indexer, which is refused"
_STREAMS = "it belongs to --enable-mhc, which is refused"
_LINEAR = "it belongs to --full-attention-interval, which is refused"
_PREDICTION = "it belongs to --num-nextn-predict-layers, which is refused"

MODELS = (
    *spelled_otherwise(
        "latent attention",
        {
            "--multi-head-latent-attention": "--multi-latent-attention",
            "--qk-nope-head-dim N": "--qk-head-dim",
            "--qk-rope-head-dim N": "--qk-pos-emb-head-dim",
        },
    ),
    *refused(
        "factors on the latent vectors",
        "Megatron's latent attention has none; leave it out",
        """
        --enable-mla-scale-q-lora
        --enable-mla-scale-kv-lora
        """,
    ),
    *refused(
        "an attention of its own, over tokens that an indexer chooses or that are compressed",
        "context parallelism has no such attention; leave it out",
        """
        --enable-dsa-indexer
        --use-sparse-flash-attn
        --use-fused-sparse-flash-attention
        --kv-compress
        --compress-ratios N...
        --share-kvstates
        --cla-share-factor N =1
        --no-enable-linear-qkv
        """,
    ),
    *noted(
        "numbers and operators of that attention",
        _INDEXER,
        """
        --index-head-dim N
        --index-n-heads N
        --index-topk N
        --index-topk-freq N
        --index-topk-pattern S
        --index-skip-topk-offset N
        --index-share-for-mtp-iteration
        --indexer-loss-coeff X
        --indexer-qk-quant-scheme {mxfp4,mxfp8}
        --no-use-sparse-c8-indexer
        --apply-rope-in-complex
        --apply-rope-no-in-complex
        --use-dsa-absorb
        --use-fused-lightning-indexer
        --use-fused-lightning-indexer-loss
        --use-fused-lightning-indexer-kl-loss
        --compress-rope-theta X
        --rope-theta X
        --rope-factor X
        --original-seq-len N
        --max-batch-size N
        --o-groups N
        --o-lora-rank N
        """,
    ),
    *refused(
        "several streams between layers",
        "Megatron has one; leave it out",
        "--enable-mhc",
    ),
    *noted(
        "numbers and operators of those streams",
        _STREAMS,
        """
        --hc-mult N
        --hc-eps X
        --hc-sinkhorn-iters N
        --use-fused-mhc
        --use-triton-mhc
        """,
    ),
    *refused(
        "linear attention in all layers but some",
        "context parallelism has no linear attention; leave it out",
        "--full-attention-interval N =0",
    ),
    *noted("its operators", _LINEAR, "--use-triton-gdn"),
    *refused(
        "Mamba's layers",
        "they are not available beside context parallelism; leave it out",
        """
        --mamba-chunk-size N
        --mamba-d-conv N
        --mamba-d-ssm N
        --mamba-d-state N
        --mamba-expand N
        --mamba-headdim N
        --mamba-ngroups N
        """,
    ),
    *refused(
        "predicts several tokens, over sequences that are longer by as many",
        "Megatron's prediction shifts within the sequence; use --mtp-num-layers and --mtp-loss-scaling-factor",
        "--num-nextn-predict-layers N =0",
    ),
    Record(
        "--mtp-loss-scale",
        "X",
        "the weight of that prediction's loss",
        Disposition.NOTED,
        f"noted, {_PREDICTION}; with --mtp-num-layers refused, use --mtp-loss-scaling-factor",
        _loss_scale,
    ),
    *noted("what that prediction shares", _PREDICTION, "--share-mtp-embedding-and-output-weight"),
    *refused(
        "another head for that prediction",
        "Megatron's is another; leave it out",
        """
        --mtp-after-norm
        --mtp-spec S...
        """,
    ),
    *refused(
        "norms in other places or of another form",
        "Megatron's layer does not have it; leave it out",
        """
        --post-norm
        --embed-layernorm
        --input-embeds-norm
        --no-post-layer-norm
        --add-rmsnorm-offset
        """,
    ),
    *noted(
        "the type in which norms are held or computed",
        "rounding alone",
        """
        --input-layernorm-in-fp32
        --rmsnorm-weight-in-fp32
        --init-norm-weight-in-fp32
        """,
    ),
    *refused(
        "biases of some layers",
        "Megatron's layer does not have it; leave it out",
        """
        --add-dense-bias
        --add-output-layer-bias
        --skip-bias-add
        """,
    ),
    *refused(
        "other activations and layers",
        "Megatron's layer does not have it; leave it out",
        """
        --geglu
        --gelu-tanh
        --swiglu-limit X =0
        --fc-type S
        """,
    ),
    *refused(
        "factors on embeddings, residuals and logits",
        "Megatron's model does not have it; leave it out",
        """
        --embedding-multiplier-scale X =1
        --scale-emb X
        --scale-depth X
        --dim-model-base X
        --output-logit-softcapping X
        --output-multiplier-scale X =1
        """,
    ),
)

_OWN_LAYERS = "Megatron has no such layers; leave it out where Megatron's own are the same, or name a spec of your own"


def _layers(value: str, line: CommandLine) -> Ruling:
    """Layers that are composed of Megatron's own modules, or of others that compute the same."""
    name = value.partition("spec.")[2]
    if name == "qwen3_spec layer_spec":
        return Ruling(Disposition.NOTED, _ARE_MEGATRONS)
    if name != "deepseek_spec layer_spec":
        return Ruling(Disposition.REFUSED, _OWN_LAYERS)
    if line.has("--add-qkv-bias"):
        return Ruling(Disposition.REFUSED, "Megatron's latent attention has no such biases; leave out --add-qkv-bias")
    given = {
        "--multi-latent-attention": line.is_latent(),
        # Without either of these two, releases differ in the order of the features that are rotated.
        "--rope-scaling-type yarn": line.text("--rope-scaling-type") == "yarn",
        "--use-fused-rotary-pos-emb": line.has("--use-fused-rotary-pos-emb"),
        # Of the projections to and from the latent vectors, which have none in Megatron.
        "--disable-bias-linear": line.has("--disable-bias-linear"),
    }
    if missing := [flags for flags, is_given in given.items() if not is_given]:
        reason = f"Megatron's layers compute the same with {' '.join(missing)} alone; add it"
        return Ruling(Disposition.REFUSED, reason)
    return Ruling(Disposition.NOTED, _ARE_MEGATRONS)


_ARE_MEGATRONS = "Megatron's own layers compute the same"

MODELS_VALUES = (
    Record(
        "--spec",
        "mindspeed_llm.*",
        "layers of MindSpeed-LLM's",
        Disposition.REFUSED,
        "qwen3_spec, and deepseek_spec with --multi-latent-attention, --rope-scaling-type yarn, "
        f"--use-fused-rotary-pos-emb and --disable-bias-linear: noted, {_ARE_MEGATRONS}; "
        f"others: refused, {_OWN_LAYERS}",
        _layers,
    ),
    *refused("layers of ModelLink's", _OWN_LAYERS, "--spec modellink.*"),
)
