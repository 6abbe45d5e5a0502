r"""Micro average precision and recall at 90% precision, as the Image Similarity Challenge computes
them.

    # descriptor track
    python scripts/eval_metrics.py exp/v107/extract/v107_iso.h5 input/public_ground_truth.csv
    # matching track
    python scripts/eval_metrics.py exp/v107/extract/v107_iso.csv input/public_ground_truth.csv
    # with score normalization, which papers after 2021 report too
    python scripts/eval_metrics.py --score-normalization exp/v98/extract/train_feats.npy \
        exp/v98/extract/fb-isc-submission.h5 input/public_ground_truth.csv

Prints a JSON object with `average_precision` and `recall_p90`. From an .h5, the candidates are the
(queries x 10) pairs nearest over all queries together; they are also written beside it, as
<stem>_candidates.csv (normalized ones as <stem>_normalized_candidates.csv).

Queries that the ground truth does not list, with a reference or without, are left out. Among equal
scores, wrong pairs come first. A row of zeros stands for an unreadable image and matches nothing.
Score normalization (SSCD, arXiv 2202.10261) subtracts from a pair's cosine how much the query
resembles the background: its mean cosine with its nearest training descriptors. The descriptor
track itself compares distances without it. Paper of the challenge: arXiv 2106.09672.
"""

import argparse
import json
import sys
from pathlib import Path

from common.cli import at_least
from common.descriptors import read_train
from common.errors import InputError, one_line_errors
from common.evaluation import (
    load_candidates,
    match,  # noqa: F401  (others import it from here)
    micro_metrics,
    normalization_offset,
    read_ground_truth,
)
from common.files import atomic
from common.search import nonzero_rows, normalize
from common.submissions import add_submission_arguments, track_of

# ---- score normalization ----


def read_normalization(path, beta, neighbors):
    """The function of queries, (q, dim) -> (q,) float32, that `load_candidates` takes as its
    `normalization`, from the training descriptors at `path`.
    """
    train = read_train(path)
    train = normalize(train[nonzero_rows(train)])

    def normalization(query):
        if query.shape[1] != train.shape[1]:
            raise InputError(
                f"{path}: its dimensions are {train.shape[1]}, those of the submission "
                f"{query.shape[1]}; extract both with one model"
            )
        return normalization_offset(query, train, beta, neighbors)

    return normalization


# ---- metrics ----


def evaluate(submission_path, ground_truth_path):
    """Compute {"average_precision", "recall_p90"} of an .h5 (descriptor track) or .csv (matching
    track). Writes nothing.

    Raises InputError, one line that says which file is wrong, how, and what to do.
    """
    truth = read_ground_truth(Path(ground_truth_path))
    candidates = load_candidates(Path(submission_path), truth, ground_truth_path)
    return micro_metrics(candidates, truth)


# ---- main ----


def parse_args(argv=None):
    """The command line; the flags are the published ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_submission_arguments(parser)
    parser.add_argument(
        "ground_truth", type=Path, metavar="GROUND_TRUTH", help="csv: query_id,reference_id"
    )
    parser.add_argument(
        "--ngpu",
        type=int,
        default=-1,
        help="GPUs that faiss may use; -1: all it sees (default), 0: none",
    )
    parser.add_argument(
        "--score-normalization",
        type=Path,
        metavar="TRAIN.npy",
        help="training descriptors of the same network: subtract from each cosine the query's mean "
        "cosine with the nearest of them",
    )
    parser.add_argument(
        "--normalization-beta",
        type=at_least(float, 0),
        default=1.0,
        help="share subtracted (default: 1)",
    )
    parser.add_argument(
        "--normalization-neighbors",
        "--normalization-neighbours",  # the former spelling
        type=at_least(int, 0),
        nargs=2,
        default=(0, 2),
        metavar=("FIRST", "LAST"),
        help="which of the nearest, counted from 0 (default: 0 2, as SSCD)",
    )
    args = parser.parse_args(argv)
    if args.normalization_neighbors[0] > args.normalization_neighbors[1]:
        parser.error("--normalization-neighbors: FIRST must not be greater than LAST")
    return args


@one_line_errors
def main(argv=None):
    """Run the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    truth = read_ground_truth(args.ground_truth)
    normalization = None
    if args.score_normalization:
        normalization = read_normalization(
            args.score_normalization, args.normalization_beta, args.normalization_neighbors
        )
    candidates = load_candidates(
        args.submission, truth, args.ground_truth, args.track, args.ngpu, normalization
    )
    if track_of(args.submission, args.track) == "descriptor":
        suffix = "_normalized_candidates.csv" if normalization else "_candidates.csv"
        with atomic(args.submission.with_name(args.submission.stem + suffix)) as file:
            candidates.to_csv(file, index=False)
    print(json.dumps(micro_metrics(candidates, truth)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
