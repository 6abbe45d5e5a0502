"""What the command lines of several commands share: argument types, defaults, plot formats,
quietness.
"""

import io
import math
import os
from contextlib import nullcontext, redirect_stderr

PLOT_FORMATS = (".png", ".svg", ".pdf")  # suffixes of the files that a plot may be written to


def usable_cores():
    """The number of CPU cores that this process may use: taskset and containers may leave fewer."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def between(kind, low, high):
    """An argparse type: a finite number of type `kind` from `low` to `high`."""

    def number(text):
        value = kind(text)
        in_range = low <= value <= high
        if not in_range or value == math.inf:
            raise ValueError(text)
        return value

    # argparse's message shows this name.
    number.__name__ = f"{kind.__name__} from {low} to {high}"
    return number


def at_least(kind, low):
    """An argparse type: a finite number of type `kind` no less than `low`."""
    number = between(kind, low, math.inf)
    number.__name__ = f"{kind.__name__} >= {low}"
    return number


def hidden_stderr(quiet):
    """A context in which nothing reaches stderr where `quiet` is true, such as progress bars."""
    return redirect_stderr(io.StringIO()) if quiet else nullcontext()
