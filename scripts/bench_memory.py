"""Peak memory of a rank's attention, forward and backward pass, counted: ours, and others' that are installed.

python scripts/bench_memory.py --tokens 8192 --heads 8 --head-size 64

Bytes are counted operation by operation (Note [Peak memory] in mindspeed_cp/benchmark/memory.py): no timing, no GPU,
the same on every machine. Counted beside ours are DeepSpeed's and yunchang's Ulysses, ring_flash_attn and yunchang's
USP, as far as they can be imported here; flash_attn itself need not be.
"""

import argparse

import torch.distributed as dist

from mindspeed_cp.benchmark.cases import Algorithm
from mindspeed_cp.benchmark.memory import Counted, MemoryCase, count, join_fake_group, ours, peers
from mindspeed_cp.topology import CPTopology

RANKS = 4
OURS = {
    "Ulysses": (CPTopology(ulysses=4), False),
    "ring": (CPTopology(inner=4), False),
    "ring, overlap": (CPTopology(inner=4), True),
    "double ring": (CPTopology(outer=2, inner=2), False),
    "double ring, overlap": (CPTopology(outer=2, inner=2), True),
    "hybrid 2x2": (CPTopology(inner=2, ulysses=2), False),
    "hybrid 2x2, overlap": (CPTopology(inner=2, ulysses=2), True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of all ranks")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    args = parser.parse_args()
    case = MemoryCase(RANKS, args.tokens, args.heads, args.head_size)
    print("| MB of the fullest rank | peak | kernel workspace | held between the passes | copied forward | backward |")
    print("|---|---|---|---|---|---|")
    for name, (topology, overlap) in OURS.items():
        config = Algorithm(name=name, topology=topology, overlap=overlap).config
        _print(name, case, [_of_rank(case, rank, lambda _, rank, made=config: ours(made, rank)) for rank in _ranks()])
    for name, make in peers().items():
        _print(name, case, [_of_rank(case, rank, make) for rank in _ranks()])
    dist.destroy_process_group()


def _ranks() -> range:
    return range(RANKS)


def _of_rank(case: MemoryCase, rank: int, make) -> Counted:
    join_fake_group(rank, RANKS)
    return count(make(case, rank), case.inputs())


def _print(name: str, case: MemoryCase, ranks: list[Counted]) -> None:
    fullest = max(ranks, key=lambda one: one.peak)
    numbers = (fullest.peak, case.workspace, fullest.saved, fullest.copied_forward, fullest.copied_backward)
    print(f"| {name} | {' | '.join(f'{number / 1e6:.1f}' for number in numbers)} |")


if __name__ == "__main__":
    main()
