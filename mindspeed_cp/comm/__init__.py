"""Communication between context-parallel ranks, as objects that are passed."""

from mindspeed_cp.comm.agreement import Agreement
from mindspeed_cp.comm.communicator import Addressed, Communicator, ProcessGroupCommunicator, Sizes, Transfer
from mindspeed_cp.comm.groups import Axes, ContextParallelGroups, RingCommunicators
from mindspeed_cp.comm.traffic import Traffic
from mindspeed_cp.comm.virtual import VirtualCommunicator, VirtualWorld

__all__ = [
    "Addressed",
    "Agreement",
    "Axes",
    "Communicator",
    "ContextParallelGroups",
    "ProcessGroupCommunicator",
    "RingCommunicators",
    "Sizes",
    "Traffic",
    "Transfer",
    "VirtualCommunicator",
    "VirtualWorld",
]
