"""Recomputation, kept K/V and latents in blocks of megatron.core's layers: bytes of each pass, gradients of CP = 1."""

from importlib.util import find_spec

import pytest

from system_tests.block_cases import HEADS, HIDDEN, LATENT, LAYERS, RECOMPUTE, SEQUENCE, BlockRun

needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
pytestmark = needs_megatron

RING = {"context_parallel_algo": "megatron_cp_algo"}
KEEP_OUTPUTS = {"context_parallel_keep_outputs": True}
FULL = {"context_parallel_kv_cache_policy": "full"}
EVERY_OTHER = FULL | {"context_parallel_cache_interval": 1}


def totals(runs: list[list[BlockRun]]) -> list[tuple[int, int]]:
    """Bytes of all ranks in the two passes of each variant."""
    for run in (run for of_rank in runs for run in of_rank):
        assert run.left == 0 and run.difference < 1e-12, run
    return [(sum(run.forward for run in each), sum(run.backward for run in each)) for each in zip(*runs, strict=True)]


def test_what_is_recomputed_and_what_is_kept_sends_nothing_again(training):
    variants = [
        (RING, {}),
        (RING, RECOMPUTE),
        (RING | KEEP_OUTPUTS, RECOMPUTE),
        (RING | EVERY_OTHER, {}),
        (RING | KEEP_OUTPUTS | EVERY_OTHER, RECOMPUTE),
    ]
    plain, again, kept, cached, both = totals(training.run_blocks(2, 1, variants))
    assert again == (plain[0], plain[0] + plain[1])
    assert kept == plain
    # Of two ranks the first has the early half of its K/V sent, the other all of it; layers 1 and 3 keep what comes.
    layer = (SEQUENCE // 4 + SEQUENCE // 2) * 2 * HIDDEN * 8
    assert HEADS * 8 == HIDDEN and LAYERS == 3
    assert both == cached == (plain[0], plain[1] - 2 * layer)


def test_a_latents_gradient_is_of_the_heads_of_all_tensor_parallel_ranks(training):
    variants = [(RING | {"context_parallel_latent": "latent"}, LATENT)]
    totals(training.run_blocks(4, 2, variants))
