"""All steps on a small data set, on any machine, in some minutes: what `make demo` runs.

    python scripts/demo.py  # works in demo/, prints every command before it runs
    python scripts/demo.py --seeds 3  # trains three times and prints the means

Makes a data set, trains v83 -> v86 -> v98 -> v107 one after the other from the small starting point
in weights/, extracts descriptors, subtracts negative embeddings, scores every stage on phase 2
beside an untrained network and two perceptual hashes, and ends with a report page. The flags let a
small network learn on two CPU cores; they are not the published recipe, and the scores say nothing
about the published weights. v98's flags were chosen on phase 1. The starting point was trained
on parts of the demo's photographs, so its scores are too high.

Writes demo/input (the data set), demo/exp/vNN/train and demo/exp/vNN/extract, demo/exp/hashes, and
demo/report.html; a second run replaces them. With --seeds, those of the published seeds stay; they
are trained last.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.cli import at_least
from common.commands import run_command
from common.errors import InputError, one_line_errors

ROOT = Path(__file__).resolve().parents[1]
ARCH = "tf_efficientnet_lite0"  # the architecture of weights/, 3.0 million weights
START = "weights/start.pth.tar"
COMMON = f"-a {ARCH} --input-size 96"
# A small network takes larger steps than the recipe's: those are divided by its number of GPUs.
RECIPE = "--batch-size 64 --memory-size 4000 --reference-world-size 1"
# Each stage's script and its flags beyond COMMON; the defaults are the published recipe.
STAGES = {
    # Training only calibrates BatchNorm's statistics.
    "untrained": f"v83 {RECIPE} --no-pretrained --lr 0 --epochs 1",
    "start": "v83",  # not trained, only extracted
    "v83": f"v83 {RECIPE} --weight start --lr 0.001 --epochs 1",
    "v86": f"v86 {RECIPE} --weight v83 --lr 0.001 --epochs 1",
    "v98": f"v98 {RECIPE} --weight v86 --lr 0.01 --epochs 3",
    "v107": "v107 --batch-size 8 --reference-world-size 1 --weight v98 --lr 0.001 --epochs 1",
}
SUBTRACTED = ("v98", "v107")  # stages that are scored after negative embedding subtraction too
HASHES = {"dhash": "dHash, 256 bits", "phash": "pHash, 256 bits"}
MARKER = ".made-by-demo"
TITLES = {"untrained": "untrained network", "start": START}


@dataclass(frozen=True)
class Score:
    """A line of the table."""

    title: str
    average_precision: float
    recall_p90: float
    seconds: float


# ---- commands ----


def train_command(stage, folder, seed=0):
    """The command that trains `stage` into `folder`/exp/<stage>. Seed 0 stands for the stage's own,
    the published one.
    """
    script, *flags = shlex.split(STAGES[stage])
    if "--weight" in flags:
        position = flags.index("--weight") + 1
        flags[position] = checkpoint(flags[position], folder)
    if seed != 0:
        flags += ["--seed", str(seed)]
    return [
        f"exp/{script}.py",
        *shlex.split(COMMON),
        *flags,
        *("--output", f"{folder}/exp/{stage}"),
        f"{folder}/input/training_images/",
    ]


def checkpoint(stage, folder):
    """The path of the last checkpoint of a trained stage, or of the starting point."""
    if stage == "start":
        return START
    flags = shlex.split(STAGES[stage])
    last = int(flags[flags.index("--epochs") + 1]) - 1
    return f"{folder}/exp/{stage}/train/checkpoint_{last:04}.pth.tar"


def extract_command(stage, folder):
    """The command that writes the descriptors of `stage` for phase 2."""
    script = STAGES[stage].split()[0]
    return [
        f"exp/{script}.py",
        *shlex.split(COMMON),
        *shlex.split("--mode extract --target-set qrt --phase 2 --batch-size 100"),
        *("--weight", checkpoint(stage, folder)),
        *("--output", f"{folder}/exp/{stage}"),
        f"{folder}/input/",
    ]


def report_command(folder):
    """The command that writes the report page of v98."""
    submission = f"{folder}/exp/v98/extract/v98_iso_phase2.h5"
    truth = f"{folder}/input/private_ground_truth.csv"
    return ["scripts/report.py", submission, truth, "--output", f"{folder}/report.html"]


def evaluate(title, submission, folder, start):
    """Score a submission on phase 2; `start` is when the work on this line of the table began."""
    command = [
        "scripts/eval_metrics.py",
        f"{folder}/{submission}",
        f"{folder}/input/private_ground_truth.csv",
    ]
    scores = json.loads(run_command(command))
    return Score(title, scores["average_precision"], scores["recall_p90"], time.time() - start)


# ---- demo ----


def prepare(folder):
    """Empty the folder of an earlier demo. Raises InputError when other files are in it."""
    path = ROOT / folder
    if path.exists() and not (path / MARKER).exists() and any(path.iterdir()):
        raise InputError(f"{folder}: exists and no demo made it; choose another with --folder")
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


def table_of_means(runs):
    """The Scores of several seeds, a list for each seed, as a table of means in Markdown, with the
    least and the greatest where they differ.
    """
    lines = ["| phase 2 | µAP | R@P90 |", "|---|---|---|"]
    for of_each_seed in zip(*runs, strict=True):
        precisions = [score.average_precision for score in of_each_seed]
        mean_precision = statistics.mean(precisions)
        least, greatest = min(precisions), max(precisions)
        spread = "" if least == greatest else f" ({least:.3f}-{greatest:.3f})"
        mean_recall = statistics.mean(score.recall_p90 for score in of_each_seed)
        title = of_each_seed[0].title
        lines.append(f"| {title} | {mean_precision:.3f}{spread} | {mean_recall:.3f} |")
    return "\n".join(lines)


def run_stage(stage, folder, seed):
    """Train a stage, extract its descriptors and score it, with negative embedding subtraction too
    where the table has that; returns its Scores.
    """
    start = time.time()
    if stage != "start":
        run_command(train_command(stage, folder, seed))
    run_command(extract_command(stage, folder))
    submission = f"exp/{stage}/extract/fb-isc-submission-phase2.h5"
    scores = [evaluate(TITLES.get(stage, stage), submission, folder, start)]
    print(f"# {scores[0].seconds:.0f} s")
    if stage in SUBTRACTED:
        start = time.time()
        run_command(["scripts/postprocess.py", stage, "--phase", "2", "--exp", f"{folder}/exp"])
        submission = f"exp/{stage}/extract/{stage}_iso_phase2.h5"
        scores.append(evaluate(f"{stage} + NES", submission, folder, start))
    return scores


def run_stages(folder, seed):
    """Run all stages; returns their Scores. What an earlier seed left is removed."""
    shutil.rmtree(ROOT / folder / "exp", ignore_errors=True)
    scores = []
    for stage in STAGES:
        scores += run_stage(stage, folder, seed)
    return scores


def run_hashes(folder):
    """Score the perceptual hashes; returns their Scores."""
    start = time.time()
    output = f"{folder}/exp/hashes"
    script = "scripts/dev/hash_images.py"
    run_command([script, f"{folder}/input", "--phase", "2", "--output", output])
    seconds_each = (time.time() - start) / len(HASHES)
    scores = []
    for name, title in HASHES.items():
        submission = f"exp/hashes/{name}.csv"
        scores.append(evaluate(title, submission, folder, time.time() - seconds_each))
    return scores


def demo(folder, seeds):
    """Run every step, the training once for each seed, and print the table."""
    start = time.time()
    prepare(folder)
    run_command(["scripts/make_dataset.py", f"{folder}/input"])
    print(f"# {time.time() - start:.0f} s")
    # Seed 0 comes last, so that its results are the ones that stay.
    runs = [run_stages(folder, seed) for seed in reversed(range(seeds))]
    hashes = run_hashes(folder)
    runs = [[*scores, *hashes] for scores in runs]
    seconds = f"{time.time() - start:.0f} s"
    print(f"\nA {ARCH} on small data, in {seconds}, with the demo's flags, not the recipe's:\n")
    if seeds == 1:
        print(table(runs[0]))
    else:
        print(table_of_means(runs))
    run_command(report_command(folder))
    print(f"\nTo look at: {(ROOT / folder / 'report.html').as_uri()}")


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", default="demo", help="where everything is written (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds",
        type=at_least(int, 1),
        default=1,
        help="how often to train, each time with other seeds; of several, the means are printed "
        "(default: %(default)s)",
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Run the demo; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    # Let glibc keep what is freed: page faults of large tensors cost a third of a step's time.
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    demo(args.folder.rstrip("/"), args.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
