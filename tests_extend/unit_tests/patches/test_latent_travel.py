"""What stands in the way of --context-parallel-latent, and where it has no effect."""

import argparse

import pytest

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.latent_travel import latent_blockers, latent_notes


def config(**options: object) -> ContextParallelConfig:
    return ContextParallelConfig(context_parallel_size=2, context_parallel_latent="latent", **options)


def arguments(**options: object) -> argparse.Namespace:
    given = dict(
        multi_latent_attention=True,
        recompute_modules=None,
        recompute_granularity=None,
        recompute_activations=False,
        apply_rope_fusion=False,
        transformer_impl="local",
    )
    return argparse.Namespace(**{**given, **options})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            dict(recompute_modules=["mla_up_proj"], recompute_granularity="selective"),
            "--recompute-modules mla_up_proj: nothing is up-projected there; leave one of the two out.",
        ),
        (
            dict(recompute_modules=["mla_up_proj"], recompute_activations=True),
            "--recompute-modules mla_up_proj: nothing is up-projected there; leave one of the two out.",
        ),
        (
            dict(apply_rope_fusion=True),
            "fused rotary embeddings, which split the up projection's output; add --no-rope-fusion.",
        ),
        (dict(qk_clip=True), "--qk-clip: the largest scores are not collected there; use expanded."),
        (
            dict(transformer_impl="transformer_engine"),
            "--transformer-impl transformer_engine, which norms the latent in the up projection; use local, or "
            "expanded.",
        ),
    ],
)
def test_what_needs_keys_and_values_of_the_own_tokens_is_refused_beside_a_latent(options, reason):
    (blocker,) = latent_blockers(arguments(**options), config())
    assert blocker.sentence == f"--context-parallel-latent latent with {reason}"
    assert latent_blockers(arguments(**options), ContextParallelConfig(context_parallel_size=2)) == []


def test_without_latent_attention_it_is_said_to_have_no_effect():
    without = arguments(multi_latent_attention=False)
    said = ["--context-parallel-latent latent has no effect without --multi-latent-attention."]
    assert (latent_notes(without, config()), latent_blockers(without, config())) == (said, [])
    assert latent_notes(arguments(), config()) == []


def test_half_of_a_latent_is_not_to_be_kept():
    with pytest.raises(
        ConfigurationError, match="half with --context-parallel-latent latent: keys and values are made"
    ):
        config(context_parallel_algo="megatron_cp_algo", context_parallel_kv_cache_policy="half")
