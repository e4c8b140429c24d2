"""Failure drills on real training: what goes wrong ends with a message, in bounded time, and is never passed over."""

import re

import pytest

from system_tests.compare_losses import largest_difference

RING = "--context-parallel-algo megatron_cp_algo"


def test_patches_stay_while_training_is_under_way_and_go_afterwards(training):
    for drill in training.restore_in_mid_training(2):
        assert drill.refusal == (
            "cannot restore the patches: training is under way on context-parallel groups; "
            "call parallel_state.destroy_model_parallel() first."
        )
        assert drill.kept
        assert drill.left == {"not applied"}


@pytest.mark.slow
def test_number_of_ranks_that_the_sizes_do_not_divide_is_refused_before_anything_starts(training):
    refusal = training.refusal(3, "--context-parallel-size 2")
    assert re.search(
        r"error: --context-parallel-size 2 \* .* = 2 does not divide the 3 ranks; use a .* 1 or 3", refusal
    )


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["", "--use-cp-send-recv-overlap"])
def test_rank_killed_in_a_ring_step_ends_the_other_with_step_and_peer(training, overlap):
    failure = training.refusal(2, f"--context-parallel-size 2 {RING} {overlap}", sabotage="killed rank")
    assert "rank 1 died with exit code -9" in failure
    assert "rank 0 raised" in failure, "it did not answer in time"
    step = r"RuntimeError: ring (forward|backward) step \d of 2, block of ring rank [01]:"
    assert re.search(rf"{step} .* from ring rank 1, or ", failure)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [RING, "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2"])
def test_nan_among_one_rank_s_keys_ends_training_and_is_never_dropped(training, algorithm):
    # Without the flag Megatron computes the iteration again, to see whether a device is at fault, and then ends too.
    flags = f"--context-parallel-size 4 {algorithm} --rerun-mode disabled"
    failure = training.refusal(4, flags, sabotage="nan key")
    for rank in range(4):
        # The first iteration: Megatron's count is one ahead here.
        assert re.search(rf"RuntimeError: Rank {rank}, .* iteration 2: Unexpected result nan", failure)


@pytest.mark.slow
def test_checkpoint_resumes_with_another_tensor_parallel_size_too(training, tmp_path):
    # The vocabulary is padded to a multiple of this number times the tensor-parallel size: 512 with either.
    vocabulary, pieces = "--make-vocab-size-divisible-by 256", {}
    for last, ranks, flags in (
        (8, 4, "--tensor-model-parallel-size 2 --context-parallel-size 2"),
        (14, 4, f"--context-parallel-size 4 {RING}"),
        (20, 4, f"--tensor-model-parallel-size 2 --context-parallel-size 2 {RING}"),
    ):
        checkpoint = f"--save {tmp_path} --load {tmp_path} --save-interval 1000 --exit-interval {last}"
        losses = training.losses(ranks, f"{flags} {vocabulary} {checkpoint}")
        first, second = sorted(losses)[:2]
        if first > 1:
            # After a resume Megatron logs the mean of the first two iterations at the second.
            losses[second] = 2 * losses[second] - losses[first]
        pieces |= losses
    assert list(pieces) == list(range(1, 21))
    reference = training.losses(2, f"--tensor-model-parallel-size 2 {vocabulary}")
    assert largest_difference(reference, pieces) <= 1e-5
