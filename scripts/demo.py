"""The whole solution on a small data set, on any machine, in some minutes: what `make demo` runs.

    python scripts/demo.py                 # works in demo/, prints every command before it runs

Makes a data set, trains v83 -> v86 -> v98 -> v107 one after the other from the small starting point
in weights/, extracts descriptors, subtracts negative embeddings, scores every stage on phase 2
beside an untrained network and two perceptual hashes, and ends with a page to look at. The flags
are chosen so that a small network learns on two CPU cores; they are not the published recipe, and
the scores say nothing about the published weights. Nothing was chosen by looking at phase 2.

Writes demo/input (the data set), demo/exp/vNN/train and demo/exp/vNN/extract, demo/exp/hashes, and
demo/report.html; a second run replaces them.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCH = "test_byobnet"  # the architecture of weights/, 0.27 million weights
START = "weights/start.pth.tar"
COMMON = f"-a {ARCH} --input-size 96"
# A small network takes larger steps than the recipe's, which are divided by its number of GPUs.
RECIPE = "--batch-size 64 --memory-size 4000 --reference-world-size 1"
STAGES = {  # what each stage is trained with beyond COMMON; its defaults are the published recipe
    # only calibrates BatchNorm's statistics
    "untrained": f"v83 {RECIPE} --no-pretrained --lr 0 --epochs 1",
    "start": "v83",  # only extracted
    "v83": f"v83 {RECIPE} --weight start --lr 0.001 --epochs 1",
    "v86": f"v86 {RECIPE} --weight v83 --lr 0.001 --epochs 1",
    "v98": f"v98 {RECIPE} --weight v86 --lr 0.01 --epochs 3",
    "v107": "v107 --batch-size 8 --reference-world-size 1 --weight v98 --lr 0.001 --epochs 2",
}
SUBTRACTED = ("v98", "v107")  # stages that are scored after negative embedding subtraction too
HASHES = {"dhash": "dHash, 256 bits", "phash": "pHash, 256 bits"}
MARKER = ".made-by-demo"
TITLES = {"untrained": "untrained network", "start": START}


class DemoError(Exception):
    """What stopped the demo, in one line."""


@dataclass(frozen=True)
class Score:
    """A line of the table."""

    title: str
    average_precision: float
    recall_p90: float
    seconds: float


# ---- commands ----


def train_command(stage, folder):
    """The command that trains `stage` into `folder`/exp/<stage>."""
    script, *flags = shlex.split(STAGES[stage])
    if "--weight" in flags:
        position = flags.index("--weight") + 1
        flags[position] = checkpoint(flags[position], folder)
    output = f"{folder}/exp/{stage}"
    return [
        f"exp/{script}.py",
        *shlex.split(COMMON),
        *flags,
        "--output",
        output,
        f"{folder}/input/training_images/",
    ]


def checkpoint(stage, folder):
    """Path of the last checkpoint of a trained stage, or of the starting point."""
    if stage == "start":
        return START
    flags = shlex.split(STAGES[stage])
    last = int(flags[flags.index("--epochs") + 1]) - 1
    return f"{folder}/exp/{stage}/train/checkpoint_{last:04}.pth.tar"


def extract_command(stage, folder):
    """The command that writes the descriptors of `stage` for phase 2."""
    script = STAGES[stage].split()[0]
    flags = ["--mode", "extract", "--target-set", "qrt", "--phase", "2", "--batch-size", "100"]
    weight = ["--weight", checkpoint(stage, folder), "--output", f"{folder}/exp/{stage}"]
    return [f"exp/{script}.py", *shlex.split(COMMON), *flags, *weight, f"{folder}/input/"]


def run(command):
    """Print a command as a user would type it and run it from the repository's root; returns what
    it printed.

    Its messages and progress bars go to the terminal. Raises DemoError when it fails.
    """
    print(f"\n$ python {shlex.join(command)}", flush=True)
    result = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(result.stdout, end="", flush=True)
    if result.returncode:
        raise DemoError(f"{command[0]} ended with code {result.returncode}; its message is above")
    return result.stdout


def report_command(folder):
    """The command that writes the page of what v98 finds."""
    submission, truth = (
        f"{folder}/exp/v98/extract/v98_iso_phase2.h5",
        f"{folder}/input/private_ground_truth.csv",
    )
    return ["scripts/report.py", submission, truth, "--output", f"{folder}/report.html"]


def evaluate(title, submission, folder, start):
    """Score a submission on phase 2; `start` is when the work on this line of the table began."""
    command = [
        "scripts/eval_metrics.py",
        f"{folder}/{submission}",
        f"{folder}/input/private_ground_truth.csv",
    ]
    scores = json.loads(run(command))
    return Score(title, scores["average_precision"], scores["recall_p90"], time.time() - start)


# ---- demo ----


def prepare(folder):
    """Empty the folder that an earlier demo made. Raises DemoError when somebody else's files are
    in it.
    """
    path = ROOT / folder
    if path.exists() and not (path / MARKER).exists() and any(path.iterdir()):
        raise DemoError(f"{folder}: exists and no demo made it; choose another with --folder")
    for part in "input", "exp":
        shutil.rmtree(path / part, ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    (path / MARKER).touch()


def table(scores):
    """The scores as a table in Markdown."""
    lines = ["| phase 2 | µAP | R@P90 | seconds |", "|---|---|---|---|"]
    lines += [
        f"| {s.title} | {s.average_precision:.4f} | {s.recall_p90:.4f} | {s.seconds:.0f} |"
        for s in scores
    ]
    return "\n".join(lines)


def demo(folder):
    """Run every step and print the table."""
    start = time.time()
    prepare(folder)
    run(["scripts/make_dataset.py", f"{folder}/input"])
    print(f"# {time.time() - start:.0f} s")
    scores = []
    for stage in STAGES:
        begin = time.time()
        if stage != "start":
            run(train_command(stage, folder))
        run(extract_command(stage, folder))
        submission = f"exp/{stage}/extract/fb-isc-submission-phase2.h5"
        scores.append(evaluate(TITLES.get(stage, stage), submission, folder, begin))
        print(f"# {scores[-1].seconds:.0f} s")
        if stage in SUBTRACTED:
            begin = time.time()
            run(["scripts/postprocess.py", stage, "--phase", "2", "--exp", f"{folder}/exp"])
            submission = f"exp/{stage}/extract/{stage}_iso_phase2.h5"
            scores.append(evaluate(f"{stage} + NES", submission, folder, begin))
    begin = time.time()
    run(
        [
            "scripts/dev/hash_images.py",
            f"{folder}/input",
            "--phase",
            "2",
            "--output",
            f"{folder}/exp/hashes",
        ]
    )
    hashed = (time.time() - begin) / len(HASHES)
    for name, title in HASHES.items():
        scores.append(evaluate(title, f"exp/hashes/{name}.csv", folder, time.time() - hashed))
    print(
        f"\nA {ARCH} on small data, in {time.time() - start:.0f} s, with the demo's flags, not "
        f"the recipe's:\n"
    )
    print(table(scores))
    run(report_command(folder))
    print(f"\nTo look at: {(ROOT / folder / 'report.html').as_uri()}")


def main(argv=None):
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", default="demo", help="where everything is written (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        demo(args.folder.rstrip("/"))
    except DemoError as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
