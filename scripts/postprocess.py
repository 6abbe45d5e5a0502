"""Database augmentation and negative embedding subtraction: from extracted descriptors to the two
submission files.

    cd exp && python ../scripts/postprocess.py  # v107, phase 1, as published
    python scripts/postprocess.py v107 --phase 2
    python scripts/postprocess.py v98 v107      # both stages' descriptors, concatenated

Needs   exp/vNN/extract/train_feats.npy and fb-isc-submission.h5 (phase 2:
        fb-isc-submission-phase2.h5), which `python vNN.py --mode extract --target-set qrt ...`
        writes.
Writes  exp/vNN/extract/vNN_iso.h5 (descriptor track) and vNN_iso.csv (matching track); phase 2:
        vNN_iso_phase2.*.

The challenge forbids using query or reference images to process each other: only training
descriptors enter. Paper: arXiv 2112.04323.
"""

import argparse
import errno
import os
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from common.cli import at_least
from common.descriptors import database_augmentation, negative_embedding_subtraction, read_train
from common.errors import InputError, one_line_errors
from common.files import atomic
from common.search import described, nearest, normalize
from common.submissions import (
    DATASETS,
    MAX_DIMENSIONS,
    check_submission,
    read_matches,
    read_submission,
)

EXP = Path(__file__).resolve().parents[1] / "exp"
SUBMISSION = {1: "fb-isc-submission.h5", 2: "fb-isc-submission-phase2.h5"}
SUFFIX = {1: "", 2: "_phase2"}
MATCHES = 10  # references per query in the csv, the challenge's allowance


# ---- search ----


# ---- descriptors ----


# ---- files ----


def concatenated(parts):
    """Descriptors of several stages side by side, at unit length so that beta keeps its meaning;
    one stage as it is.
    """
    return parts[0] if len(parts) == 1 else normalize(np.concatenate(parts, axis=1))


def find_matches(data):
    """The 10 nearest references of each query: `query_id`, `reference_id`, `score`; nothing matches
    a row of zeros.
    """
    queries, references = described(data["query"]), described(data["reference"])
    distance, indices = nearest(
        data["query"][queries], data["reference"][references], MATCHES, "l2"
    )
    return pd.DataFrame(
        {
            "query_id": np.repeat(np.char.decode(data["query_ids"][queries]), indices.shape[1]),
            "reference_id": np.char.decode(data["reference_ids"][references])[indices.ravel()],
            "score": -distance.ravel(),
        }
    )


def write_submission(h5_path, csv_path, data, matches):
    """Writes both tracks; neither file changes before both are complete and read back well."""
    with atomic(csv_path) as csv_file, atomic(h5_path) as h5_file:
        matches.to_csv(csv_file, index=False)
        if (
            2**16 + sum(data[name].nbytes for name in DATASETS)
            > shutil.disk_usage(h5_path.parent).free
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(h5_path))  # HDF5 would crash
        with h5py.File(h5_file, "w") as file:
            for name in DATASETS:
                file.create_dataset(name, data=data[name])
        read_matches(csv_file)
        check_submission(h5_file)


# ---- main ----


def postprocess(args):
    """Reads the extracted descriptors of `args.versions`, writes both submission files; returns
    their paths.
    """
    folders = [args.exp / version / "extract" for version in args.versions]
    submissions = [read_submission(folder / SUBMISSION[args.phase]) for folder in folders]
    trains = [read_train(folder / "train_feats.npy") for folder in folders]
    data = submissions[0]
    for folder, submission, train in zip(folders, submissions, trains, strict=True):
        if train.shape[1] != submission["query"].shape[1]:
            dims = (
                f"{train.shape[1]}, those of {SUBMISSION[args.phase]} "
                f"{submission['query'].shape[1]}"
            )
            raise InputError(
                f"{folder}/train_feats.npy: its dimensions are {dims}; extract all with one model"
            )
        if len(train) != len(trains[0]) or any(
            not np.array_equal(submission[name], data[name])
            for name in ("query_ids", "reference_ids")
        ):
            raise InputError(
                f"{folder}: its images are not those of {folders[0]}; extract both from the same "
                f"input"
            )

    train = concatenated(trains)
    del trains
    train = database_augmentation(train[described(train)], args.k, args.alpha)
    for name in ("query", "reference"):
        data[name] = negative_embedding_subtraction(
            concatenated([submission.pop(name) for submission in submissions]),
            train,
            args.num_iter,
            args.k,
            args.beta,
        )
    matches = find_matches(data)

    stem = "_".join(folder.parent.name for folder in folders) + "_iso" + SUFFIX[args.phase]
    h5_path, csv_path = folders[-1] / f"{stem}.h5", folders[-1] / f"{stem}.csv"
    write_submission(h5_path, csv_path, data, matches)
    if (dims := data["query"].shape[1]) > MAX_DIMENSIONS:
        message = f"{h5_path}: {dims} dimensions; the descriptor track allows {MAX_DIMENSIONS}"
        print(f"postprocess.py: warning: {message}", file=sys.stderr)
    return h5_path, csv_path


def parse_args(argv=None):
    """The command line; the defaults are the published run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "versions",
        nargs="*",
        default=["v107"],
        metavar="VERSION",
        help="stage(s) whose descriptors are used; those of several are concatenated, and the "
        "result goes to the last "
        "one's folder under all their names (default: v107)",
    )
    parser.add_argument(
        "--exp",
        type=Path,
        default=EXP,
        help="folder that holds VERSION/extract (default: %(default)s)",
    )
    parser.add_argument(
        "--phase", type=int, choices=(1, 2), default=1, help="query set (default: 1)"
    )
    parser.add_argument(
        "--k", type=at_least(int, 1), default=10, help="neighbors in both steps (default: 10)"
    )
    parser.add_argument(
        "--alpha", type=at_least(float, 0), default=3.0, help="power of the similarity (default: 3)"
    )
    parser.add_argument(
        "--beta", type=at_least(float, 0), default=0.35, help="share subtracted (default: 0.35)"
    )
    parser.add_argument(
        "--num-iter", type=at_least(int, 0), default=1, help="subtractions in turn (default: 1)"
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Runs the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    for path in postprocess(args):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
