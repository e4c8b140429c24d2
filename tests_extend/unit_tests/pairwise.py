"""Tables of cases in which every two values of any two axes meet."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

Value = tuple[str, int]
"""An axis, and which of its values."""


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases that hold every pair of values; each takes, axis by axis, the value with the most pairs that are left."""
    names = sorted(axes, key=lambda name: -len(axes[name]))
    values = {name: [(name, number) for number in range(len(axes[name]))] for name in names}
    left = {
        frozenset((a, b)): None for one, other in combinations(names, 2) for a in values[one] for b in values[other]
    }
    cases = []
    while left:
        chosen = dict(next(iter(left)))
        for name in names:
            if name not in chosen:
                turned = values[name][len(cases) % len(values[name]) :] + values[name]  # Of equals another each time.
                chosen[name] = max(turned, key=lambda value: _new_pairs(left, chosen, value))[1]
        for pair in combinations(chosen.items(), 2):
            left.pop(frozenset(pair), None)
        cases.append({name: axes[name][chosen[name]] for name in axes})
    return cases


def _new_pairs(left: Mapping[frozenset[Value], None], chosen: Mapping[str, int], value: Value) -> int:
    return sum(frozenset((value, other)) in left for other in chosen.items())
