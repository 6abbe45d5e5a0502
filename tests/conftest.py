"""What every test shares: the repository's root, the golden values, and a runner for whole commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def run(*command, cwd=ROOT, timeout=300, **env):
    """Run `python *command` as a user would, on the CPU and on one thread; returns the CompletedProcess (text)."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def assert_refused(result, *words):
    """Bad input: exit code 2, one line of error on stderr that holds all `words`, no traceback."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


@pytest.fixture
def golden():
    """The folder of reference values (see its README.md)."""
    return GOLDEN
