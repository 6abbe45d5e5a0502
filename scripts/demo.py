"""The whole solution on a small data set, on any machine, in some minutes: what `make demo` runs.

    python scripts/demo.py                 # works in demo/, prints every command before it runs

Makes a data set, trains v83 -> v86 -> v98 -> v107 one after the other with a small backbone from random weights,
extracts descriptors, subtracts negative embeddings, scores every stage on phase 2 beside an untrained network and a
perceptual hash, and ends with a page to look at. The flags are chosen so that a small network learns on two CPU cores;
they are not the published recipe, and the scores say nothing about the published weights. Nothing was chosen by looking
at phase 2.

Writes demo/input (the data set), demo/exp/vNN/train and demo/exp/vNN/extract, demo/exp/dhash.csv, and demo/report.html;
a second run replaces them.
"""

import argparse
import csv
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
ARCH = "test_resnet"  # timm's smallest residual network, 0.4 million weights
COMMON = f"-a {ARCH} --input-size 96"
# From random weights the steps must be larger than the recipe's, which are divided by its number of GPUs. At this rate
# mobilenetv3_small_050 and lcnet_050 collapse, this network does not (phase 1 and the loss say so).
RECIPE = "--batch-size 32 --memory-size 1000 --reference-world-size 1"
STAGES = {  # what each stage is trained with beyond COMMON; its defaults are the published recipe
    "untrained": f"v83 {RECIPE} --no-pretrained --lr 0 --epochs 1",  # only calibrates BatchNorm's statistics
    "v83": f"v83 {RECIPE} --no-pretrained --epochs 5",
    "v86": f"v86 {RECIPE} --weight v83 --epochs 4",
    "v98": f"v98 {RECIPE} --weight v86 --epochs 2",
    "v107": "v107 --batch-size 8 --weight v98 --epochs 4",
}
MARKER = ".made-by-demo"
TITLES = {"untrained": "untrained network", "nes": "v107 + NES", "dhash": "dHash, 256 bits"}


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
    return [f"exp/{script}.py", *shlex.split(COMMON), *flags, "--output", output, f"{folder}/input/training_images/"]


def checkpoint(stage, folder):
    """Path of the last checkpoint of a trained stage."""
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
    """Print a command as a user would type it and run it from the repository's root; returns what it printed.

    Its messages and progress bars go to the terminal. Raises DemoError when it fails.
    """
    print(f"\n$ python {shlex.join(command)}", flush=True)
    result = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(result.stdout, end="", flush=True)
    if result.returncode:
        raise DemoError(f"{command[0]} ended with code {result.returncode}; its message is above")
    return result.stdout


def report_command(folder):
    """The command that writes the page of the last submission."""
    submission, truth = f"{folder}/exp/v107/extract/v107_iso_phase2.h5", f"{folder}/input/private_ground_truth.csv"
    return ["scripts/report.py", submission, truth, "--output", f"{folder}/report.html"]


def evaluate(title, submission, folder, start):
    """Score a submission on phase 2; `start` is when the work on this line of the table began."""
    command = ["scripts/eval_metrics.py", f"{folder}/{submission}", f"{folder}/input/private_ground_truth.csv"]
    scores = json.loads(run(command))
    return Score(title, scores["average_precision"], scores["recall_p90"], time.time() - start)


# ---- dHash ----


def hash_folder(folder):
    """(ids, hashes) of the images in a folder, hashes as bool (n, 256)."""
    paths = sorted(folder.glob("*.jpg"))
    hashes = [imagehash.dhash(Image.open(path), hash_size=16).hash.ravel() for path in tqdm(paths, folder.name)]
    return [path.stem for path in paths], np.array(hashes)


def match_hashes(query, reference, k=10):
    """(query row, reference row, score) of each query's k nearest references; score is minus the bits that differ."""
    distances = (query[:, None] != reference).sum(axis=2)
    nearest = distances.argsort(axis=1, kind="stable")[:, :k]
    return [(q, r, -int(distances[q, r])) for q, row in enumerate(nearest) for r in row.tolist()]


def write_dhash(folder):
    """Write the matching-track submission of dHash for phase 2, `folder`/exp/dhash.csv."""
    print(
        f"\n# dHash of 256 bits of every query and reference, 10 nearest references by query -> {folder}/exp/dhash.csv"
    )
    query_ids, queries = hash_folder(ROOT / folder / "input/query_images_phase2")
    reference_ids, references = hash_folder(ROOT / folder / "input/reference_images")
    matches = match_hashes(queries, references)
    with (ROOT / folder / "exp/dhash.csv").open("w", newline="") as file:
        rows = [(query_ids[q], reference_ids[r], score) for q, r, score in matches]
        csv.writer(file).writerows([("query_id", "reference_id", "score"), *rows])


# ---- demo ----


def prepare(folder):
    """Empty the folder that an earlier demo made. Raises DemoError when somebody else's files are in it."""
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
    lines += [f"| {s.title} | {s.average_precision:.4f} | {s.recall_p90:.4f} | {s.seconds:.0f} |" for s in scores]
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
        run(train_command(stage, folder))
        run(extract_command(stage, folder))
        submission = f"exp/{stage}/extract/fb-isc-submission-phase2.h5"
        scores.append(evaluate(TITLES.get(stage, stage), submission, folder, begin))
        print(f"# {scores[-1].seconds:.0f} s")
    begin = time.time()
    run(["scripts/postprocess.py", "v107", "--phase", "2", "--exp", f"{folder}/exp"])
    scores.append(evaluate(TITLES["nes"], "exp/v107/extract/v107_iso_phase2.h5", folder, begin))
    begin = time.time()
    write_dhash(folder)
    scores.append(evaluate(TITLES["dhash"], "exp/dhash.csv", folder, begin))
    print(f"\nA {ARCH} from random weights, in {time.time() - start:.0f} s, with the demo's flags, not the recipe's:\n")
    print(table(scores))
    run(report_command(folder))
    print(f"\nTo look at: {(ROOT / folder / 'report.html').as_uri()}")


def main(argv=None):
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default="demo", help="where everything is written (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        demo(args.folder.rstrip("/"))
    except DemoError as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
