"""What it costs that ranks agree before they send: time, messages and bytes of one agreement over gloo on this machine.

    python scripts/bench_agreement.py --ranks 2 4 8

Every call of attention begins with one (Note [Agreement] in mindspeed_cp/comm/agreement.py); Megatron's layers share
one for each micro-batch. `call` is what a call adds on the host where nothing has to be asked. Rank 0's clock.
"""

import argparse
import statistics
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from mindspeed_cp.attention import build_attention
from mindspeed_cp.attention.call import ContextParallelAttention
from mindspeed_cp.attention.interface import OUTPUT, Told
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.testing.rank_pool import LIMIT_S, RankPool


class Cost(NamedTuple):
    """Of one agreement on one rank: seconds at best and in the median, messages and bytes sent; `call` in seconds."""

    best: float
    median: float
    messages: float
    bytes: float
    call: float


def join(rank: int, folder: str, size: int) -> None:
    """Make the world; called on each rank before anything else."""
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=LIMIT_S), size, rank)


def measure(size: int, calls: int) -> Cost:
    """On one of `size` ranks, over so many agreements."""
    config = ContextParallelConfig(context_parallel_size=size, context_parallel_algo="megatron_cp_algo")
    attention = build_attention(config, dist.group.WORLD)
    agreement = attention.agreement
    assert agreement is not None
    q = torch.zeros(1, 8, 256, 128)
    words = "q (1, 8, 256, 128), k (1, 8, 256, 128), v (1, 8, 256, 128), float32, no mask"
    for _ in range(calls // 10):
        agreement.reach(words)
    traffic = agreement.communicator.traffic  # type: ignore[attr-defined]
    traffic.clear()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        agreement.reach(words)
        seconds.append(time.perf_counter() - start)
    with agreement.once():
        attention.prepare(OUTPUT, q, (q, q), Told(scale=0.1))
        call = _seconds_of_a_call(attention, q, calls)
    return Cost(
        min(seconds),
        statistics.median(seconds),
        traffic.calls["exchange"] / (calls + 1),
        traffic.bytes_sent["exchange"] / (calls + 1),
        call,
    )


def _seconds_of_a_call(attention: ContextParallelAttention, q: torch.Tensor, calls: int) -> float:
    """Everything that comes before the algorithm itself, within a micro-batch that has been agreed on."""
    start = time.perf_counter()
    for _ in range(calls):
        attention.prepare(OUTPUT, q, (q, q), Told(scale=0.1))
    return (time.perf_counter() - start) / calls


def main() -> None:
    """Read the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="sizes of the group")
    parser.add_argument("--calls", type=int, default=300, help="agreements to measure")
    args = parser.parse_args()
    print("ranks  messages  bytes  best us  median us  call us")
    for size in args.ranks:
        pool = RankPool(size, ["torch"], _Join(size))
        try:
            cost = pool.call(range(size), LIMIT_S, measure, size, args.calls)[0]
        finally:
            pool.close()
        times = [f"{1e6 * seconds:.0f}" for seconds in (cost.best, cost.median, cost.call)]
        print(f"{size:5d}  {cost.messages:8.0f}  {cost.bytes:5.0f}  {times[0]:>7}  {times[1]:>9}  {times[2]:>7}")


class _Join(NamedTuple):
    """`join` for a world of one size; it travels to the ranks by value."""

    size: int

    def __call__(self, rank: int, folder: str) -> None:
        join(rank, folder, self.size)


if __name__ == "__main__":
    main()
