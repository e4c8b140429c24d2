"""Training on sequences whose length the ranks do not divide, beside what Megatron takes to be equal on all of them."""

import shlex

import pytest

from system_tests.model_cases import MOST, difference
from system_tests.stream_cases import TOKENS
from system_tests.training_cases import HAS_TRAINING, MEGATRON_LM, MODEL_FLAGS

pytestmark = [
    pytest.mark.skipif(not HAS_TRAINING, reason="megatron.training is not installed"),
    pytest.mark.slow,
]

ULYSSES = "--context-parallel-algo ulysses_cp_algo"
RING = "--context-parallel-algo megatron_cp_algo"
DOUBLE_RING = f"{RING} --cp-window-size 2"
HYBRID = "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"
PIPELINE = "--pipeline-model-parallel-size 2"
EXPERTS = (
    "--disable-bias-linear --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-1 --moe-z-loss-coeff 1e-1"
)
ROWS = [
    ("--dataloader-inter-document-masking --mtp-num-layers 1", 1, 4, HYBRID),
    (f"{PIPELINE} --mtp-num-layers 1 --eod-mask-loss --reset-position-ids", 2, 2, RING),
    ("--attention-mask-type general --reset-attention-mask", 1, 4, ULYSSES),
    (f"{EXPERTS} --expert-model-parallel-size 2", 2, 2, RING),
    ("--sft --data-path made_up --no-create-attention-mask-in-dataloader", 1, 4, DOUBLE_RING),
]


@pytest.mark.parametrize(("beside", "ranks", "size", "algorithm"), ROWS)
def test_losses_and_gradient_norms_are_those_of_cp_1(training, beside, ranks, size, algorithm):
    if "--sft" in beside and MEGATRON_LM is None:
        pytest.skip("MEGATRON_LM names no Megatron-LM checkout")
    data = {"--mock-data"} if "--data-path" in beside else set()
    flags = [*(flag for flag in MODEL_FLAGS if flag not in data), *shlex.split(f"{beside} --seq-length 61")]
    shared = [*flags, "--context-parallel-size", str(size), *shlex.split(algorithm)]
    found = difference(training.log(ranks, flags), training.log(ranks * size, shared))
    assert found.within(MOST), found


def test_a_program_s_stream_that_the_ranks_do_not_divide_trains_as_on_one_rank(training):
    alone = training.train_on_streams(1, "padded", {})
    ranks = next(ranks for ranks in range(2, 8) if TOKENS % ranks)
    shared = training.train_on_streams(ranks, "padded", {"context_parallel_algo": "megatron_cp_algo"})
    for one, other in zip(alone, shared, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
