"""Help of Megatron's that argparse cannot print, made printable."""

import argparse


def escape_help(parser: argparse.ArgumentParser) -> None:
    """Double the percent signs of help texts that argparse takes for formats and fails on.

    DEVIATION: Megatron 0.19.2 has "(50%)" in the help of one flag, so that --help ends in a ValueError.
    """
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
