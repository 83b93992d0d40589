"""Command-line arguments: values that several commands check in the same way, and the text below the options."""

from __future__ import annotations

import argparse
import math


def positive_int(text: str) -> int:
    """Read a whole number of at least 1; for `type=` of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def positive_float(text: str) -> float:
    """Read a finite number above 0; for `type=` of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def describe(parser: argparse.ArgumentParser, details: str) -> None:
    """Show `details` below the options as they are written; `%(prog)s` in them becomes the program's name.

    The name is also put into the parsed arguments as `prog`, to begin error messages with.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = details.strip("\n")
    parser.set_defaults(prog=parser.prog)
