"""One attention of a prefill, once its arguments are in order: the same for K/V that travel and for queries."""

from dataclasses import dataclass

from torch import Tensor

from mindspeed_cp.attention import RingCommunicators
from mindspeed_cp.comm import Communicator
from mindspeed_cp.inference.local import Asked
from mindspeed_cp.inference.over_ranks import OverRanks
from mindspeed_cp.kernels import TileCase
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.program import Transport
from mindspeed_cp.schedule import RingSchedule


@dataclass(frozen=True)
class RingCall(OverRanks):
    """What is asked of a plain ring of all ranks; see `ring_pass_kv_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: AttentionPlan
    communicator: Communicator | None
    asked: Asked
    case: TileCase
    transport: Transport | None
    overlap: bool
    pieces: int

    @property
    def schedule(self) -> RingSchedule:
        """A plain ring of all ranks."""
        return RingSchedule(1, self.size)

    @property
    def communicators(self) -> RingCommunicators | None:
        """No gradients travel, and nothing between inner rings: one serves for all."""
        return None if self.communicator is None else RingCommunicators(*[self.communicator] * 3)
