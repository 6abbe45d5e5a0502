"""Commands of this repository, run from another one as a user would run them."""

import shlex
import subprocess
import sys
from pathlib import Path

from common.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def run_command(command):
    """Print a command as a user would type it and run it from the repository's root; returns what
    it printed.

    command: a script and its arguments, a list of str. Its messages and progress bars go to the
    terminal. Raises InputError when it fails.
    """
    print(f"\n$ python {shlex.join(command)}", flush=True)
    result = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(result.stdout, end="", flush=True)
    if result.returncode:
        raise InputError(f"{command[0]} ended with code {result.returncode}; its message is above")
    return result.stdout
