"""Masks that Megatron hands to some layers and not to others: attention stays that of CP = 1."""

from importlib.util import find_spec

import pytest

from mindspeed_cp.patches.layer_attention import WITHOUT_MASK
from system_tests.compare_losses import largest_difference
from system_tests.training_cases import HAS_TRAINING, ITERATIONS

needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
needs_training = pytest.mark.skipif(not HAS_TRAINING, reason="megatron.training is not installed")

RING = {"context_parallel_algo": "megatron_cp_algo"}


@needs_megatron
@pytest.mark.every_release
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, {}),
        (2, RING),
        (4, RING | {"cp_window_size": 2, "use_cp_send_recv_overlap": True}),
        (4, {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}),
    ],
    ids=["ulysses", "ring", "double ring", "hybrid"],
)
def test_layer_that_is_given_no_mask_attends_as_megatrons_own_with_cp_1(training, ranks, flags):
    for differences in training.compare_masks(ranks, flags, list(WITHOUT_MASK)):
        assert differences.keys() == {*WITHOUT_MASK, "given"}
        assert max(differences.values()) < 1e-5, differences


NO_MASK = "--no-create-attention-mask-in-dataloader"
MIDDLE_STAGES = "--pipeline-model-parallel-size 4 --num-layers 4"


@needs_training
@pytest.mark.parametrize(
    ("beside", "ranks", "size", "algorithm"),
    [
        (NO_MASK, 1, 2, "megatron_cp_algo"),
        pytest.param(f"{NO_MASK} --mtp-num-layers 1", 1, 2, "ulysses_cp_algo", marks=pytest.mark.slow),
        pytest.param(
            f"{MIDDLE_STAGES} --mtp-num-layers 1 --use-distributed-optimizer",
            4,
            2,
            "ulysses_cp_algo",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_losses_equal_those_of_cp_1_where_layers_get_no_mask(training, beside, ranks, size, algorithm):
    flags = f"--context-parallel-size {size} --context-parallel-algo {algorithm} --attention-mask-type general"
    reference = training.losses(ranks, beside)
    assert len(reference) == ITERATIONS
    assert largest_difference(reference, training.losses(ranks * size, f"{beside} {flags}")) <= 1e-5
