"""What travels when: the steps of one rank, with the messages that it sends and receives at each. No torch.

Who sees whom is the plan's (plan/), in which order owners are met is the schedule's (schedule.py).
"""

from mindspeed_cp.program.steps import KV, Axis, BlockName, Exchange, Message, Phase, Program, Step, num_tokens
from mindspeed_cp.program.transports import Transport, cheapest_transport, program
from mindspeed_cp.program.transposed import Carried, TransposedPlan, transposed

__all__ = [
    "KV",
    "Axis",
    "BlockName",
    "Carried",
    "Exchange",
    "Message",
    "Phase",
    "Program",
    "Step",
    "Transport",
    "TransposedPlan",
    "cheapest_transport",
    "num_tokens",
    "program",
    "transposed",
]
