"""What every test shares: the repository's root, the golden values, and a runner for whole
commands.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
ON_ONE_CORE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def children(pid):
    """Ids of a process's children, on Linux."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run(*command, cwd=ROOT, timeout=300, **env):
    """Run `python *command` as a user would, on the CPU and on one thread; returns the
    CompletedProcess (text).

    `env`: variables of its environment, which may take back what is set here.
    """
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | ON_ONE_CORE | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def called(main, argv, capture):
    """The CompletedProcess that `run` would return, of main(argv) in this process; capture: capsys
    or capfd.
    """
    capture.readouterr()
    argv = [str(argument) for argument in argv]
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    return subprocess.CompletedProcess(argv, code, *capture.readouterr())


def copy_repository(target):
    """Make `target` what a clone is, as far as the README's commands need it."""
    for folder in ("exp", "scripts", "weights"):
        shutil.copytree(
            ROOT / folder, target / folder, ignore=shutil.ignore_patterns("v[0-9]*[0-9]", "__*")
        )
    shutil.copy(ROOT / "hubconf.py", target)


def readme_block(heading, document="README.md", number=0):
    """A fenced block below a heading of a document, the first if not told, as it is written."""
    text = (ROOT / document).read_text()
    _, section = f"{text}\n## ".split(f"\n## {heading}\n")
    section = section.partition("\n## ")[0]
    blocks = re.findall(r"^```\w*\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return blocks[number]


def run_as_written(commands, cwd, scaled, **env):
    """Run a block of commands in a shell, on the CPU; returns the CompletedProcess (text).

    scaled: {script: flags}, which `python` appends where it runs that script, so that the run is
    small.
    """
    cases = "".join(
        f'  {script}) set -- "$@" {shlex.join(flags)};;\n' for script, flags in scaled.items()
    )
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "python")
        execute = f'exec {shlex.quote(sys.executable)} "$@"'
        python.write_text(f'#!/bin/sh\ncase "${{1##*/}}" in\n{cases}esac\n{execute}\n')
        python.chmod(0o755)
        env |= ON_ONE_CORE | {"PATH": f"{folder}:{os.environ['PATH']}"}
        shell = ["bash", "-euo", "pipefail", "-c", commands]
        result = subprocess.run(
            shell, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=600
        )
    assert result.returncode == 0, result.stderr
    return result


def assert_refused(result, *words):
    """Bad input: exit code 2, one line of error on stderr that holds all `words`, no traceback."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


def pytest_configure():
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs, and theirs, ignore Ctrl-C


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="inject many more faults: what `make faults` runs"
    )
    parser.addoption("--gpu-report", help="file that test_gpu.py adds its table to: `make gpu`")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that workers that take a file at a time end at the
    same time.
    """
    longest = [
        "test_reproduce",
        "test_training",
        "test_kills",
        "test_report",
        "test_readme",
        "test_benchmark",
        "test_bad_images",
        "test_augmentation",
        "test_fine_tuning",
        "test_checkpoints",
        "test_real_processes",
        "test_export",
        "test_environments",
        "test_match",
        "test_eval_metrics",
        "test_grad_checkpointing",
        "test_make_dataset",
    ]
    items.sort(
        key=lambda item: (
            longest.index(item.path.stem) if item.path.stem in longest else len(longest)
        )
    )


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for _, line in report.user_properties:
            terminalreporter.write_line(line)


@pytest.fixture
def figure(record_property):
    """Print a line of what was counted or measured at the end of the session."""
    return partial(record_property, "figure")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """40 training, 22 reference and 9 query images in DISC21's layout."""
    from stage_process import make_images

    return make_images(tmp_path_factory.mktemp("data") / "input")


@pytest.fixture(scope="session")
def start():
    """Start a command: start(stage, *argv, folder=..., world_size=1, RLIMIT_...=...) ->
    stage_process.Run.
    """
    from stage_process import Run, start_server

    return partial(Run, start_server())


@pytest.fixture(scope="session")
def undisturbed(start, data, tmp_path_factory):
    """{number of processes: output folder} of v83's training in one piece."""
    from stage_process import train

    outputs = {world_size: tmp_path_factory.mktemp("undisturbed") for world_size in (1, 2)}
    for world_size, output in outputs.items():
        run = train(start, data, output, world_size=world_size)
        assert set(run.wait()) == {0}, run.errors()
    return outputs


@pytest.fixture
def golden():
    """The folder of reference values (see its README.md)."""
    return GOLDEN
