"""What the user gave wrong, and the wrapper of every main(): one line on stderr, exit code 2.

Warnings are one line too.
"""

import functools
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm


class InputError(ValueError):
    """What the user gave cannot be used. The message: WHERE: what is wrong; the remedy."""


def is_input_error(error):
    """Whether this is an InputError of scripts/ or of a stage; each stage defines its own."""
    return type(error).__name__ == "InputError"


def warn(message):
    """Print a warning as one line to stderr, above any progress bar, with the name of the running
    command.
    """
    command = Path(sys.argv[0]).name
    text = " ".join(f"{command}: warning: {message}".split())
    tqdm.write(text, file=sys.stderr)


def one_line_errors(main):
    """Decorate a command's main(argv), or a part of it: errors that users can fix end in one line.

    The decorated function returns what `main` returns, or after an error the exit code. InputError
    and OSError: 2. A worker process that died: 1. Ctrl-C: 130; the line ends with the text of the
    KeyboardInterrupt, if it has one. Anything else is a bug and ends in its own traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        command = Path(sys.modules[main.__module__].__file__).name
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            details = f"; {interrupt}" if str(interrupt) else ""
            print(f"{command}: interrupted{details}", file=sys.stderr)
            return 130
        except BrokenProcessPool:
            remedy = "rerun it, with fewer --workers if memory ran out"
            print(f"{command}: error: a worker process died; {remedy}", file=sys.stderr)
            return 1
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) and not is_input_error(error):
                raise
            message = " ".join(str(error).split())
            print(f"{command}: error: {message}", file=sys.stderr)
            return 2

    return wrapped
