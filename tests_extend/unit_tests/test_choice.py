"""The algorithm where none is named: by --cp-comm-type, else by the heads, so that each goes to one rank."""

import itertools
import re

import pytest

from mindspeed_cp.choice import choice_by_comm_type, choice_by_heads
from mindspeed_cp.config import ConfigurationError

HEADS = [(8, None), (8, 8), (32, 8), (12, 4), (6, 3), (16, 1), (40, 10), (7, 7)]


def divides(degree: int, heads: int, kv_heads: int | None, tensor_parallel: int) -> bool:
    return all(number % (degree * tensor_parallel) == 0 for number in (heads, kv_heads or heads))


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_what_the_heads_choose_is_what_divides_them_ulysses_the_largest_hybrid_or_the_ring(heads, kv_heads):
    for size, tensor_parallel in itertools.product((2, 3, 4, 6, 8, 16, 64), (1, 2, 4)):
        hybrids = [degree for degree in range(size - 1, 1, -1) if size % degree == 0]
        candidates = [("ulysses_cp_algo", None)] * divides(size, heads, kv_heads, tensor_parallel)
        candidates += [("hybrid_cp_algo", d) for d in hybrids if divides(d, heads, kv_heads, tensor_parallel)]
        choice = choice_by_heads(size, heads, kv_heads, tensor_parallel)
        assert (choice.algorithm, choice.degree) == [*candidates, ("megatron_cp_algo", None)][0], choice


def test_without_heads_it_is_ulysses():
    assert choice_by_heads(8, None, None, 1).algorithm == "ulysses_cp_algo"


@pytest.mark.parametrize(
    ("comm_types", "sizes", "algorithm", "degree"),
    [
        (["p2p"], None, "megatron_cp_algo", None),
        (["a2a"] * 12, None, "ulysses_cp_algo", None),
        (["a2a+p2p"], [2, 4], "hybrid_cp_algo", 2),
        (["a2a+p2p"], [1, 8], "megatron_cp_algo", None),
        (["a2a+p2p"], [8, 1], "ulysses_cp_algo", None),
        (["all_gather", "allgather"], None, "kvallgather_cp_algo", None),
    ],
)
def test_cp_comm_type_names_the_algorithm(comm_types, sizes, algorithm, degree):
    assert choice_by_comm_type(comm_types, sizes, 8)[:2] == (algorithm, degree)


@pytest.mark.parametrize(
    ("comm_types", "sizes", "message"),
    [
        (["ring"], None, "--cp-comm-type ring is unknown; use p2p, a2a, a2a+p2p, all_gather or allgather."),
        (["p2p", "a2a", "p2p"], None, "--cp-comm-type p2p a2a: one algorithm is used in all layers; name one of them."),
        (["a2a+p2p"], None, "whose product is --context-parallel-size 8, not none; use 2 4 or 4 2."),
        (["a2a+p2p"], [2, 2], "whose product is --context-parallel-size 8, not 2 2; use 2 4 or 4 2."),
    ],
)
def test_cp_comm_type_is_refused_with_a_way_out(comm_types, sizes, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        choice_by_comm_type(comm_types, sizes, 8)
