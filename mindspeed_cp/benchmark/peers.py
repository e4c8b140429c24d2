"""Other implementations as baselines, where they are installed."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def deepspeed_ulysses(local: Attend, backend: str) -> Attend:
    """DeepSpeed's Ulysses over the default group. Raises ImportError where it is not installed.

    local: attention of the whole sequence for a part of the heads; both take and give tensors [B, S, N, D].
    """
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    attention = DistributedAttention(lambda q, k, v, *_, **__: local(q, k, v), dist.group.WORLD, 2, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attention(q, k, v, batch_dim_idx=0)
        return out

    return attend
