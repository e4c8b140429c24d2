"""Keys and values that a ring keeps for the backward pass: bytes against numbers written by hand, and what is saved.

That the gradients are right is in test_every_plan.py, whose table has what is kept as one of its axes.
"""

import dataclasses

import pytest
import torch

from mindspeed_cp.attention import build_attention
from mindspeed_cp.attention.exchange import KeyValues
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.layouts import EqualChunks
from mindspeed_cp.plan import AttentionPlan, Band
from mindspeed_cp.program import KV, Phase, Transport, program
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.topology import CPTopology
from unit_tests import ring_cases as cases
from unit_tests.ring_cases import case_on, grid_name
from unit_tests.ulysses_cases import inputs, shard_of

K, V = 3, 5
"""Bytes of a token's keys, and of its values."""

# Grid, rank, policy: bytes of K/V that the rank sends in the backward pass of eight tokens a rank under a causal
# zigzag, and bytes that it has kept. A rank sees the early half of each earlier rank's keys, all of each later one's.
BY_HAND = [
    ((1, 4), 1, KV.NEITHER, (8 + 4 + 8) * (K + V), 0),
    ((1, 4), 1, KV.BOTH, 0, (4 + 8 + 8) * (K + V)),
    ((1, 4), 1, KV.KEYS, (8 + 4 + 8) * V, (4 + 8 + 8) * K),
    ((1, 4), 1, KV.VALUES, (8 + 4 + 8) * K, (4 + 8 + 8) * V),
    ((2, 2), 3, KV.NEITHER, (8 + 4 + 8) * (K + V), 0),
    ((2, 2), 3, KV.BOTH, 0, (4 + 4 + 4) * (K + V)),
    ((2, 2), 3, KV.KEYS, (8 + 4 + 8) * V, (4 + 4 + 4) * K),
]


@pytest.mark.parametrize(("grid", "rank", "kept", "sent", "held"), BY_HAND)
def test_what_is_kept_does_not_travel_again_and_is_no_more_than_what_is_seen(grid, rank, kept, sent, held):
    schedule = RingSchedule(*grid)
    plan = AttentionPlan(zigzag := EqualChunks(4, 8), zigzag)
    forward, backward = (program(plan, schedule, rank, phase, kept=kept, pieces=2) for phase in Phase)
    gradients = program(plan, schedule, rank, Phase.BACKWARD).sent_bytes(K, V) - forward.sent_bytes(K, V)
    assert forward == dataclasses.replace(program(plan, schedule, rank, Phase.FORWARD, pieces=2), kept=kept)
    assert backward.sent_bytes(K, V).total() == sent + gradients.total()
    assert forward.kept_bytes(K, V) == held


@pytest.mark.parametrize(("kept", "share"), [(KV.NEITHER, 0), (KV.KEYS, 1), (KV.BOTH, 2)])
def test_bytes_of_all_ranks_under_a_causal_zigzag(kept, share):
    size, tokens = 8, 8
    plan, schedule = AttentionPlan(zigzag := EqualChunks(size, tokens), zigzag), RingSchedule(1, size)
    forward, backward = (
        sum(program(plan, schedule, rank, phase, kept=kept).sent_bytes(1, 1).total() for rank in range(size))
        for phase in Phase
    )
    # Of rank 0's block a half goes on at every hop. Half of the gradients are of blocks of which a half is seen.
    blocks = 2 * (size - 1) * (size - 0.5) * tokens
    assert forward == blocks
    assert backward == blocks - share * blocks / 2 + 2 * 0.75 * size * (size - 1) * tokens


@pytest.mark.parametrize("policy", ["full", "half"])
@pytest.mark.parametrize("topology", [CPTopology(inner=4), CPTopology(outer=2, inner=2, ulysses=2)], ids=grid_name)
def test_ranks_send_and_save_what_the_program_says(topology, policy):
    case = case_on(topology, kv_cache_policy=policy, heads=2, kv_heads=1, value_head_size=12, overlap=True)
    plan = AttentionPlan(zigzag := EqualChunks(topology.ring_size, topology.ulysses * case.tokens), zigzag)
    schedule, kept = RingSchedule(case.outer, case.inner), {"full": KV.BOTH, "half": KV.KEYS}[policy]
    sizes = case.head_size * 8, case.value_head_size * 8
    sent, saved = cases.passes(case), cases.saved_bytes(case)
    without = cases.saved_bytes(dataclasses.replace(case, kv_cache_policy=None))
    for rank in range(case.size):
        of_rank = rank // topology.ulysses
        programs = [program(plan, schedule, of_rank, phase, kept=kept) for phase in Phase]
        for each, made in zip(sent[rank], programs, strict=True):
            in_rings = sum(each.bytes[kind] for kind in ("inner", "outer", "gradients"))
            assert in_rings == made.sent_bytes(*sizes).total()
        assert saved[rank] - without[rank] == programs[0].kept_bytes(*sizes)


def test_nothing_is_sent_again_of_a_halo_that_is_kept():
    plan = AttentionPlan(shards := EqualChunks(4, 8, "contiguous"), shards, (Band(3, 0),))
    for transport in Transport:
        steps = program(plan, RingSchedule(1, 4), 2, Phase.BACKWARD, transport=transport, kept=KV.BOTH).steps
        assert not any(step.sends or step.receives for step in steps)


def test_nothing_is_kept_where_no_gradient_is_wanted():
    case, made = case_on(CPTopology(inner=2), kv_cache_policy="full"), []
    world = VirtualWorld(2, cases.VIRTUAL_TIMEOUT_S)

    def on_rank(rank):
        q, k, v = (shard_of(case, x, rank).requires_grad_() for x in inputs(case)[:3])
        with torch.no_grad():
            cases.virtual_attention(case, world, rank)(q, k, v)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyValues, "_keep", lambda key_values, step: made.append(key_values._player.program.keeps))
        world.run(on_rank)
    assert made == [{}] * 4


def test_layers_have_what_they_have_kept_themselves():
    def gradients(policy):
        case, world = case_on(CPTopology(inner=2), kv_cache_policy=policy), VirtualWorld(2, cases.VIRTUAL_TIMEOUT_S)

        def on_rank(rank):
            attention = cases.virtual_attention(case, world, rank)
            x = shard_of(case, inputs(case).q, rank).requires_grad_()
            inside = torch.sin(attention(x, x, x))
            return torch.autograd.grad(attention(inside, inside, inside).square().sum(), x)[0]

        return torch.stack(world.run(on_rank))

    torch.testing.assert_close(gradients("full"), gradients(None), rtol=0, atol=1e-12)


def test_every_nth_layer_keeps():
    def layers(**options):
        config = ContextParallelConfig(context_parallel_size=2, context_parallel_algo="megatron_cp_algo", **options)
        return [number for number in range(1, 8) if config.keeps_in(number)]

    assert layers() == []
    assert layers(context_parallel_kv_cache_policy="full") == [1, 2, 3, 4, 5, 6, 7]
    assert layers(context_parallel_kv_cache_policy="half", context_parallel_cache_interval=2) == [1, 4, 7]


@pytest.mark.parametrize("algorithm", ["ulysses_cp_algo", "kvallgather_cp_algo"])
def test_nothing_is_kept_and_that_is_said_where_there_is_no_ring(algorithm):
    config = ContextParallelConfig(
        context_parallel_size=2,
        context_parallel_algo=algorithm,
        context_parallel_kv_cache_policy="full",
        context_parallel_cache_interval=1,
    )
    assert not config.keeps_in(1)
    assert config.ineffective_flags() == [
        f"--context-parallel-{name} has no effect with --context-parallel-algo {algorithm}, which has no ring."
        for name in ("kv-cache-policy", "cache-interval")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(context_parallel_kv_cache_policy="most"),
            "--context-parallel-kv-cache-policy most is unknown; use full or half.",
        ),
        (
            dict(context_parallel_cache_interval=2),
            "--context-parallel-cache-interval 2 is of the layers that keep K/V, and none does without "
            "--context-parallel-kv-cache-policy; use full or half, or leave it out.",
        ),
        (
            dict(context_parallel_kv_cache_policy="full", context_parallel_cache_interval=-1),
            "--context-parallel-cache-interval -1 is below 0; use 0 or more.",
        ),
    ],
)
def test_a_policy_that_keeps_nothing_is_refused(options, message):
    with pytest.raises(ConfigurationError) as error:
        ContextParallelConfig(context_parallel_size=4, **options)
    assert str(error.value) == message


def test_an_interval_as_long_as_the_model_is_refused():
    config = ContextParallelConfig(
        context_parallel_size=2,
        context_parallel_algo="megatron_cp_algo",
        context_parallel_kv_cache_policy="full",
        context_parallel_cache_interval=4,
    )
    config.check_model(num_attention_heads=4, num_layers=5)
    with pytest.raises(ConfigurationError, match="4 is not below the 4 layers of the model; use 0 to 3"):
        config.check_model(num_attention_heads=4, num_layers=4)


def test_ranks_that_keep_different_things_are_told_apart():
    def setup(policy):
        config = ContextParallelConfig(
            context_parallel_algo="megatron_cp_algo", context_parallel_kv_cache_policy=policy
        )
        return build_attention(config)._setup

    assert len({setup("full"), setup("half"), setup(None)}) == 3
