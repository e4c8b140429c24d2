"""Who sees whom and what travels are each said once: leave out a part, and everything that reads it changes."""

from argparse import Namespace
from collections.abc import Callable, Iterator

import pytest
import torch

from mindspeed_cp.attention import planned
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches import kernel_forecast
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.planner import AttentionPass, AttentionShape, Network, predicted_bytes, predicted_seconds
from mindspeed_cp.planner.attention import ring_program
from mindspeed_cp.planner.drawings import draw_chunks, draw_ring
from mindspeed_cp.program import Phase, rotation
from mindspeed_cp.topology import CPTopology
from unit_tests.ring_cases import attend_virtually, case_on

CACHES = (planned.plan_of, ring_program)
SHAPE = AttentionShape(num_tokens=64, num_heads=2, num_kv_heads=2, head_size=8)


def ring_pass(phase: Phase) -> AttentionPass:
    return AttentionPass(topology=CPTopology(inner=4), shape=SHAPE, phase=phase, flops_per_s=1e5)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """Plans and programs are made anew within a test and after it."""
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def attention() -> object:
    torch.manual_seed(1)
    return [shard.out for shard in attend_virtually(case_on(CPTopology(inner=4)))]


def sent_bytes() -> object:
    return ring_pass(Phase.BACKWARD).num_bytes()


def predicted() -> object:
    forward = ring_pass(Phase.FORWARD)
    network = Network(num_ranks=4, ranks_per_node=1, fast_mbit=1.0, slow_mbit=1.0)
    sent = [predicted_bytes(network, forward.events(rank), rank) for rank in range(4)]
    return predicted_seconds(network, forward.events), sent


def drawing() -> object:
    return draw_chunks(4), draw_ring(1, 4)


def parse_time_check() -> object:
    config = ContextParallelConfig(context_parallel_size=2, context_parallel_algo="megatron_cp_algo")
    model = dict(num_attention_heads=2, hidden_size=16, seq_length=16, kv_channels=None, multi_latent_attention=False)
    args = Namespace(
        **model,
        group_query_attention=False,
        tensor_model_parallel_size=1,
        bf16=False,
        fp16=False,
        attention_dropout=0.0,
        distributed_backend="gloo",
        window_size=None,
    )
    return [call.case for call in kernel_forecast._calls(args, config, "cpu")]


READERS = [attention, sent_bytes, predicted, drawing, parse_time_check]


def value_of(reader: Callable[[], object]) -> object:
    """What it says now; how it fails counts as an answer."""
    for cache in CACHES:
        cache.cache_clear()
    try:
        return reader()
    except (AssertionError, KeyError, RuntimeError) as error:
        return type(error).__name__


def differs(before: object, after: object) -> bool:
    if isinstance(before, list) and isinstance(after, list) and isinstance(before[0], torch.Tensor):
        return not all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    return before != after


@pytest.mark.parametrize("reader", READERS)
def test_tiles_that_are_left_out_are_missed_by_everything(monkeypatch, reader):
    before, tiles = value_of(reader), AttentionPlan.tiles

    def without_some(self: AttentionPlan, mine: int, theirs: int, **options: bool) -> object:
        return () if theirs == 0 and mine else tiles(self, mine, theirs, **options)

    monkeypatch.setattr(AttentionPlan, "tiles", without_some)
    monkeypatch.setattr(VirtualWorld, "__init__", quick_world)
    assert differs(before, value_of(reader))


def quick_world(world: VirtualWorld, size: int, timeout_s: float = 0.0, make=VirtualWorld.__init__) -> None:
    """Ranks that wait for a message which nobody sends find out soon."""
    make(world, size, 2.0)


@pytest.mark.parametrize("reader", READERS[:-1])
def test_messages_that_are_left_out_are_missed_by_everything(monkeypatch, reader):
    before, message = value_of(reader), rotation.message

    def without_some(peer: int, owner: int, *rest: object) -> object:
        return None if owner == 3 else message(peer, owner, *rest)

    monkeypatch.setattr(rotation, "message", without_some)
    monkeypatch.setattr(VirtualWorld, "__init__", quick_world)
    assert differs(before, value_of(reader))
