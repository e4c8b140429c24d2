"""The configuration: every rule with its exact message, and what follows from values that keep the rules."""

import dataclasses
import itertools
import re

import pytest

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig, flag
from mindspeed_cp.sharding import SequenceLayout
from mindspeed_cp.topology import CPTopology

ULYSSES, RING, HYBRID = "ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"


def configure(size=1, algorithm=ULYSSES, inner=1, degree=None, **flags):
    """A configuration, shorter to write."""
    return ContextParallelConfig(
        context_parallel_size=size,
        context_parallel_algo=algorithm,
        cp_window_size=inner,
        ulysses_degree_in_cp=degree,
        **flags,
    )


BROKEN_RULES = [
    (dict(size=0), "--context-parallel-size 0 is below 1; use 1 or more."),
    (dict(size=-2), "--context-parallel-size -2 is below 1; use 1 or more."),
    (dict(size=8, inner=0), "--cp-window-size 0 is below 1; use 1 or more."),
    (dict(inner=-1), "--cp-window-size -1 is below 1; use 1 or more."),
    (dict(size="2"), "--context-parallel-size is '2'; give a whole number."),
    (dict(size=4, algorithm=RING, inner=2.0), "--cp-window-size is 2.0; give a whole number."),
    (dict(size=4, algorithm=HYBRID, degree=True), "--ulysses-degree-in-cp is True; give a whole number, or None."),
    (dict(context_parallel_keep_outputs="no"), "--context-parallel-keep-outputs is 'no'; give True or False."),
    (
        dict(algorithm="ring"),
        "--context-parallel-algo ring is unknown; use ulysses_cp_algo, megatron_cp_algo, hybrid_cp_algo "
        "or kvallgather_cp_algo.",
    ),
    (
        dict(size=4, attention_mask_type="full"),
        "--attention-mask-type full is unknown; use causal or general.",
    ),
    (
        dict(size=8, algorithm=RING, inner=3),
        "--cp-window-size 3 does not divide the ring of 8 ranks; use 1, 2, 4 or 8.",
    ),
    (
        dict(size=8, algorithm=RING, inner=16),
        "--cp-window-size 16 does not divide the ring of 8 ranks; use 1, 2, 4 or 8.",
    ),
    (
        dict(size=8, algorithm=HYBRID, degree=2, inner=8),
        "--cp-window-size 8 does not divide the ring of 4 ranks; use 1, 2 or 4.",
    ),
    (
        dict(size=7, algorithm=HYBRID, degree=7),
        "--context-parallel-algo hybrid_cp_algo needs a --context-parallel-size with a divisor between 1 and itself, "
        "and 7 has none; use a size like 4, 6 or 8, ulysses_cp_algo or megatron_cp_algo.",
    ),
    (
        dict(size=8, algorithm=HYBRID),
        "--context-parallel-algo hybrid_cp_algo needs --ulysses-degree-in-cp; use 2 or 4.",
    ),
    (
        dict(size=4, algorithm=HYBRID),
        "--context-parallel-algo hybrid_cp_algo needs --ulysses-degree-in-cp; use 2.",
    ),
    (
        dict(size=8, algorithm=HYBRID, degree=1),
        "--ulysses-degree-in-cp 1 is not above 1; use 2 or 4, or megatron_cp_algo.",
    ),
    (
        dict(size=8, algorithm=HYBRID, degree=0),
        "--ulysses-degree-in-cp 0 is not above 1; use 2 or 4, or megatron_cp_algo.",
    ),
    (
        dict(size=8, algorithm=HYBRID, degree=-2),
        "--ulysses-degree-in-cp -2 is not above 1; use 2 or 4, or megatron_cp_algo.",
    ),
    (
        dict(size=8, algorithm=HYBRID, degree=3),
        "--ulysses-degree-in-cp 3 does not divide --context-parallel-size 8; use 2 or 4.",
    ),
    (
        dict(size=8, algorithm=HYBRID, degree=16),
        "--ulysses-degree-in-cp 16 does not divide --context-parallel-size 8; use 2 or 4.",
    ),
    (
        dict(size=8, algorithm=HYBRID, degree=8),
        "--ulysses-degree-in-cp 8 leaves no ring in --context-parallel-size 8; use 2 or 4, or ulysses_cp_algo.",
    ),
]


@pytest.mark.parametrize(("flags", "message"), BROKEN_RULES, ids=[str(flags) for flags, _ in BROKEN_RULES])
def test_broken_rule_names_flag_value_rule_and_way_out(flags, message):
    with pytest.raises(ConfigurationError) as refusal:
        configure(**flags)
    assert str(refusal.value) == message
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize(
    ("flags", "topology"),
    [
        (dict(), CPTopology()),
        (dict(size=8), CPTopology(ulysses=8)),
        (dict(size=8, algorithm=RING), CPTopology(inner=8)),
        (dict(size=8, algorithm=RING, inner=2), CPTopology(outer=4, inner=2)),
        (dict(size=8, algorithm=RING, inner=8), CPTopology(inner=8)),
        (dict(size=16, algorithm=HYBRID, degree=2), CPTopology(inner=8, ulysses=2)),
        (dict(size=16, algorithm=HYBRID, degree=2, inner=4), CPTopology(outer=2, inner=4, ulysses=2)),
        (dict(size=16, algorithm=HYBRID, degree=8), CPTopology(inner=2, ulysses=8)),
        # What another algorithm reads changes nothing.
        (dict(size=8, inner=3, degree=5), CPTopology(ulysses=8)),
        (dict(size=8, algorithm=RING, degree=5), CPTopology(inner=8)),
    ],
)
def test_topology_of_each_algorithm(flags, topology):
    config = configure(**flags)
    assert config.topology == topology
    assert config.ulysses_size == topology.ulysses


def test_every_accepted_configuration_spans_its_ranks():
    accepted = 0
    for size, algorithm in itertools.product(range(2, 17), (ULYSSES, RING, HYBRID)):
        for inner, degree in itertools.product(range(1, 17), (None, *range(1, 17))):
            try:
                config = configure(size, algorithm, inner, degree)
            except ConfigurationError:
                continue
            accepted += 1
            assert config.topology.size == size
            assert algorithm == ULYSSES or inner == 1 or config.topology.inner == inner
            assert algorithm != HYBRID or config.topology.ulysses == degree
    assert accepted > 1000


@pytest.mark.parametrize("flags", [dict(algorithm=RING, inner=2), dict(algorithm=HYBRID, degree=2)])
def test_one_rank_has_the_topology_of_one_rank_whatever_the_other_flags(flags):
    assert configure(**flags).topology == CPTopology()


def test_layout_is_megatron_s_zigzag_over_all_ranks():
    for algorithm, degree in ((ULYSSES, None), (RING, None), (HYBRID, 2)):
        assert configure(8, algorithm, degree=degree).layout == SequenceLayout(size=8, kind="zigzag")


ALL_SET = dict(use_cp_send_recv_overlap=True, attention_mask_type="general", megatron_cp_in_bnsd=True)


def without_context_parallelism(name):
    return f"{name} has no effect with --context-parallel-size 1, where attention stays Megatron's own."


@pytest.mark.parametrize(
    ("flags", "sentences"),
    [
        (dict(), []),
        (dict(size=8), []),
        (dict(size=8, attention_mask_type="general"), []),
        (
            dict(algorithm=RING, inner=2, degree=3, **ALL_SET),
            [
                without_context_parallelism(name)
                for name in (
                    "--context-parallel-algo",
                    "--cp-window-size",
                    "--ulysses-degree-in-cp",
                    "--use-cp-send-recv-overlap",
                    "--attention-mask-type",
                    "--megatron-cp-in-bnsd",
                )
            ],
        ),
        (
            dict(size=8, inner=2, degree=3, **ALL_SET),
            [
                "--cp-window-size has no effect with --context-parallel-algo ulysses_cp_algo, which has no ring.",
                "--use-cp-send-recv-overlap has no effect with --context-parallel-algo ulysses_cp_algo, "
                "which has no ring.",
                "--ulysses-degree-in-cp has no effect with --context-parallel-algo ulysses_cp_algo; "
                "only hybrid_cp_algo reads it.",
            ],
        ),
        (
            dict(size=8, algorithm=RING, inner=2, degree=3, **ALL_SET),
            [
                "--ulysses-degree-in-cp has no effect with --context-parallel-algo megatron_cp_algo; "
                "only hybrid_cp_algo reads it.",
            ],
        ),
        (dict(size=8, algorithm=HYBRID, inner=2, degree=2, **ALL_SET), []),
        (dict(size=8, algorithm=HYBRID, degree=2, use_cp_send_recv_overlap=True), []),
    ],
)
def test_flags_without_effect_are_said(flags, sentences):
    assert configure(**flags).ineffective_flags() == sentences


BROKEN_MODELS = [
    (
        dict(size=4),
        dict(num_attention_heads=3),
        "--num-attention-heads 3 with --tensor-model-parallel-size 1 gives each rank 3, fewer than the Ulysses degree "
        "4 (--context-parallel-size), which wants one at least for each of its ranks; use hybrid_cp_algo with a "
        "--ulysses-degree-in-cp of 2, or megatron_cp_algo.",
    ),
    (
        dict(size=4),
        dict(num_attention_heads=8, num_query_groups=1, tensor_model_parallel_size=8),
        "--num-attention-heads 8 with --tensor-model-parallel-size 8 gives each rank 1, fewer than the Ulysses degree "
        "4 (--context-parallel-size), which wants one at least for each of its ranks; use megatron_cp_algo.",
    ),
    (
        dict(size=16, algorithm=HYBRID, degree=4),
        dict(num_attention_heads=4, tensor_model_parallel_size=2),
        "--num-attention-heads 4 with --tensor-model-parallel-size 2 gives each rank 2, fewer than the Ulysses degree "
        "4 (--ulysses-degree-in-cp), which wants one at least for each of its ranks; use a --ulysses-degree-in-cp of "
        "2, or megatron_cp_algo.",
    ),
    (
        dict(size=4, algorithm=RING),
        dict(num_attention_heads=8, num_query_groups=3),
        "--num-query-groups 3 does not divide --num-attention-heads 8; use 1, 2, 4 or 8.",
    ),
]


@pytest.mark.parametrize(("flags", "model", "message"), BROKEN_MODELS)
def test_model_that_cannot_be_split_is_refused(flags, model, message):
    with pytest.raises(ConfigurationError) as refusal:
        configure(**flags).check_model(**model)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("flags", "model"),
    [
        (dict(), dict(num_attention_heads=7, tensor_model_parallel_size=2)),
        (dict(size=4), dict(num_attention_heads=8, tensor_model_parallel_size=2)),
        (dict(size=4), dict(num_attention_heads=8, num_query_groups=4)),
        (dict(size=4), dict(num_attention_heads=8, num_query_groups=2)),
        (dict(size=4), dict(num_attention_heads=10, num_query_groups=1, tensor_model_parallel_size=2)),
        (dict(size=8, algorithm=RING), dict(num_attention_heads=3, num_query_groups=1)),
        (dict(size=16, algorithm=HYBRID, degree=2), dict(num_attention_heads=6, num_query_groups=2)),
    ],
)
def test_model_that_can_be_split_is_accepted(flags, model):
    configure(**flags).check_model(**model)


@pytest.mark.parametrize(
    ("flags", "model"),
    [
        (dict(size=8), dict(num_attention_heads=10, tensor_model_parallel_size=4)),
        (dict(size=16, algorithm=HYBRID, degree=8), dict(num_attention_heads=12, tensor_model_parallel_size=2)),
        (dict(size=4), dict(num_attention_heads=1)),
    ],
)
def test_way_out_of_a_head_error_is_accepted(flags, model):
    config = configure(**flags)
    with pytest.raises(ConfigurationError) as refusal:
        config.check_model(**model)
    way_out = str(refusal.value).partition("; use ")[2]
    assert way_out.endswith("megatron_cp_algo.")
    for degree in map(int, re.findall(r"\d+", way_out)):
        hybrid = dataclasses.replace(config, context_parallel_algo=HYBRID, ulysses_degree_in_cp=degree)
        hybrid.check_model(**model)


def test_ring_accepts_fewer_query_groups_than_tensor_parallel_ranks():
    configure(4, RING).check_model(num_attention_heads=8, num_query_groups=2, tensor_model_parallel_size=4)


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ContextParallelConfig().context_parallel_size = 2
    with pytest.raises(TypeError, match="positional"):
        ContextParallelConfig(2)


def test_flags_and_defaults_are_those_of_the_design():
    assert {flag(f.name): f.default for f in dataclasses.fields(ContextParallelConfig)} == {
        "--context-parallel-size": 1,
        "--context-parallel-algo": "ulysses_cp_algo",
        "--cp-window-size": 1,
        "--ulysses-degree-in-cp": None,
        "--use-cp-send-recv-overlap": False,
        "--context-parallel-kv-cache-policy": None,
        "--context-parallel-cache-interval": 0,
        "--context-parallel-latent": "expanded",
        "--context-parallel-keep-outputs": False,
        "--attention-mask-type": "causal",
        "--megatron-cp-in-bnsd": False,
        "--context-parallel-kernels": (),
        "--use-alibi": False,
        "--attention-on-one-rank": False,
    }


def test_every_flag_of_ours_has_a_help_text():
    ours = [f for f in dataclasses.fields(ContextParallelConfig) if f.name != "context_parallel_size"]
    assert all(f.metadata["help"].endswith(".") for f in ours)
