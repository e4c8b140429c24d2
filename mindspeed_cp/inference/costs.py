"""What each method sends, and which of pass-KV and pass-Q is cheaper for a cached prefix.

Letters: P ranks; T new and C cached tokens of all ranks; B sequences of S queries on a rank; N query and G key/value
heads, of key head size D and value head size V; e bytes of a number of q, k and v, and f of a state's.

Note [Choice]
    Where kernels achieve F operations a second, and links W bytes a second (the paper's C and BW; its N, N_H, N_KV and
    P are P, N, G and C here):

        queries are the smaller message where    T / (T + C) <= 2 G / N
        K/V hide behind the kernel where         T >= P F G e / (2 N W)
        algorithm 1   pass-Q where queries are the smaller message and K/V do not hide
        algorithm 5   pass-Q where               f/e T / (T + C) < 2 G / N - 4 T W / (P F e)

    Algorithm 5 counts the all-to-all of pass-Q, which nothing hides; the paper has f = e, and here a state is fp32. Its
    first clause (K/V hide) follows from the second: it is one inequality. With peak rates both are wrong where it
    matters: the published table is reproduced with 540 Tflop/s and 20 GB/s, not with 800 and 50. The published
    coefficients of the fitted rule (appendix D) give pass-Q on every row of that table, the full prefill too; none are
    built in: `fit_coefficients` finds them from one's own samples.

    Every rank has to come to the same: T and C are of all ranks, and rates those that `agreed_rates` gives.

Source: arXiv:2411.01783, algorithms 1 and 5, appendices C and D.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.comm import Communicator
from mindspeed_cp.comm.reduction import accumulation_dtype, all_reduce_numbers
from mindspeed_cp.inference.local import attention_state
from mindspeed_cp.kernels import KERNELS, KernelRegistry, TileCase
from mindspeed_cp.plan import AttentionPlan, Layout
from mindspeed_cp.program import Phase, Transport, TransposedPlan, cheapest_transport, num_tokens, program
from mindspeed_cp.schedule import RingSchedule

Pass = Literal["pass_kv", "pass_q"]


class Rates(NamedTuple):
    """What kernel and link achieve: operations and bytes a second. On all ranks the same, see `agreed_rates`."""

    flops_per_s: float
    bytes_per_s: float


class Coefficients(NamedTuple):
    """Of h = new * log T + missing * log(T / (T + C)) + constant; pass-KV where h is above 0."""

    new: float
    missing: float
    constant: float


class PrefixCase(NamedTuple):
    """What a choice depends on.

    new, cached: tokens of a sequence on all ranks; of a batch their mean, see `of`. itemsize, state_itemsize: bytes of
    a number of q, k and v, and of a state.
    """

    new: int
    cached: int
    num_ranks: int
    num_heads: int
    num_kv_heads: int
    itemsize: int = 2
    state_itemsize: int = 4

    @classmethod
    def of(cls, plan: AttentionPlan, case: TileCase) -> "PrefixCase":
        """That of a plan, and of one rank's tensors: the same on all ranks.

        Of sequences of several lengths T is the mean that hides as much behind the kernel as they do together, and
        T / (T + C) that of all of them, which bytes go by. So copies of one sequence are as that one.
        """
        queries, keys_of = (_tokens(layout) for layout in (plan.queries, plan.keys))
        every, seen = sum(queries.values()), sum(keys_of.values())
        # A sequence that is not told apart is all of them.
        pairs = sum(count * keys_of.get(sample, keys_of.get(None, 0)) for sample, count in queries.items())
        new = round(pairs / max(seen, 1))
        keys = round(new * seen / max(every, 1))
        heads, sizes = (case.num_heads, case.num_kv_heads), (case.dtype, accumulation_dtype(case.dtype))
        return cls(new, max(keys - new, 0), plan.queries.num_ranks, *heads, *(each.itemsize for each in sizes))

    @property
    def missing(self) -> float:
        """T / (T + C): the share of tokens that the cache does not have."""
        return self.new / max(self.new + self.cached, 1)

    @property
    def share(self) -> float:
        """2 G / N: K/V of a token, over its queries."""
        return 2 * self.num_kv_heads / self.num_heads


class Sample(NamedTuple):
    """Seconds of both ways that were measured for a case."""

    case: PrefixCase
    pass_kv_s: float
    pass_q_s: float


def choose_pass(
    case: PrefixCase,
    rates: Rates | None = None,
    *,
    include_all_to_all: bool = True,
    coefficients: Coefficients | None = None,
) -> Pass:
    """The cheaper way for a case; Note [Choice].

    rates: achieved; without them the fewer bytes decide. include_all_to_all: of the states of pass-Q, so that it is
    algorithm 5, else 1. coefficients: of `fit_coefficients`, which then decide alone.

    Raises ValueError for rates that are not above 0.
    """
    if not case.new:
        return "pass_kv"
    if coefficients is not None:
        new, missing = math.log(case.new), math.log(case.missing)
        h = coefficients.new * new + coefficients.missing * missing + coefficients.constant
        return "pass_kv" if h > 0.0 else "pass_q"
    states = case.missing * case.state_itemsize / case.itemsize if include_all_to_all else 0.0
    if rates is None:
        return "pass_q" if case.missing + states < case.share else "pass_kv"
    if not all(rate > 0.0 for rate in rates):
        raise ValueError(f"{rates}: give what kernel and link achieve, above 0, or no rates to compare bytes alone.")
    # What the kernel hides of K/V, in units of the queries of all tokens.
    hidden = 4 * case.new * rates.bytes_per_s / (case.num_ranks * rates.flops_per_s * case.itemsize)
    if include_all_to_all:
        return "pass_q" if states < case.share - hidden else "pass_kv"
    return "pass_q" if hidden < case.share and case.missing < case.share else "pass_kv"


def fit_coefficients(samples: Sequence[Sample]) -> Coefficients:
    """The coefficients whose h comes closest to log(pass-Q / pass-KV) over samples, by least squares.

    Where samples leave a direction open (T + C the same in all, say) the smallest ones. Raises ValueError for fewer
    than two samples, cases without new tokens, or times that are not above 0.
    """
    usable = [each for each in samples if each.case.new > 0 and all(0.0 < x < math.inf for x in each[1:])]
    if len(samples) < 2 or len(usable) < len(samples):
        raise ValueError(
            f"{len(usable)} of {len(samples)} samples have new tokens and seconds above 0; give two or more such ones."
        )
    rows = [[math.log(each.case.new), math.log(each.case.missing), 1.0] for each in samples]
    wanted = [math.log(each.pass_q_s / each.pass_kv_s) for each in samples]
    inverse = torch.linalg.pinv(torch.tensor(rows, dtype=torch.float64), rtol=1e-10)
    return Coefficients(*(inverse @ torch.tensor(wanted, dtype=torch.float64)).tolist())


def agreed_rates(rates: Rates, communicator: Communicator | None) -> Rates:
    """The lowest of all ranks' rates, on every rank: what each has measured differs, and choices must not."""
    if communicator is None:
        return rates
    rows = communicator.all_gather(torch.tensor(rates, dtype=torch.float64))
    return Rates(*rows.amin(dim=0).tolist())


def measure_rates(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    communicator: Communicator | None,
    *,
    kernels: KernelRegistry = KERNELS,
    num_bytes: int = 2**24,
    repeats: int = 3,
) -> Rates:
    """What kernel and link achieve here, the same numbers on all ranks; every rank calls it.

    q [B, N, S, D], k [B, G, T, D], v [B, G, T, V]: of a size and dtype that a rank works on at once. num_bytes: of the
    message that goes to the next rank and comes from the one before; a rank that is alone has an infinite rate.
    """
    batch, heads, num_queries, size = q.shape
    flops = 2 * batch * heads * num_queries * k.size(2) * (size + v.size(3))

    def compute() -> None:
        attention_state(q, k, v, kernels=kernels).lse.sum().item()  # Waits for an accelerator.

    kernel = flops / _fastest(compute, repeats)
    if communicator is None or communicator.size == 1:
        return Rates(kernel, math.inf)
    after, before = ((communicator.rank + step) % communicator.size for step in (1, -1))
    sent, received = (torch.ones(num_bytes, dtype=torch.uint8, device=q.device) for _ in range(2))

    def send() -> None:
        communicator.exchange(sent, after, received, before).wait()
        received[-1].item()

    return agreed_rates(Rates(kernel, num_bytes / _fastest(send, repeats)), communicator)


def _fastest(run: Callable[[], None], repeats: int) -> float:
    """Seconds, after a first time that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


class PrefillBytes(NamedTuple):
    """Bytes that one rank sends. carried: K/V, or queries. home: states of pass-Q; bias: its rows, which go with
    queries. None of both in pass-KV.
    """

    carried: int
    home: int = 0
    bias: int = 0


def pass_kv_bytes(
    plan: AttentionPlan,
    rank: int,
    case: TileCase,
    batch: int,
    transport: Transport | None = None,
    overlap: bool = True,
) -> PrefillBytes:
    """What a rank sends in `ring_pass_kv_attention`: (P-1) B L G (D + V) e, less where not all is seen.

    L: the keys of a rank, cached and new ones.
    """
    schedule = RingSchedule(1, plan.keys.num_ranks)
    transport = transport or cheapest_transport(plan, schedule, ahead=overlap)
    made = program(plan, schedule, rank, Phase.FORWARD, transport=transport)
    number = batch * case.num_kv_heads * (case.head_size + case.value_head_size)
    return PrefillBytes(made.sent().total() * number * case.dtype.itemsize)


def pass_q_bytes(
    plan: AttentionPlan,
    rank: int,
    case: TileCase,
    batch: int,
    transport: Transport | None = None,
    overlap: bool = True,
    bias: Tensor | None = None,
) -> PrefillBytes:
    """What a rank sends in `ring_pass_q_attention`: (P-1) B S N (D e + (V+1) f), less where not all is seen.

    bias: the rank's, where there is one.
    """
    turned, schedule = TransposedPlan(plan), RingSchedule(1, plan.keys.num_ranks)
    transport = transport or cheapest_transport(turned, schedule, ahead=overlap)
    made = program(turned, schedule, rank, Phase.FORWARD, transport=transport)
    rows = sum(num_tokens(turned.needed(rank, owner)) for owner in range(schedule.size) if owner != rank)
    numbers, state = batch * case.num_heads, accumulation_dtype(case.dtype).itemsize
    pairs = sum(
        num_tokens(turned.needed(other, rank)) * plan.keys.num_tokens(other)
        for other in range(schedule.size)
        if other != rank
    )
    return PrefillBytes(
        made.sent().total() * numbers * case.head_size * case.dtype.itemsize,
        rows * numbers * (case.value_head_size + 1) * state,
        0 if bias is None else pairs * bias.size(0) * bias.size(1) * bias.itemsize,
    )


class DecodeCase(NamedTuple):
    """Sizes of one decode step. queries: of each sequence, 1 but for speculation. dtype: of queries, keys, values."""

    num_ranks: int
    batch: int
    num_heads: int
    head_size: int
    queries: int = 1
    value_head_size: int | None = None
    dtype: torch.dtype = torch.bfloat16


class Sent(NamedTuple):
    """What one rank sends in a decode step, and in how many operations it waits for others."""

    bytes: int
    operations: int


def decode_sent(case: DecodeCase, method: str, backend: str) -> Sent:
    """What a rank sends in `decode_attention`: nothing of it depends on the context.

    With R = B S N rows of all queries:

        tree        a2a         2 (P-1)/P R (V+1) f           all-to-all and all-gather of states
        tree        all_reduce  2 (P-1)/P R (V+2) f           all-reduce of the maximum; of numerator and denominator
        allgather_q a2a         (P-1)/P R (D e + (V+1) f)     all-gather of queries; all-to-all of states
        allgather_q ag_rs       (P-1)/P R (D e + V f) + (P-1) R f        and all-gather of lse, reduce-scatter of out
        ring_q      a2a         (P-1)/P R (D e + (V+1) f)     P-1 hops of queries; all-to-all of states

    Rows are those that P divides, or padded to it. Raises ValueError for a method that has no such backend.
    """
    size, head_size = case.num_ranks, case.head_size
    values = head_size if case.value_head_size is None else case.value_head_size
    rows, itemsize = case.batch * case.queries * case.num_heads, case.dtype.itemsize
    state = accumulation_dtype(case.dtype).itemsize
    if size == 1:
        return Sent(0, 0)
    share = -(-rows // size)
    queries = (size - 1) * share * head_size * itemsize
    states = (size - 1) * share * (values + 1) * state
    two = size == 2  # An all-reduce is one message then.
    if (method, backend) == ("tree", "a2a"):
        return Sent(rows * (values + 1) * state if two else 2 * states, 1 if two else 2)
    if (method, backend) == ("tree", "all_reduce"):
        numbers = all_reduce_numbers(rows, size) + all_reduce_numbers(rows * (values + 1), size)
        return Sent(numbers * state, 2 if two else 4)
    if (method, backend) == ("allgather_q", "a2a"):
        return Sent(queries + states, 2)
    if (method, backend) == ("allgather_q", "ag_rs"):
        return Sent(queries + (size - 1) * rows * state + (size - 1) * share * values * state, 3)
    if (method, backend) == ("ring_q", "a2a"):
        return Sent(queries + states, size)
    raise ValueError(f"method={method!r} has no backend={backend!r}; see decode_attention.")


def _tokens(layout: Layout) -> dict[int | None, int]:
    """Of all ranks, by sample; None for all of them, where they are not told apart."""
    found: dict[int | None, int] = {}
    for rank in range(layout.num_ranks):
        for run in layout.runs(rank):
            found[run.sample] = found.get(run.sample, 0) + run.stop - run.start
    return found
