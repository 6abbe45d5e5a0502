"""What the command lines of several commands share: an argument type, plot formats, quietness."""

import io
from contextlib import nullcontext, redirect_stderr

PLOT_FORMATS = (".png", ".svg", ".pdf")  # suffixes of the files that a plot may be written to


def at_least(kind, low):
    """An argparse type: a finite number of type `kind` no less than `low`."""

    def number(text):
        value = kind(text)
        if not low <= value < float("inf"):
            raise ValueError(text)
        return value

    number.__name__ = f"{kind.__name__} >= {low}"  # argparse's message shows this name
    return number


def hidden_stderr(quiet):
    """A context in which nothing reaches stderr where `quiet` is true, such as progress bars."""
    return redirect_stderr(io.StringIO()) if quiet else nullcontext()
