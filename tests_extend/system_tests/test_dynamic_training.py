"""Documents that each have ranks of their own (--hybrid-context-parallel): the losses and gradients of CP = 1."""

import shlex
from importlib import metadata
from itertools import pairwise

import pytest
from packaging.version import Version

from mindspeed_cp.testing.toy_flags import TOY_FLAGS
from mindspeed_cp.testing.toy_models import sizes
from system_tests.compare_losses import VALIDATION, largest_difference, losses_in
from system_tests.model_cases import MOST, difference
from system_tests.training_cases import HAS_TRAINING, ITERATIONS, READS_CONVERSATIONS

pytestmark = [
    pytest.mark.skipif(not READS_CONVERSATIONS, reason="no script of this release reads conversations"),
    pytest.mark.slow,
]

IS_0_16 = HAS_TRAINING and Version(metadata.version("megatron-core")) < Version("0.17")
CONVERSATIONS = """
    --global-batch-size 4 --distributed-backend gloo --distributed-timeout-minutes 4 --calculate-per-token-loss
    --sft --data-path made_up --no-create-attention-mask-in-dataloader
"""
"""Of 3 to 14 tokens, the last of a row with what fills it up to 64."""
SIXTEEN = "--hybrid-context-parallel --max-seqlen-per-dp-cp-rank 16"
RING = "--context-parallel-algo megatron_cp_algo"
HYBRID = "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"
ALGORITHMS = {
    "Ulysses": "--context-parallel-algo ulysses_cp_algo",
    "ring": RING,
    "double ring": f"{RING} --cp-window-size 2 --use-cp-send-recv-overlap",
    "hybrid": HYBRID,
    "all-gather": "--context-parallel-algo kvallgather_cp_algo",
}


def flags(*words):
    """Of one run; of a flag that is given twice the last counts."""
    return [*TOY_FLAGS, *sizes(64), *shlex.split(" ".join([CONVERSATIONS, *words]))]


@pytest.fixture(scope="module")
def alone(training):
    """What training on one rank prints, where documents are packed."""
    return training.log(1, tuple(flags()))


@pytest.mark.every_release
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_losses_and_gradients_are_those_of_cp_1_and_a_document_on_one_rank_sends_nothing(training, alone, algorithm):
    runs = training.train_dynamically(4, flags(SIXTEEN, algorithm))
    assert difference(alone, runs[-1].log).within(MOST)
    for run in runs:
        unshared = [document for document in run.documents if document.num_ranks == 1]
        shared = [document for document in run.documents if document.num_ranks > 1]
        assert all(document.tokens <= 16 * document.num_ranks for document in run.documents)
        assert {document.sent_bytes for document in unshared} == {0}
        assert all(document.sent_bytes for document in shared)
        assert {document.num_ranks for document in shared} == {2, 4}
        # From document to document, forth and back.
        assert sum(one.num_ranks != other.num_ranks for one, other in pairwise(run.documents)) > ITERATIONS


BESIDE = {
    "TP": ("--tensor-model-parallel-size 2", 2, f"{RING} --max-seqlen-per-dp-cp-rank 32"),
    "recomputation, outputs and K/V kept": (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        1,
        f"{RING} --context-parallel-keep-outputs --context-parallel-kv-cache-policy full",
    ),
    "windows, sinks, ALiBi, grouped heads": (
        "--window-size 8,0 --softmax-type learnable --use-alibi --group-query-attention --num-query-groups 2",
        1,
        HYBRID,
    ),
    "the algorithm that fits, distributed optimizer": ("", 1, "--use-distributed-optimizer --overlap-grad-reduce"),
}
"""Flags of both runs, ranks of the one, and flags of the other."""


@pytest.mark.parametrize(("shared", "ranks", "further"), BESIDE.values(), ids=BESIDE)
def test_other_options_beside_it_give_the_losses_of_cp_1(training, alone, shared, ranks, further):
    reference = training.log(ranks, tuple(flags(shared))) if shared else alone
    assert difference(reference, training.log(4, tuple(flags(shared, SIXTEEN, further)))).within(MOST)


TWELVE = "--seq-length 12 --eval-iters 2 --eval-interval 2 --split 80,10,10"
"""Every row is full: none is padded, so that a mean of rows is one of tokens."""


@pytest.mark.skipif(IS_0_16, reason="Megatron 0.16 fails on conversations that are longer than a row")
def test_documents_shorter_than_their_ranks_are_padded_and_validation_is_that_of_cp_1(training):
    full_rows = training.log(1, tuple(flags(TWELVE)))
    runs = training.train_dynamically(4, flags(TWELVE, "--hybrid-context-parallel --max-seqlen-per-dp-cp-rank 3", RING))
    assert difference(full_rows, runs[-1].log).within(MOST)
    validated = losses_in(full_rows, VALIDATION)
    assert len(validated) == 2
    assert largest_difference(validated, losses_in(runs[-1].log, VALIDATION)) <= 1e-6
    # A document of three tokens has four ranks where others would have none.
    assert (4, 4) in {(document.num_ranks, document.tokens) for document in runs[0].documents}
