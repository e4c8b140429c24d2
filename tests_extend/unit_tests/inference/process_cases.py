"""What gloo ranks run for test_processes.py."""

import os
import signal

from mindspeed_cp.comm import ProcessGroupCommunicator
from mindspeed_cp.inference import agreement_of, decode_attention, decode_plan, prefix_attention, take
from unit_tests.inference.prefill_cases import inputs, plan_of


def prefill(group, case, strategy, *, agreed=False):
    """What a rank gets, and the bytes that it has sent, by operation."""
    communicator = ProcessGroupCommunicator(group)
    plan, rank = plan_of(case), communicator.rank
    q, k, v = (
        take(x, layout, rank) for x, layout in zip(inputs(case), (plan.queries, plan.keys, plan.keys), strict=True)
    )
    settings = {"strategy": strategy, "agreement": agreement_of(communicator) if agreed else None}
    state = prefix_attention(q, k, v, plan=plan, communicator=communicator, **settings)
    return state, communicator.traffic.bytes_sent


def decode(group, case, way):
    """Of the last token of each sequence, all of which lie in `case` as cached or new ones."""
    communicator = ProcessGroupCommunicator(group)
    method, layout, backend = way
    keys, rank = plan_of(case).keys, communicator.rank
    lengths = [new + cached for new, cached in zip(case.new, case.cached, strict=True)]
    q, k, v = inputs(case)
    if layout == "heads":
        q = q.tensor_split(communicator.size, dim=1)[rank]
    elif layout == "batch":
        q = q.tensor_split(communicator.size, dim=0)[rank]
    plan = decode_plan([(length - 1, length) for length in lengths], keys)
    state = decode_attention(
        *(q[:, :, -1:], take(k, keys, rank), take(v, keys, rank)),
        **{"communicator": communicator, "plan": plan, "method": method, "q_layout": layout, "backend": backend},
    )
    return state, communicator.traffic.bytes_sent.total()


def prefill_until_killed(group, case, strategy, victim):
    """The error of a rank whose peer is killed."""
    if group.rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    prefill(group, case, strategy, agreed=True)
