"""Real training through Megatron's loop: with context parallelism the losses are those of CP = 1."""

import pytest

from system_tests.compare_losses import largest_difference
from system_tests.training_cases import HAS_TRAINING, ITERATIONS, MODEL_FLAGS

pytestmark = pytest.mark.skipif(not HAS_TRAINING, reason="megatron.training is not installed")

TENSOR_PARALLEL = "--tensor-model-parallel-size 2"
PIPELINE_PARALLEL = "--pipeline-model-parallel-size 2"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
GQA = "--group-query-attention --num-query-groups 4"
FEW_KV_HEADS = "--group-query-attention --num-query-groups 1"
ODD_HEADS = "--num-attention-heads 6 --kv-channels 16 --group-query-attention --num-query-groups 3"
MOE = (
    "--disable-bias-linear --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather "
    "--moe-router-load-balancing-type none"
)
LATENT_WITHOUT_LOW_RANK_QUERIES = (
    "--multi-latent-attention --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 12"
)
LATENT = f"{LATENT_WITHOUT_LOW_RANK_QUERIES} --q-lora-rank 24"
YARN = f"{LATENT} --rotary-scaling-factor 4 --mscale 0.7 --mscale-all-dim 1"
RECOMPUTE_LATENT = f"{LATENT} --recompute-granularity selective --recompute-modules mla_up_proj"
EXPERTS_ALL_TO_ALL = f"{MOE.replace('allgather', 'alltoall')} --expert-model-parallel-size 2"
BALANCED_EXPERTS = MOE.replace("-type none", "-type aux_loss --moe-aux-loss-coeff 1e-2")
INTERLEAVED = f"{PIPELINE_PARALLEL} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
OVERLAPPED_OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
LOSS_MASK = "--eod-mask-loss --reset-position-ids"
MTP = "--mtp-num-layers 1"
DOCUMENTS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
STREAM = "--dataloader-inter-document-masking"
WINDOW = "--window-size 8,0 --window-attn-skip-freq 2"
SINKS = "--softmax-type learnable"
ODD = "--seq-length 61"
TWO_SAMPLES = "--micro-batch-size 2 --global-batch-size 4"
LLAMA = "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights"

ALIBI = "--position-embedding-type alibi --alibi-fusion-attn-type 2"
BAND = "--sparse-mode 4 --pre-tockens 8 --next-tockens 2"

ULYSSES = "--context-parallel-algo ulysses_cp_algo"
RING = "--context-parallel-algo megatron_cp_algo"
ALL_GATHER = "--cp-comm-type all_gather"
KEPT = "--context-parallel-kv-cache-policy full"
OVERLAP = "--use-cp-send-recv-overlap"
KEEP_OUTPUTS = "--context-parallel-keep-outputs"


def double_ring(inner: int) -> str:
    return f"{RING} --cp-window-size {inner}"


def hybrid(degree: int, inner: int = 1) -> str:
    return f"--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp {degree} --cp-window-size {inner}"


# Each row: what runs beside context parallelism, ranks without it, context-parallel size and algorithm.
#
# The default run trains at most a dozen times, the feature script's two runs among them: each algorithm once, beside
# as many other options as go together. The slow ones hold each option once, beside one algorithm: how an option and an
# algorithm meet is the same for all of them.
KEPT_KV = ("", 1, 4, f"{double_ring(2)} {OVERLAP} {KEPT}")
LATENT_TRAVELS = (f"{YARN} {RECOMPUTE}", 1, 4, f"{hybrid(2)} {KEEP_OUTPUTS} --context-parallel-latent latent")
ODD_LENGTH = (f"{PIPELINE_PARALLEL} {LOSS_MASK} {ODD}", 2, 2, RING)
QUICK = [
    KEPT_KV,
    (f"{TENSOR_PARALLEL} --sequence-parallel {GQA} --use-distributed-optimizer", 2, 2, ULYSSES),
    LATENT_TRAVELS,
    ODD_LENGTH,
    (f"{STREAM} {TWO_SAMPLES}", 1, 4, hybrid(2)),
]
SLOW = [
    (f"{YARN} {RECOMPUTE} {ODD}", 1, 3, ULYSSES),
    (f"{DOCUMENTS} {TWO_SAMPLES} {ODD}", 1, 4, hybrid(2)),
    (f"{INTERLEAVED} {ODD}", 2, 2, RING),
    (f"{STREAM} {TWO_SAMPLES} {PIPELINE_PARALLEL} {ODD}", 2, 2, RING),
    (f"{WINDOW} {ODD} --position-embedding-type learned_absolute", 1, 2, RING),
    ("", 1, 4, f"{double_ring(2)} {OVERLAP}"),
    (f"{GQA} {RECOMPUTE}", 1, 2, f"{RING} --context-parallel-kv-cache-policy half --context-parallel-cache-interval 1"),
    (f"{LATENT} {TENSOR_PARALLEL} --sequence-parallel", 2, 2, f"{RING} --context-parallel-latent latent {KEPT}"),
    (f"{LATENT} {TENSOR_PARALLEL}", 2, 2, f"{ULYSSES} --context-parallel-latent absorbed"),
    (f"{LATENT} --recompute-granularity selective", 1, 2, f"{RING} --context-parallel-latent latent"),
    (f"{STREAM} {YARN}", 1, 2, f"{RING} --context-parallel-latent absorbed"),
    (f"{DOCUMENTS} {TWO_SAMPLES}", 1, 4, ULYSSES),
    (f"{DOCUMENTS} {TWO_SAMPLES}", 1, 2, RING),
    (f"{DOCUMENTS} {TWO_SAMPLES}", 1, 4, double_ring(2)),
    (f"{DOCUMENTS} {TWO_SAMPLES}", 1, 4, hybrid(2)),
    (f"{DOCUMENTS} {PIPELINE_PARALLEL}", 2, 2, RING),
    (f"--reset-attention-mask {RECOMPUTE} {TENSOR_PARALLEL} --sequence-parallel", 2, 2, ULYSSES),
    ("--reset-attention-mask --fix-sub-seq-length 20", 1, 2, RING),
    (STREAM, 1, 4, ULYSSES),
    (STREAM, 1, 4, double_ring(2)),
    (STREAM, 1, 4, f"{hybrid(2)} --packed-sequence-layout balanced"),
    (f"{STREAM} {MTP} {RECOMPUTE}", 1, 2, RING),
    (f"{STREAM} {YARN}", 1, 2, RING),
    (f"{STREAM} {WINDOW} {TENSOR_PARALLEL} --sequence-parallel", 2, 2, RING),
    (f"{SINKS} {TENSOR_PARALLEL}", 2, 2, ULYSSES),
    (f"{SINKS} {RECOMPUTE}", 1, 4, hybrid(2)),
    (f"{FEW_KV_HEADS} {TENSOR_PARALLEL} --sequence-parallel", 2, 4, ULYSSES),
    (f"{ODD_HEADS} {SINKS}", 1, 4, ULYSSES),
    (f"{ODD_HEADS} {STREAM}", 1, 8, hybrid(4)),
    ("--softmax-type off-by-one", 1, 4, double_ring(2)),
    (WINDOW, 1, 2, RING),
    (WINDOW, 1, 4, hybrid(2)),
    (f"{GQA} {RECOMPUTE}", 1, 4, f"{ALL_GATHER} {OVERLAP}"),
    (f"{STREAM} {WINDOW}", 1, 4, ALL_GATHER),
    (BAND, 1, 4, ALL_GATHER),
    (f"{ALIBI} {DOCUMENTS} {TWO_SAMPLES}", 1, 4, hybrid(2)),
    (f"{ALIBI} {TENSOR_PARALLEL} --sequence-parallel", 2, 2, ULYSSES),
    (f"{ALIBI} {BAND}", 1, 4, f"{double_ring(2)} {OVERLAP}"),
    ("--attention-mask-type general --reset-attention-mask", 1, 2, RING),
    (f"{INTERLEAVED} {LOSS_MASK}", 2, 2, RING),
    ("", 1, 4, ULYSSES),
    ("", 1, 4, f"{RING} {OVERLAP}"),
    ("", 1, 4, hybrid(2)),
    (f"{TENSOR_PARALLEL} --sequence-parallel", 2, 2, ULYSSES),
    (f"{TENSOR_PARALLEL} --sequence-parallel", 2, 2, RING),
    (f"{TENSOR_PARALLEL} --sequence-parallel {PIPELINE_PARALLEL} {OVERLAPPED_OPTIMIZER}", 4, 2, RING),
    (f"{YARN} --use-distributed-optimizer", 1, 8, f"{hybrid(2, inner=2)} {OVERLAP}"),
    (f"{OVERLAPPED_OPTIMIZER} --global-batch-size 4", 2, 2, ULYSSES),
    ("--use-tp-pp-dp-mapping --tensor-model-parallel-size 2", 2, 2, RING),
    ("--recompute-granularity selective", 1, 2, RING),
    (f"{RECOMPUTE} --position-embedding-type learned_absolute", 1, 2, ULYSSES),
    ("--recompute-granularity selective", 1, 2, f"{ULYSSES} {KEEP_OUTPUTS}"),
    (f"{RECOMPUTE} {INTERLEAVED}", 2, 2, f"{RING} {OVERLAP} {KEEP_OUTPUTS}"),
    ("--attention-mask-type general --reset-attention-mask", 1, 2, ULYSSES),
    (f"{LATENT} --attention-mask-type general --reset-attention-mask", 1, 4, hybrid(2)),
    (f"{LATENT} --rope-type rope --qk-layernorm", 1, 2, ULYSSES),
    (f"{LATENT} {TENSOR_PARALLEL} --sequence-parallel", 2, 2, RING),
    (LATENT_WITHOUT_LOW_RANK_QUERIES, 1, 2, RING),
    (RECOMPUTE_LATENT, 1, 2, RING),
    (EXPERTS_ALL_TO_ALL, 2, 2, RING),
    (BALANCED_EXPERTS, 1, 2, RING),
    (BALANCED_EXPERTS.replace("aux_loss", "seq_aux_loss", 1), 1, 2, ULYSSES),
    (f"{LOSS_MASK} --micro-batch-size 2 --global-batch-size 8", 2, 2, RING),
    (f"{LOSS_MASK} --calculate-per-token-loss --global-batch-size 8", 2, 2, ULYSSES),
    (f"{MTP} --eod-mask-loss", 1, 4, hybrid(2)),
    (f"{MTP} {PIPELINE_PARALLEL}", 2, 2, ULYSSES),
    ("--global-batch-size 4 --cross-entropy-loss-fusion --cross-entropy-fusion-impl native", 1, 2, RING),
    (f"{LLAMA} --rotary-percent 0.5 --use-rope-scaling", 1, 2, RING),
    ("--qk-layernorm --attention-output-gate", 1, 2, ULYSSES),
]
# Those of them that run with every supported release of Megatron: their rows and columns in its table.
EVERY_RELEASE = {
    ("", 1, 4, ULYSSES): ("pretraining, CP 4", "ulysses"),
    ("", 1, 4, f"{RING} {OVERLAP}"): ("pretraining, CP 4", "ring"),
    ("", 1, 4, f"{double_ring(2)} {OVERLAP}"): ("pretraining, CP 4", "double ring"),
    ("", 1, 4, hybrid(2)): ("pretraining, CP 4", "hybrid"),
    (f"{TENSOR_PARALLEL} --sequence-parallel", 2, 2, ULYSSES): ("pretraining, TP 2 with SP x CP 2", "ulysses"),
    (f"{TENSOR_PARALLEL} --sequence-parallel", 2, 2, RING): ("pretraining, TP 2 with SP x CP 2", "ring"),
    KEPT_KV: ("kept K/V, CP 4", "double ring"),
    LATENT_TRAVELS: ("latents travel, outputs kept", "hybrid"),
    ODD_LENGTH: ("odd length, PP 2 x CP 2", "ring"),
}


def cases() -> list[object]:
    return [pytest.param(*row, id=_id(row), marks=_marks(row)) for row in (*QUICK, *SLOW)]


def _marks(row: tuple[str, int, int, str]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (row in SLOW) + [pytest.mark.every_release] * (row in EVERY_RELEASE)


def _id(row: tuple[str, int, int, str]) -> str:
    beside, _, size, algorithm = row
    return " ".join([f"cp{size}", algorithm.removeprefix("--context-parallel-algo "), beside]).strip()


@pytest.mark.parametrize(("beside", "ranks", "size", "algorithm"), cases())
def test_losses_equal_those_of_cp_1(training, record_property, beside, ranks, size, algorithm):
    reference = training.losses(ranks, beside)
    losses = training.losses(ranks * size, f"{beside} --context-parallel-size {size} {algorithm}")
    assert len(reference) == ITERATIONS
    difference = largest_difference(reference, losses)
    if (row := (beside, ranks, size, algorithm)) in EVERY_RELEASE:
        check, name = EVERY_RELEASE[row]
        record_property("check", check)
        record_property("algorithm", name)
        record_property("result", f"{losses[ITERATIONS]:.5f} {difference:.0e}")
    assert difference <= 1e-5


DROPOUT = "--attention-dropout 0.1"
WITH_DROPOUT = [
    pytest.param(f"{DOCUMENTS} {TWO_SAMPLES} {RECOMPUTE}", 1, 4, double_ring(2), id="double ring, documents"),
    pytest.param(f"{STREAM} {WINDOW}", 1, 4, hybrid(2), id="hybrid, stream and window"),
    pytest.param(
        *(f"{TENSOR_PARALLEL} --global-batch-size 4", 4, 2, ULYSSES),
        id="ulysses, TP and DP",
        marks=pytest.mark.every_release,
    ),
    pytest.param(f"{INTERLEAVED} {RECOMPUTE}", 2, 2, RING, id="ring, interleaved stages"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("beside", "ranks", "size", "algorithm"), WITH_DROPOUT)
def test_dropout_drops_what_it_does_with_cp_1(training, record_property, beside, ranks, size, algorithm):
    reference = training.losses(ranks, f"{beside} {DROPOUT} --attention-on-one-rank")
    losses = training.losses(ranks * size, f"{beside} {DROPOUT} --context-parallel-size {size} {algorithm}")
    assert len(reference) == ITERATIONS
    if algorithm == ULYSSES:  # The row that runs with every supported release.
        record_property("check", "dropout, TP 2 x DP 2 x CP 2")
        record_property("algorithm", "ulysses")
        record_property("result", f"{losses[ITERATIONS]:.5f} {largest_difference(reference, losses):.0e}")
    assert largest_difference(reference, losses) <= 1e-5
    assert largest_difference(reference, training.losses(ranks, beside)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("flags", [f"{DOCUMENTS} {TWO_SAMPLES}", f"{WINDOW} {ODD}"])
def test_one_rank_of_ours_has_the_losses_of_megatrons_own_attention(training, flags):
    assert largest_difference(training.losses(1, flags), training.losses(1, f"{flags} --attention-on-one-rank")) <= 1e-5


@pytest.mark.slow
def test_scores_are_clipped_as_with_cp_1(training):
    clipped = "--bf16 --qk-clip --qk-clip-threshold 0.05"
    reference = training.losses(1, clipped)
    losses = training.losses(4, f"{clipped} --context-parallel-size 4 {hybrid(2)}")
    assert len(reference) == ITERATIONS
    assert largest_difference(reference, losses) <= 2e-3
    assert largest_difference(reference, training.losses(1, "--bf16")) > 1e-2


@pytest.mark.slow
def test_packed_stream_has_the_losses_of_megatrons_own_masks(training):
    # One rank's packed streams are ours, its masks Megatron's; rotary embeddings have the same scores in both.
    assert largest_difference(training.losses(1, "--reset-attention-mask"), training.losses(1, STREAM)) <= 1e-5


@pytest.mark.slow
def test_the_log_says_how_many_tokens_pad_the_packed_streams(training):
    log = training.log(2, [*MODEL_FLAGS, *f"{STREAM} --context-parallel-size 2 {RING}".split()])
    assert log.count(" padding tokens: 0 of 128 in the packed streams") == ITERATIONS


@pytest.mark.slow
def test_a_run_leaves_no_group_behind(training):
    flags = [*MODEL_FLAGS, *f"--use-distributed-optimizer --context-parallel-size 2 {RING}".split()]
    training.log(2, flags)
    before = training.num_threads(2)
    training.log(2, flags)
    assert training.num_threads(2) == before


@pytest.mark.slow
@pytest.mark.parametrize(("beside", "algorithm"), [("", hybrid(2)), (f"{ALIBI} {BAND}", ALL_GATHER)])
def test_losses_in_bf16_equal_those_of_cp_1(training, beside, algorithm):
    reference = training.losses(1, f"{beside} --bf16")
    losses = training.losses(4, f"{beside} --bf16 --context-parallel-size 4 {algorithm}")
    assert len(reference) == ITERATIONS
    assert largest_difference(reference, losses) <= 2e-3


@pytest.mark.slow
def test_validation_losses_equal_those_of_cp_1(training):
    flags = f"--split 90,5,5 --eval-iters 2 --eval-interval {ITERATIONS // 2}"
    reference = training.validation_losses(1, flags)
    losses = training.validation_losses(2, f"{flags} --context-parallel-size 2 {RING}")
    assert list(reference) == [ITERATIONS // 2, ITERATIONS]
    assert largest_difference(reference, losses) <= 1e-5


@pytest.mark.slow
def test_flags_of_a_mindspeed_script_that_change_nothing_change_nothing(training):
    ours = f"--context-parallel-size 2 {RING}"
    theirs = (
        "--use-fused-ring-attention-update --use-flash-attn --context-parallel-kv-cache-policy full --sparse-mode 2"
    )
    assert training.losses(2, f"{ours} {theirs}") == training.losses(2, ours)


@pytest.mark.slow
def test_a_wrong_chunk_order_changes_the_losses(training):
    flags = f"--context-parallel-size 2 {ULYSSES}"
    assert largest_difference(training.losses(1, ""), training.losses(2, flags, sabotage="chunk order")) > 1e-3


@pytest.mark.slow
def test_a_gradient_that_stays_away_changes_the_losses(training):
    flags = f"--context-parallel-size 2 {RING}"
    assert largest_difference(training.losses(1, ""), training.losses(2, flags, sabotage="lost gradients")) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--context-parallel-size 2 --qk-clip", "--qk-clip in fp32: "),
        (
            f"--context-parallel-size 2 {ULYSSES} --num-attention-heads 1",
            "gives each rank 1, fewer than the Ulysses degree 2",
        ),
    ],
)
def test_training_refuses_in_one_line(training, flags, message):
    assert message in training.refusal(2, flags)


LONGER = 8
"""Iterations of what is stopped and resumed twice."""
CHANGED_ALGORITHM = (
    (3, 4, f"--context-parallel-size 4 {ULYSSES}"),
    (6, 2, f"--context-parallel-size 2 {RING}"),
    (LONGER, 1, ""),
)
# Only after a resume do runs with and without tensor parallelism have the same weights.
CHANGED_TENSOR_PARALLELISM = (
    (3, 1, ""),
    (6, 2, TENSOR_PARALLEL),
    (LONGER, 4, f"{TENSOR_PARALLEL} --sequence-parallel --context-parallel-size 2 {RING}"),
)
# At CP = 1 Megatron gives the stages between the first and the last no mask: they are held to one stage.
MIDDLE_STAGES = (
    (3, 1, ""),
    (6, 8, f"--pipeline-model-parallel-size 4 --context-parallel-size 2 {RING}"),
    (LONGER, 4, f"{PIPELINE_PARALLEL} --num-layers-per-virtual-pipeline-stage 1 --context-parallel-size 2 {ULYSSES}"),
)
# Padded to 384 on one tensor-parallel rank and on two.
SAME_VOCABULARY = "--make-vocab-size-divisible-by 192"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "stages"),
    [
        pytest.param("", CHANGED_ALGORITHM, id="another algorithm and size"),
        pytest.param(f"{LATENT} {SAME_VOCABULARY}", CHANGED_TENSOR_PARALLELISM, id="latent attention, TP and CP"),
        pytest.param(f"{DOCUMENTS} --num-layers 4", MIDDLE_STAGES, id="documents in middle and virtual stages"),
    ],
)
def test_a_checkpoint_resumes_with_another_parallelism(training, tmp_path, model, stages):
    model, pieces = f"{model} --train-iters {LONGER}", {}
    for last, ranks, flags in stages:
        checkpoint = f"--load {tmp_path} --exit-interval {last}"
        if last < LONGER:
            checkpoint += f" --save {tmp_path} --save-interval 1000"
        losses = training.losses(ranks, f"{model} {flags} {checkpoint}")
        first, second = sorted(losses)[:2]
        if first > 1:
            # After a resume Megatron logs the mean of the first two iterations at the second.
            losses[second] = 2 * losses[second] - losses[first]
        pieces |= losses
    assert list(pieces) == list(range(1, LONGER + 1))
    assert largest_difference(training.losses(1, model), pieces) <= 1e-5


@pytest.mark.slow
def test_a_checkpoint_says_the_model_and_its_heads_are_checked(training, tmp_path):
    model = f"--group-query-attention --num-query-groups 2 --swiglu --rotary-percent 0.5 --train-iters {LONGER}"
    pieces = training.losses(1, f"{model} --save {tmp_path} --save-interval 1000 --exit-interval 3")
    of_checkpoint = f"--use-checkpoint-args --load {tmp_path} --train-iters {LONGER}"
    message = training.refusal(4, f"{of_checkpoint} --num-attention-heads 9 --context-parallel-size 4 {ULYSSES}")
    assert "--num-query-groups 2 does not divide --num-attention-heads 9" in message
    resumed = training.losses(2, f"{of_checkpoint} --context-parallel-size 2 {RING}")
    # After a resume Megatron logs the mean of the first two iterations at the second.
    resumed[5] = 2 * resumed[5] - resumed[4]
    assert largest_difference(training.losses(1, model), pieces | resumed) <= 1e-5


def test_a_layer_of_megatron_core_attends_alike_and_its_groups_are_gone_with_megatrons(training):
    flags = {"context_parallel_size": 4, "context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}
    for order in ("tp-cp-ep-dp-pp", "tp-dp-ep-cp-pp"):
        for result in training.attend_in_a_core_layer(4, order, flags | {"use_cp_send_recv_overlap": True}):
            assert result.difference < 1e-5
            assert result.groups_made == 2  # One for gradients, and the context-parallel one itself.
            assert result.groups_left == 0
