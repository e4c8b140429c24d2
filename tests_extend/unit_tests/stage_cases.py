"""What pipeline stages do with the documents of their micro-batches."""

import torch
import torch.distributed as dist

from mindspeed_cp.patches.stages import Pipeline, StageDocuments

PARTS = 2
DOCUMENTS = (
    torch.tensor([[0, 3, 6]], dtype=torch.int32),
    None,
    torch.tensor([[0, 6, 6], [0, 2, 6]], dtype=torch.int32),
)


def pass_on(group: dist.ProcessGroup) -> list[list[object]]:
    """Documents at hand in each part of this stage, by micro-batch; the first stage finds them in its first part.

    Micro-batches come to a part in groups of two, as in an interleaved schedule.
    """
    stages = StageDocuments(Pipeline(dist.get_process_group_ranks(group), group))
    met: list[list[object]] = [[] for _ in range(PARTS)]
    for numbers in ((0, 1), (2,)):
        for part in range(PARTS):
            for number in numbers:
                with stages.one_micro_batch(part, PARTS, is_first=number == 0):
                    if part == 0 and dist.get_rank(group) == 0:
                        stages.at_hand = DOCUMENTS[number]
                    met[part].append(None if stages.at_hand is None else stages.at_hand.tolist())
                assert stages.at_hand is None
    dist.barrier(group)
    return met
