"""Communication between context-parallel ranks, as objects that are passed."""

from mindspeed_cp.comm.agreement import Agreement, Subject
from mindspeed_cp.comm.communicator import (
    LARGE,
    Addressed,
    AgreeingCommunicator,
    Communicator,
    LostRank,
    ProcessGroupCommunicator,
    Sizes,
    Transfer,
)
from mindspeed_cp.comm.groups import Axes, ContextParallelGroups, RingCommunicators, groups_of_world
from mindspeed_cp.comm.traffic import Traffic
from mindspeed_cp.comm.virtual import VirtualCommunicator, VirtualWorld

__all__ = [
    "LARGE",
    "Addressed",
    "AgreeingCommunicator",
    "Agreement",
    "Axes",
    "Communicator",
    "ContextParallelGroups",
    "LostRank",
    "ProcessGroupCommunicator",
    "RingCommunicators",
    "Sizes",
    "Subject",
    "Traffic",
    "Transfer",
    "VirtualCommunicator",
    "VirtualWorld",
    "groups_of_world",
]
