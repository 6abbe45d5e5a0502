"""What a command prints and returns when it fails, and its warnings."""

import errno
import os
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest

import v107
from common.errors import InputError, one_line_errors, warn


@one_line_errors
def main(error=None):
    """A command that fails with `error`; this file's name is the command's."""
    if error is not None:
        raise error
    return 1


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.csv")


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (
            InputError("a.h5: is damaged;\nextract again"),
            2,
            "error: a.h5: is damaged; extract again",
        ),
        (v107.InputError("b.jpg: unreadable"), 2, "error: b.jpg: unreadable"),
        (NO_SPACE, 2, "error: [Errno 28] No space left on device: 'out.csv'"),
        (
            BrokenProcessPool("terminated abruptly"),
            1,
            "error: a worker process died; rerun it, with fewer --workers if memory ran out",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("8 are kept"), 130, "interrupted; 8 are kept"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_one_line_and_the_exit_code(capsys, error, exit_code, line):
    assert main(error) == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"test_errors.py: {line}\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), UnicodeError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        main(error)


def test_a_warning_is_one_line_with_the_name_of_the_running_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/report.py", "a.csv"])
    warn("a.csv: 2 rows\nare repeated")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "report.py: warning: a.csv: 2 rows are repeated\n"


def test_without_an_error_the_command_decides(capsys):
    assert main() == 1
    assert capsys.readouterr().err == ""
