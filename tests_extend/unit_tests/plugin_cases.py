"""What ranks do with a plugin and groups of their own."""

from typing import NamedTuple
from unittest import mock

import torch.distributed as dist

from mindspeed_cp.comm import ContextParallelGroups
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches import plugin as plugin_module
from mindspeed_cp.patches.document_rule import DocumentRule
from mindspeed_cp.patches.plugin import Plugin


class Layers(NamedTuple):
    """Process groups made for a rank's first layer and for its others, left at the end, and why not to restore."""

    first: int
    further: int
    left: int
    reason_to_stay: str | None


def build_layers(group: dist.ProcessGroup | None) -> Layers:
    """As many layers on each rank as its number is high, at least one, over a group that is not Megatron's."""
    config = ContextParallelConfig(
        context_parallel_size=2, context_parallel_algo="megatron_cp_algo", use_cp_send_recv_overlap=True
    )
    if group is None:
        ContextParallelGroups.take_part(config.topology, overlap=True)
        return Layers(0, 0, 0, None)
    registered = dist.distributed_c10d._world.pg_map
    plugin, before = Plugin(config), set(registered)
    first = plugin.groups_over(group)
    made = set(registered) - before
    for _ in range(dist.get_rank()):
        assert plugin.groups_over(group) is first
    further = set(registered) - before - made
    reason = plugin.reason_to_stay()
    dist.barrier(group)  # Nobody closes a connection that another one is still making.
    plugin.drop_groups()
    assert plugin.reason_to_stay() is None
    return Layers(len(made), len(further), len(set(registered) - before), reason)


def join_stages(_: dist.ProcessGroup | None) -> tuple[int, int]:
    """Process groups made for the pipeline stages of a job whose backend carries no tensors of the CPU, and left."""
    plugin = Plugin(ContextParallelConfig(attention_on_one_rank=True), document_rule=DocumentRule())
    registered, stages = dist.distributed_c10d._world.pg_map, dist.group.WORLD
    assert stages is not None
    before = set(registered)
    with mock.patch.object(plugin_module, "carries_cpu_tensors", return_value=False):
        plugin.join_pipeline(stages)
    made = set(registered) - before
    assert plugin.stages.pipeline is not None and plugin.stages.pipeline.group in made
    dist.barrier()  # Nobody closes a connection that another one is still making.
    plugin.drop_groups()
    return len(made), len(set(registered) - before)
