"""The algorithm of a job that names none: what `--cp-comm-type` asks for, else what the heads allow."""

from collections.abc import Sequence
from typing import NamedTuple

from mindspeed_cp.config import Algorithm, ConfigurationError
from mindspeed_cp.messages import divisors, or_list


class Choice(NamedTuple):
    """An algorithm, and why it is that one.

    degree: ranks in each Ulysses group of a hybrid; None for the others. why: the end of "..., because ".
    """

    algorithm: Algorithm
    degree: int | None
    why: str


_COMM_TYPES: dict[str, Algorithm] = {
    "p2p": "megatron_cp_algo",
    "a2a": "ulysses_cp_algo",
    "a2a+p2p": "hybrid_cp_algo",
    "all_gather": "kvallgather_cp_algo",
    "allgather": "kvallgather_cp_algo",
}
"""TransformerEngine's names, and a second spelling of Megatron's: K/V passed on from rank to rank, all-to-all over the
heads, both, and all K/V gathered at once."""


def choice_by_comm_type(comm_types: Sequence[str], sizes: Sequence[int] | None, size: int) -> Choice:
    """What `--cp-comm-type` asks for.

    comm_types: one for all layers or one for each. sizes: --hierarchical-context-parallel-sizes, the ranks that
    exchange heads and those that pass K/V on. size: --context-parallel-size.

    Raises ConfigurationError for unknown kinds, for several algorithms, and for sizes that do not fit.
    """
    kinds = list(dict.fromkeys(comm_types))
    spelled = f"--cp-comm-type {' '.join(kinds)}"
    if unknown := [kind for kind in kinds if kind not in _COMM_TYPES]:
        raise ConfigurationError(f"--cp-comm-type {unknown[0]} is unknown; use {or_list(_COMM_TYPES)}.")
    if len({_COMM_TYPES[kind] for kind in kinds}) > 1:
        raise ConfigurationError(f"{spelled}: one algorithm is used in all layers; name one of them.")
    kind = kinds[0]
    if kind != "a2a+p2p":
        return Choice(_COMM_TYPES[kind], None, f"{spelled} asks for it")
    proper = [divisor for divisor in divisors(size) if 1 < divisor < size]
    listed = or_list(f"{degree} {size // degree}" for degree in proper) if proper else ""
    if sizes is None or len(sizes) != 2 or sizes[0] * sizes[1] != size:
        given = "none" if sizes is None else " ".join(map(str, sizes))
        way_out = f"use {listed}" if listed else "use --cp-comm-type a2a or p2p"
        raise ConfigurationError(
            f"{spelled} needs --hierarchical-context-parallel-sizes with two numbers whose product is "
            f"--context-parallel-size {size}, not {given}; {way_out}."
        )
    degree, ring = sizes
    why = f"{spelled} with --hierarchical-context-parallel-sizes {degree} {ring} asks for it"
    if degree == 1 or ring == 1:
        return Choice(_COMM_TYPES["p2p" if degree == 1 else "a2a"], None, why)
    return Choice("hybrid_cp_algo", degree, why)


def choice_by_heads(size: int, heads: int | None, kv_heads: int | None, tensor_parallel: int) -> Choice:
    """Ulysses, which sends least, where the heads can be split over all ranks; else over as many as can, and a ring.

    size: --context-parallel-size. heads, kv_heads: of the model; None where they are not known, or as many.
    """
    if heads is None:
        return Choice("ulysses_cp_algo", None, "nothing else was named")
    number, name = heads, f"{heads} attention heads"
    if kv_heads is not None and kv_heads != heads:
        number, name = kv_heads, f"{heads} attention heads with {kv_heads} of K/V"

    def fits(degree: int) -> bool:
        return all(each % (degree * tensor_parallel) == 0 for each in (heads, number))

    over = f"--tensor-model-parallel-size {tensor_parallel} x "
    if fits(size):
        return Choice("ulysses_cp_algo", None, f"{over}{size} ranks divide {name}")
    degree = max(degree for degree in divisors(size) if degree == 1 or fits(degree))
    if degree > 1:
        why = f"of the divisors of {size}, {degree} is the largest with which {over}{degree} divides {name}"
        return Choice("hybrid_cp_algo", degree, why)
    return Choice("megatron_cp_algo", None, f"{over}no divisor of {size} above 1 divides {name}")
