"""Communication between context-parallel ranks, as objects that are passed."""

from mindspeed_cp.comm.communicator import Communicator, ProcessGroupCommunicator
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.traffic import Traffic

__all__ = ["Communicator", "ContextParallelGroups", "ProcessGroupCommunicator", "Traffic"]
