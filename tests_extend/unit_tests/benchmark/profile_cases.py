"""What ranks of an emulated cluster see in a profile of theirs."""

import torch

from mindspeed_cp.benchmark import ranks
from mindspeed_cp.planner import AttentionShape


def exposed_in_profile(algorithm: str, case: AttentionShape) -> float:
    """Seconds that this rank waits for messages in both passes, see ranks.run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ranks.run(algorithm, case, look_at_memory=False, check=False)
    waits = (event for event in profile.key_averages() if event.key.startswith("ring: wait for"))
    return float(sum(event.cpu_time_total for event in waits)) / 1e6
