"""How fast each part is, against the published way of doing it, in the same run: what `make
benchmark` runs.

    python scripts/dev/benchmark.py  # everything, at most 10 minutes on two cores
    python scripts/dev/benchmark.py loss search --rounds 9  # some parts, more often
    python scripts/dev/benchmark.py augmentation --photos ~/Pictures --json figures.json

Each part has a file of its own in benchmarks/. A is the published way, written plainly, B is what
this project's scripts do: see each part's description. After a warm-up both run in turn: `ratio`
is the median over the rounds of A's time divided by B's, beside its minimum and maximum; A/s and
B/s are units per second in the median round. Peak memory is what A or B alone adds, in a process of
its own, to what the process has before. All on one CPU thread; a GPU is used where there is one (by
training-step, whose peak is the GPU's, the searches, and ranks). The photographs are mosaics of
those inside scikit-image and scikit-learn, 1024 x 768, JPEG of quality 90.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "exp"))

# Looking for a GPU must not begin to use CUDA: forked processes could not use it then.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Else the profiler prints that there is no GPU, and more.
os.environ["KINETO_LOG_LEVEL"] = "6"

import faiss
import numpy as np
import torch

import v83
from benchmarks.augmentation import Augmentation
from benchmarks.database_augmentation import DatabaseAugmentation
from benchmarks.evaluation import Evaluation
from benchmarks.evaluation_search import EvaluationSearch
from benchmarks.extraction_input import ExtractionInput
from benchmarks.extraction_model import ExtractionModel
from benchmarks.extraction_onnx import ExtractionOnnx
from benchmarks.inputs import MAX_PHOTOS, make_photos
from benchmarks.loss import Loss
from benchmarks.measuring import PartFailed, in_a_process, measure_case
from benchmarks.photographs import Photographs
from benchmarks.ranks import BATCH_SIZE, Ranks
from benchmarks.search import Search
from benchmarks.training_step import TrainingStep
from common.cli import at_least
from common.errors import one_line_errors

PARTS = {
    "augmentation": Augmentation,
    "loss": Loss,
    "training-step": TrainingStep,
    "extraction-input": ExtractionInput,
    "extraction-model": ExtractionModel,
    "extraction-onnx": ExtractionOnnx,
    "photographs": Photographs,
    "evaluation": Evaluation,
    "search": Search,
    "evaluation-search": EvaluationSearch,
    "database-augmentation": DatabaseAugmentation,
    "ranks": Ranks,
}


# ---- command line ----


def parse_args(argv=None):
    """The command line; exits with code 2 and one line where it is invalid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(PARTS)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"which to measure, of {names} (default: all)"
    )
    parser.add_argument(
        "--rounds",
        type=at_least(int, 1),
        default=5,
        help="how often A and B run after the warm-up (default: %(default)s)",
    )
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help=f"use the first {MAX_PHOTOS} images in DIR, as they are",
    )
    parser.add_argument(
        "--ranks",
        type=process_counts,
        default="1,2",
        help=f"numbers of processes to compare, divisors of {BATCH_SIZE} (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.parts) - PARTS.keys())
    if unknown:
        parser.error(f"{unknown[0]}: no such part; there are {names}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    if not Path("/proc/self/clear_refs").exists():
        parser.error("peak memory is read from /proc, which only Linux has")
    return args


def process_counts(text):
    """An argparse type: two or more numbers of processes, separated by commas, that divide the
    batch.
    """
    counts = [int(word) for word in text.split(",")]
    if len(counts) < 2 or min(counts) < 1:
        raise ValueError(text)
    if any(BATCH_SIZE % count for count in counts):
        raise ValueError(text)
    return counts


# ---- table ----

COLUMNS = "{:21} {:13} {:8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>8} {:>8}  {}"
HEADER = COLUMNS.format(
    "part", "case", "unit", "A/s", "B/s", "ratio", "min", "max", "A MB", "B MB", "agreement"
)
NO_FIGURES = ["-"] * 7  # the columns from A/s to B MB of a part that was skipped


def format_row(row):
    """A line of the table."""
    if "skipped" in row:
        return COLUMNS.format(
            row["part"], row["case"], row["unit"], *NO_FIGURES, f"skipped: {row['skipped']}"
        )
    ratio = row["ratio"]
    agreement = [f"{what} {format_value(value)}" for what, value in row["agreement"].items()]
    return COLUMNS.format(
        row["part"],
        row["case"],
        row["unit"],
        f"{row['baseline_per_second']:.1f}",
        f"{row['ours_per_second']:.1f}",
        f"{ratio['median']:.2f}",
        f"{ratio['min']:.2f}",
        f"{ratio['max']:.2f}",
        f"{row['baseline_peak_mb']:.1f}",
        f"{row['ours_peak_mb']:.1f}",
        "; ".join(agreement),
    )


def format_value(value):
    """A number with three digits, several of them, or yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(format_value(item) for item in value)
    return f"{value:.3g}"


# ---- run ----


def find_photos(args, folder):
    """Paths of the photographs: those of --photos, else ones made in `folder`. Raises InputError
    where one cannot be read.
    """
    if not args.photos:
        return make_photos(folder)
    photos = v83.list_images(args.photos)[:MAX_PHOTOS].tolist()
    for path in photos:
        v83.open_image(path)
    return photos


def describe(name, part):
    """What a part compares, and what A and B are, in lines for the terminal."""
    texts = (f"{name}: {part.description}", f"A: {part.published}", f"B: {part.own}")
    return "\n".join(textwrap.fill(text, 100) for text in texts)


def describe_machine():
    """Cores, GPU and versions, in one line."""
    gpu = "no GPU"
    if torch.cuda.is_available():
        gpu = in_a_process(torch.cuda.get_device_name)  # begins to use CUDA
    versions = [f"{module.__name__} {module.__version__}" for module in (torch, faiss, np)]
    python = f"Python {platform.python_version()}"
    return ", ".join([f"{os.cpu_count()} cores", gpu, python, *versions])


def benchmark(args, machine, folder):
    """Measure the parts that `args` names and print the table as it grows; returns its rows."""
    photos = find_photos(args, folder)
    kilobytes = statistics.mean(Path(path).stat().st_size for path in photos) / 1e3
    print(f"{machine}\n{len(photos)} photographs of {kilobytes:.0f} kB\n")
    parts = {name: part for name, part in PARTS.items() if name in args.parts or not args.parts}
    for name, part in parts.items():
        print(describe(name, part), end="\n\n")
    print(HEADER, flush=True)
    rows = []
    for name, part in parts.items():
        for label, case in part.cases_for(args.ranks).items():
            row = measure_case(name, part, label, case, photos, folder, args.rounds)
            print(format_row(row), flush=True)
            rows.append(row)
    return rows


@one_line_errors
def main(argv=None):
    """Run the benchmark; returns the exit code: 2 for input that cannot be used, 1 where a part
    failed.
    """
    args = parse_args(argv)
    try:
        machine = describe_machine()
        with tempfile.TemporaryDirectory() as folder:
            rows = benchmark(args, machine, Path(folder))
    except PartFailed as error:
        print(f"benchmark.py: error: {error}", file=sys.stderr)
        return 1
    if args.json:
        figures = {"machine": machine, "rounds": args.rounds, "rows": rows}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
