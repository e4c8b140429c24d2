"""--context-parallel-keep-outputs: when Megatron's checkpoint keeps what attention gives, and when it is refused."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.recomputation import recomputation_patches, refuse_kept_outputs

RING = ContextParallelConfig(context_parallel_size=2, context_parallel_algo="megatron_cp_algo")
KEEPING = ContextParallelConfig(
    context_parallel_size=2, context_parallel_algo="megatron_cp_algo", context_parallel_keep_outputs=True
)


def arguments(**given: Any) -> Namespace:
    return Namespace(
        **{"recompute_granularity": None, "recompute_activations": False, "recompute_modules": None} | given
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "no --recompute-granularity"),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, "--recompute-modules mlp"),
    ],
)
def test_outputs_kept_for_no_recomputation_are_refused(given, named):
    with pytest.raises(ConfigurationError, match=f"--context-parallel-keep-outputs with {named}.*leave it out"):
        refuse_kept_outputs(arguments(**given), KEEPING)


@pytest.mark.parametrize(
    "given",
    [
        {"recompute_granularity": "full"},
        {"recompute_granularity": "selective"},
        {"recompute_activations": True},
        {"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]},
    ],
)
def test_a_recomputation_of_attention_is_taken(given):
    refuse_kept_outputs(arguments(**given), KEEPING)


@pytest.mark.parametrize(("config", "keeps"), [(None, False), (RING, False), (KEEPING, True)])
def test_a_checkpoint_keeps_where_the_flag_says_so(config, keeps):
    plugin = Plugin(config=config)
    (patch,) = recomputation_patches(plugin)

    def checkpoint(function: Callable[[], bool], distributed: bool) -> bool:
        assert distributed
        return function()

    assert patch.in_place_of(checkpoint)(lambda: plugin.recomputation.is_within, True) is keeps
