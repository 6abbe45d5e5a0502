"""Runs of scripts/reproduce.py with the small network on a data set of a few dozen images: the
rehearsal of docs/REPRODUCE.md.
"""

import json
import os
import re
import shlex
import subprocess
import sys

from conftest import ON_ONE_CORE, ROOT, readme_block, run, run_as_written

COMMANDS = readme_block("Rehearse on a small machine", "docs/REPRODUCE.md")
PREPARATION, _, _ = COMMANDS.partition("python scripts/reproduce.py")
REHEARSAL = shlex.split(COMMANDS.removeprefix(PREPARATION).replace("\\\n", ""))[1:]
# The flags for the small network.
NETWORK = REHEARSAL[REHEARSAL.index("-a") : REHEARSAL.index("--input")]
ARCH = REHEARSAL[REHEARSAL.index("-a") + 1]
INPUT_SIZE = int(REHEARSAL[REHEARSAL.index("--input-size") + 1])
# So few images need larger steps, and a memory bank that is full at once.
SMALL_TRAINING = [
    "--train",
    *("--stage-flags", "all: -j 0 --batch-size 8 --memory-size 256 --lr 0.001"),
    *("--stage-flags", "all: --reference-world-size 1 --log-every 1"),
    *("--stage-flags", "v83: --weight weights/start.pth.tar"),
    *("--stage-flags", "v98: --batch-size 4"),
    *("--stage-flags", "v107: --batch-size 4 --num-negatives 6 --memory-size 32 --lr 0.3"),
    *("--stage-flags", "v107: --log-every 50"),
]


def in_folder(text, folder):
    """Commands of the rehearsal, with another folder."""
    return text.replace("reproduce/rehearsal", str(folder))


def make_input(folder):
    """Prepare the rehearsal in a folder, as it is written; returns the path of the data."""
    run_as_written(in_folder(PREPARATION, folder), ROOT, {})
    return folder / "input"


def expect_own_score(data):
    """Score v98 by the stage's own commands, and write beside the data a file that expects that."""
    output = data.parents[1] / "expected"
    weights = ["--weight", "weights/v98.pth.tar", "-a", ARCH, "--input-size", INPUT_SIZE]
    flags = ["--mode", "extract", "-j", 0, "--output", output]
    result = run("exp/v98.py", *weights, *flags, f"{data}/")
    assert result.returncode == 0, result.stderr
    submission = output / "extract" / "fb-isc-submission.h5"
    result = run("scripts/eval_metrics.py", submission, data / "public_ground_truth.csv")
    score = json.loads(result.stdout)
    content = json.loads((data.parent / "expect.json").read_text())
    content["scores"] = {"v98": [score["average_precision"], score["recall_p90"]]}
    expectations(data).write_text(json.dumps(content))


def expectations(data):
    """The file with what to expect of a data set."""
    return data.parent / "expect_score.json"


def start(*command):
    """Start a script in the background, on one core; returns its Popen."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | ON_ONE_CORE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_run(data, output, *flags):
    """Start the command on other flags; returns its Popen."""
    command = ["scripts/reproduce.py", "--cpu", *NETWORK, "--input", data, "--output", output]
    return start(*command, "--expect", expectations(data), *flags)


def without_times(report, output):
    """A report without what differs between runs: times, the commit, the name of its folder."""
    text = re.sub(r"\| \d+:\d\d:\d\d \|", "| time |", report)
    text = re.sub(r"^- commit: .*$", "", text, flags=re.MULTILINE)
    return text.replace(str(output), "OUTPUT")
