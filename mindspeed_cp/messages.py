"""What messages offer in the place of a wrong value."""

from collections.abc import Iterable


def or_list(values: Iterable[object]) -> str:
    """`values` as the end of a sentence: "2, 4 or 8"."""
    *most, last = [str(value) for value in values]
    return f"{', '.join(most)} or {last}" if most else last


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def short(value: object) -> str:
    """What a user has given, in one line."""
    said = " ".join(repr(value).split())
    return said if len(said) < 60 else f"a {type(value).__name__}"
