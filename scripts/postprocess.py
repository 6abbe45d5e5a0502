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
from common.errors import InputError, one_line_errors, warn
from common.files import atomic
from common.search import nearest, nonzero_rows, normalize
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
HDF5_OVERHEAD = 2**16  # bytes of an .h5 beyond its data, at most


# ---- input ----


def read_stages(folders, phase):
    """What extraction left in the folders of some stages: their submissions, as `read_submission`
    gives them, and their training descriptors, (n, dim) float32 each.

    Raises InputError unless all stages hold the same images.
    """
    submissions = [read_submission(folder / SUBMISSION[phase]) for folder in folders]
    trains = [read_train(folder / "train_feats.npy") for folder in folders]
    for folder, submission, train in zip(folders, submissions, trains, strict=True):
        train_dim = train.shape[1]
        query_dim = submission["query"].shape[1]
        if train_dim != query_dim:
            raise InputError(
                f"{folder}/train_feats.npy: its dimensions are {train_dim}, those of "
                f"{SUBMISSION[phase]} {query_dim}; extract all with one model"
            )
        same_images = len(train) == len(trains[0])
        for ids in ("query_ids", "reference_ids"):
            same_images &= np.array_equal(submission[ids], submissions[0][ids])
        if not same_images:
            raise InputError(
                f"{folder}: its images are not those of {folders[0]}; extract both from the same "
                f"input"
            )
    return submissions, trains


def concatenated(parts):
    """Descriptors of several stages side by side, at unit length so that beta keeps its meaning;
    one stage unchanged.
    """
    if len(parts) == 1:
        return parts[0]
    return normalize(np.concatenate(parts, axis=1))


# ---- output ----


def find_matches(data):
    """The 10 nearest references of each query: `query_id`, `reference_id`, `score`; nothing matches
    a row of zeros.
    """
    queries = nonzero_rows(data["query"])
    references = nonzero_rows(data["reference"])
    query_ids = np.char.decode(data["query_ids"][queries])
    reference_ids = np.char.decode(data["reference_ids"][references])
    distance, indices = nearest(
        data["query"][queries], data["reference"][references], MATCHES, "l2"
    )
    return pd.DataFrame(
        {
            "query_id": np.repeat(query_ids, indices.shape[1]),
            "reference_id": reference_ids[indices.ravel()],
            "score": -distance.ravel(),
        }
    )


def write_submission(h5_path, csv_path, data, matches):
    """Write both tracks; neither file changes before both are complete and have been read back."""
    with atomic(csv_path) as csv_file, atomic(h5_path) as h5_file:
        matches.to_csv(csv_file, index=False)
        needed = HDF5_OVERHEAD + sum(data[name].nbytes for name in DATASETS)
        if needed > shutil.disk_usage(h5_path.parent).free:  # HDF5 would crash
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(h5_path))
        with h5py.File(h5_file, "w") as file:
            for name in DATASETS:
                file.create_dataset(name, data=data[name])
        read_matches(csv_file)
        check_submission(h5_file)


# ---- main ----


def postprocess(args):
    """Read the extracted descriptors of `args.versions`, write both submission files; returns
    their paths.
    """
    folders = [args.exp / version / "extract" for version in args.versions]
    submissions, trains = read_stages(folders, args.phase)
    data = submissions[0]

    train = concatenated(trains)
    del trains  # gigabytes
    train = train[nonzero_rows(train)]
    train = database_augmentation(train, args.k, args.alpha)
    for name in ("query", "reference"):
        descriptors = concatenated([submission.pop(name) for submission in submissions])
        data[name] = negative_embedding_subtraction(
            descriptors, train, args.num_iter, args.k, args.beta
        )
    matches = find_matches(data)

    versions = [folder.parent.name for folder in folders]
    stem = "_".join(versions) + "_iso" + SUFFIX[args.phase]
    h5_path = folders[-1] / f"{stem}.h5"
    csv_path = folders[-1] / f"{stem}.csv"
    write_submission(h5_path, csv_path, data, matches)
    dimensions = data["query"].shape[1]
    if dimensions > MAX_DIMENSIONS:
        warn(f"{h5_path}: {dimensions} dimensions; the descriptor track allows {MAX_DIMENSIONS}")
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
        "result goes to the last one's folder under all their names (default: v107)",
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
        "--num-iter", type=at_least(int, 0), default=1, help="how often to subtract (default: 1)"
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Run the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    for path in postprocess(args):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
