"""The algorithm of a job: the one that is named, else what --cp-comm-type asks for, else what the heads allow."""

import argparse

from mindspeed_cp.choice import Choice, choice_by_comm_type, choice_by_heads
from mindspeed_cp.config import ConfigurationError, ContextParallelConfig, flag

_READ_BY = {"cp_window_size": "megatron_cp_algo or hybrid_cp_algo", "ulysses_degree_in_cp": "hybrid_cp_algo"}
"""Options that say something about one algorithm, with those that read them."""


class _Unsaid(list[str]):
    """The default of --cp-comm-type: equal to a list that the user gives, and no choice of his."""


def mark_default(parser: argparse.ArgumentParser) -> None:
    """Let `choose_algorithm` tell whether the user gave --cp-comm-type; called when Megatron's flags are there."""
    if isinstance(default := parser.get_default("cp_comm_type"), list):
        parser.set_defaults(cp_comm_type=_Unsaid(default))


def choose_algorithm(args: argparse.Namespace, size: int) -> Choice | None:
    """What to use where the user has not named an algorithm; None where he has, or where nothing is parallel.

    args: Megatron's parsed arguments, of a parser that `mark_default` has seen. size: most ranks that share a sequence.

    Raises ConfigurationError where an algorithm and --cp-comm-type contradict each other, or where an option of one
    algorithm is given and none is named.
    """
    if size == 1:
        return None
    asked = None
    if args.cp_comm_type is not None and not isinstance(args.cp_comm_type, _Unsaid):
        asked = choice_by_comm_type(args.cp_comm_type, args.hierarchical_context_parallel_sizes, size)
    if args.context_parallel_algo is not None:
        if asked is None:
            return None
        _check_agreement(args, asked)
        return asked if args.ulysses_degree_in_cp != asked.degree else None
    if asked is not None:
        _check_degree(args, asked)
        return asked
    for name, readers in _READ_BY.items():
        value = getattr(args, name)
        if value not in (None, 1) and (value > 1 or name == "ulysses_degree_in_cp"):
            raise ConfigurationError(
                f"{flag(name)} {value} without --context-parallel-algo: it belongs to {readers}; name the algorithm, "
                f"or leave it out."
            )
    kv_heads = args.num_query_groups if args.group_query_attention else None
    return choice_by_heads(size, args.num_attention_heads, kv_heads, args.tensor_model_parallel_size)


def _check_agreement(args: argparse.Namespace, asked: Choice) -> None:
    if args.context_parallel_algo != asked.algorithm:
        raise ConfigurationError(
            f"--context-parallel-algo {args.context_parallel_algo} contradicts --cp-comm-type "
            f"{' '.join(args.cp_comm_type)}, which is {asked.algorithm}; leave out one of them."
        )
    _check_degree(args, asked)


def _check_degree(args: argparse.Namespace, asked: Choice) -> None:
    degree = args.ulysses_degree_in_cp
    if degree in (None, asked.degree) or (asked.degree is None and degree == 1):
        return
    of_asked = "no Ulysses within a ring" if asked.degree is None else f"a Ulysses degree of {asked.degree}"
    raise ConfigurationError(
        f"--ulysses-degree-in-cp {degree} contradicts --cp-comm-type {' '.join(args.cp_comm_type)}, which has "
        f"{of_asked}; leave out one of them."
    )


def start_line(config: ContextParallelConfig, choice: Choice | None, kernels: str) -> str:
    """The one line that a job says at its start.

    choice: why it is this algorithm, where the user has not named it. kernels: names of those that will compute.
    """
    return (
        f"mindspeed_cp: context parallel size {config.context_parallel_size}, {_why(config, choice)}: {_grid(config)}"
        f"{_overlap(config)}; attention masks {config.attention_mask_type}; kernel {kernels}"
    )


def dynamic_start_line(config: ContextParallelConfig, choice: Choice | None, kernels: str) -> str:
    """The same where each document has ranks of its own.

    config: of a document that has all. choice, kernels: see start_line.
    """
    sizes = [1 << power for power in range(1, config.context_parallel_size.bit_length())]
    grids = "; ".join(f"on {size} {_grid(config.over(size))}" for size in sizes)
    return (
        f"mindspeed_cp: documents on 1 to {config.context_parallel_size} ranks each, {_why(config, choice)}: {grids}"
        f"{_overlap(config)}; kernel {kernels}"
    )


def _why(config: ContextParallelConfig, choice: Choice | None) -> str:
    return f"{config.context_parallel_algo} ({'named' if choice is None else f'chosen, because {choice.why}'})"


def _grid(config: ContextParallelConfig) -> str:
    grid = config.topology
    parts = [f"Ulysses {grid.ulysses}"] * (grid.ulysses > 1)
    if grid.ring_size > 1:
        ring = f"ring {grid.inner}" if grid.outer == 1 else f"inner ring {grid.inner} x outer ring {grid.outer}"
        parts.append(ring if config.transport is None else f"all-gather of K/V {grid.inner}")
    return " x ".join(parts)


def _overlap(config: ContextParallelConfig) -> str:
    if config.topology.ring_size == 1:
        return ""
    turn_on = "" if config.use_cp_send_recv_overlap else " (--use-cp-send-recv-overlap hides transfers)"
    return f", overlap {'on' if config.use_cp_send_recv_overlap else 'off'}{turn_on}"
