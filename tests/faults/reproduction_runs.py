"""Runs of scripts/reproduce.py with the small network on a data set of a few dozen images."""

import json
import os
import re
import subprocess
import sys

from conftest import ON_ONE_CORE, ROOT, run

NETWORK = ["-a", "test_byobnet", "--input-size", "96", "--stage-flags", "extract: -j 0"]
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
SHA256 = "1198c5aa5cc44f98e9a9f53e7e8ce2e02478bc6110272128eed6e290ce182bad"  # weights/v98.pth.tar


def make_input(path):
    """Make the data set, and beside it expect.json; returns its path."""
    flags = ["--queries", 36, "--references", 48, "--training", 24, "--workers", 1]
    result = run("scripts/make_dataset.py", path, *flags)
    assert result.returncode == 0, result.stderr
    output = path.parent / "expected"
    weights = ["--weight", "weights/v98.pth.tar", "-a", "test_byobnet", "--input-size", 96]
    flags = ["--mode", "extract", "-j", 0, "--output", output]
    result = run("exp/v98.py", *weights, *flags, f"{path}/")
    assert result.returncode == 0, result.stderr
    submission = output / "extract" / "fb-isc-submission.h5"
    result = run("scripts/eval_metrics.py", submission, path / "public_ground_truth.csv")
    score = json.loads(result.stdout)
    content = {
        "scores": {"v98": [score["average_precision"], score["recall_p90"]]},
        "images": {"query_images": 36, "reference_images": 48, "training_images": 24},
        "sha256": {"v98": SHA256},
    }
    expectations(path).write_text(json.dumps(content))
    return path


def expectations(data):
    """The file with what to expect of a data set."""
    return data.parent / "expect.json"


def start_run(data, output, *flags):
    """Start the command; returns its Popen."""
    expect = expectations(data)
    command = ["scripts/reproduce.py", "--cpu", *NETWORK, "--input", data, "--output", output]
    command += ["--expect", expect, *flags]
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | ON_ONE_CORE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def without_times(report, output):
    """A report without what differs between runs: times, the commit, the name of its folder."""
    text = re.sub(r"\| \d+:\d\d:\d\d \|", "| time |", report)
    text = re.sub(r"^- commit: .*$", "", text, flags=re.MULTILINE)
    return text.replace(str(output), "OUTPUT")
