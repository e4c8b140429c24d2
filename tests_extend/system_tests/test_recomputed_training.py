"""Recomputation with kept outputs in Megatron's pipelines: bytes and losses of training without recomputation."""

import shlex

import pytest

from system_tests.compare_losses import largest_difference
from system_tests.training_cases import HAS_TRAINING, ITERATIONS, MODEL_FLAGS

pytestmark = [
    pytest.mark.skipif(not HAS_TRAINING, reason="megatron.training is not installed"),
    pytest.mark.slow,
]

RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
PIPELINE = "--pipeline-model-parallel-size 2 --num-layers 4 --global-batch-size 4 --context-parallel-size 2"
TERMS = "--attention-dropout 0.1 --softmax-type learnable"
SCHEDULES = {
    "1F1B": f"{PIPELINE} {TERMS} --context-parallel-algo ulysses_cp_algo",
    "interleaved": f"{PIPELINE} {TERMS} --num-layers-per-virtual-pipeline-stage 1 --context-parallel-algo "
    "megatron_cp_algo --use-cp-send-recv-overlap",
}


@pytest.mark.parametrize("flags", SCHEDULES.values(), ids=SCHEDULES)
def test_recomputed_layers_send_nothing_and_nothing_is_left_after_a_step(training, flags):
    plain, kept = (
        training.train_counted(4, [*MODEL_FLAGS, *shlex.split(f"{flags} {further}")])
        for further in ("", f"{RECOMPUTE} --context-parallel-keep-outputs")
    )
    assert len(plain[-1].losses) == ITERATIONS
    assert largest_difference(plain[-1].losses, kept[-1].losses) <= 1e-6
    for without, run in zip(plain, kept, strict=True):
        assert (run.forward, run.backward) == (without.forward, without.backward)
        assert without.most_kept == 0 < run.most_kept
        assert run.left == [0] * ITERATIONS
    # The first stage has several micro-batches alive, the last of a plain pipeline one.
    assert max(run.most_kept for run in kept) > min(run.most_kept for run in kept)
