"""Failure drills on real training: what goes wrong ends with a message, in bounded time, and is never passed over."""

import re

import pytest

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
def test_rank_killed_in_a_ring_step_ends_the_other_with_step_and_peer(training):
    failure = training.refusal(2, f"--context-parallel-size 2 {RING}", sabotage="killed rank")
    assert "rank 1 died with exit code -9" in failure
    assert "rank 0 raised" in failure, "it did not answer in time"
    step = r"LostRank: ring (forward|backward) step \d of 2, block of ring rank [01]:"
    assert re.search(rf"{step} [dKV/]+ exchange failed \(from ring rank 1, to 1\)", failure)


@pytest.mark.slow
def test_nan_among_one_rank_s_keys_ends_training_and_is_never_dropped(training):
    # Without the flag Megatron computes the iteration again, to see whether a device is at fault, and then ends too.
    flags = f"--context-parallel-size 2 {RING} --rerun-mode disabled"
    failure = training.refusal(2, flags, sabotage="nan key")
    for rank in range(2):
        # The first iteration: Megatron's count is one ahead here.
        assert re.search(rf"RuntimeError: Rank {rank}, .* iteration 2: Unexpected result nan", failure)
