"""How many pieces of the heads a ring should work on, for links and a kernel of given speed."""

from mindspeed_cp.planner.attention import AttentionPass, AttentionShape
from mindspeed_cp.planner.clock import predicted_seconds
from mindspeed_cp.planner.network import Network
from mindspeed_cp.program import Phase
from mindspeed_cp.topology import CPTopology

LEAST_GAIN = 0.01
"""More pieces are more and smaller kernels and messages: what they gain has to be more than a prediction leaves out."""


def best_pieces(
    network: Network, topology: CPTopology, shape: AttentionShape, *, flops_per_s: float, launch_s: float = 0.0
) -> int:
    """The number of pieces with which both passes of a ring with overlap are soonest done; see Note [Pieces].

    Of the divisors of a rank's K/V heads, the smallest within 1 % of the best: 1 where what travels hides behind
    kernels as it is, or nothing travels. flops_per_s, launch_s: see AttentionPass.
    """
    heads = shape.num_kv_heads // topology.ulysses
    if topology.ring_size == 1:
        return 1

    def seconds(pieces: int) -> float:
        passes = (
            AttentionPass(
                topology=topology,
                shape=shape,
                phase=phase,
                flops_per_s=flops_per_s,
                launch_s=launch_s,
                overlap=True,
                pieces=pieces,
            )
            for phase in Phase
        )
        return sum(predicted_seconds(network, each.events) for each in passes)

    by_pieces = {pieces: seconds(pieces) for pieces in range(1, heads + 1) if heads % pieces == 0}
    limit = min(by_pieces.values()) * (1 + LEAST_GAIN)
    return next(pieces for pieces, time in by_pieces.items() if time <= limit)
