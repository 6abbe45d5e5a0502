"""Micro average precision and recall at 90% precision, as the Image Similarity Challenge computes them.

    python scripts/eval_metrics.py exp/v107/extract/v107_iso.h5 input/public_ground_truth.csv       # descriptor track
    python scripts/eval_metrics.py exp/v107/extract/v107_iso.csv input/public_ground_truth.csv      # matching track

Prints a JSON object with `average_precision` and `recall_p90`. From an .h5, the candidates are the (queries x 10) pairs
nearest over all queries together; they are also written beside it, as <stem>_candidates.csv.

Queries that the ground truth does not list, with a reference or without, are left out. Equal scores count worst first.
A row of zeros, of an image that could not be read, matches nothing.
Paper of the challenge: arXiv 2106.09672.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from postprocess import BLOCK, as_float32, atomic, described, flat_search, pair_scores
from validate_submission import (
    MAX_DIMENSIONS,
    InputError,
    add_track_flags,
    read_csv,
    read_matches,
    read_submission,
    track_of,
)

CANDIDATES = 10  # per query of the ground truth, the challenge's allowance
PAIRS = 2**20  # pairs that one call of the search may return


# ---- candidates ----


def nearest_pairs(query, reference, max_results, num_gpus=-1):
    """The `max_results` pairs with the smallest squared distance over all queries together, exactly.

    query (q, dim), reference (r, dim). Returns squared distances float32, query and reference positions int64, each
    (n,), nearest first, equal distances by query, then by reference; n is less where there are fewer pairs.

    Every query gets its k nearest references. The distance of the max_results-th best pair so far is a radius that can
    only shrink; a query whose k-th neighbour is still inside may own more pairs and is searched again with a larger k.
    Fewer than max_results / k queries can be, ties aside, so that no round is much larger than the first.
    """
    query, reference = as_float32(query), as_float32(reference)
    if max_results < 1 or not len(query) or not len(reference) or query.shape[1] != reference.shape[1]:
        raise InputError(f"cannot find {max_results} pairs of descriptors {query.shape} and {reference.shape}")
    search = flat_search(reference, "l2", num_gpus)
    norm = np.sqrt(np.einsum("nd,nd->n", query, query, dtype=np.float64))
    radius = np.inf

    def reach(rows):
        """The radius plus what faiss's |x|^2 + |y|^2 - 2xy is off by at most, for a reference y within the radius."""
        return radius + (query.shape[1] + 8) * 2.0**-24 * (2 * norm[rows] + radius**0.5) ** 2

    best = np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64)
    todo, k = np.arange(len(query)), 4 * -(-max_results // len(query))
    while len(todo):
        k = min(k, len(reference))
        size = min(BLOCK, max(1, PAIRS // k))
        again = np.isin(best[1], todo)
        best = tuple(column[~again] for column in best)
        last = np.empty(len(todo), np.float32)
        with tqdm(total=len(todo), desc=f"{k} nearest of {len(reference)}", unit="query") as bar:
            for start in range(0, len(todo), size):
                block = todo[start : start + size]
                distance, index = search(query[block], k)
                last[start : start + size] = distance[:, -1]
                row, column = np.nonzero(distance <= reach(block)[:, None])
                found = exact_distances(query, reference, block[row], index[row, column])
                best = merge(best, (found, block[row], index[row, column]), max_results)
                if len(best[0]) == max_results:
                    radius = min(radius, float(best[0][-1]))
                bar.update(len(block))
        todo = todo[last <= reach(todo)] if k < len(reference) else todo[:0]
        k *= 4
    return best


def exact_distances(query, reference, query_index, reference_index, chunk=16384):
    """Squared distances of the given pairs, (n,) float32, each from nothing but its two rows."""
    result = np.empty(len(query_index), np.float32)
    for start in range(0, len(result), chunk):
        rows = slice(start, start + chunk)
        result[rows] = pair_scores(query[query_index[rows]], reference[reference_index[rows]], "l2")
    return result


def merge(best, found, count):
    """The first `count` of two lists of pairs by (distance, query, reference)."""
    distance, query, reference = (np.concatenate(columns) for columns in zip(best, found, strict=True))
    order = np.lexsort((reference, query, distance))[:count]
    return distance[order], query[order], reference[order]


def match(query, reference, query_ids, reference_ids, max_results, num_gpus=-1):
    """The `max_results` nearest pairs over all queries together as a table of candidates.

    query (q, dim), reference (r, dim); query_ids (q,), reference_ids (r,) bytes or str. Returns a DataFrame with
    `query_id`, `reference_id` (str) and `score` (float32, minus the squared distance), ordered by query, then by
    reference position; all pairs where there are fewer. Exact copies of a reference get exactly the same score; at the
    border, equal scores are taken in the order of queries, then references. Memory does not grow with q x r.
    """
    distance, query_index, reference_index = nearest_pairs(query, reference, max_results, num_gpus)
    order = np.lexsort((reference_index, query_index))
    return pd.DataFrame(
        {
            "query_id": as_text(query_ids)[query_index[order]],
            "reference_id": as_text(reference_ids)[reference_index[order]],
            "score": -distance[order],
        }
    )


def as_text(ids):
    """Ids as a str array, from bytes or str."""
    ids = np.asarray(ids)
    return np.char.decode(ids, "utf-8") if ids.dtype.kind == "S" else ids.astype(str)


# ---- files ----


def warn(message):
    """One line on stderr."""
    print(f"eval_metrics.py: warning: {message}", file=sys.stderr)


def read_ground_truth(path):
    """`query_id`, `reference_id` (empty: a distractor), each row once; at least one row has a reference."""
    truth = read_csv(path, ("query_id", "reference_id")).drop_duplicates(ignore_index=True)
    if (truth["reference_id"] == "").all():
        raise InputError(
            f"{path}: no query has a reference, so there is nothing to find; use the labelled ground truth"
        )
    return truth


def check_spread(submission, path):
    """Raises InputError where all descriptors are the same, as those of a collapsed network."""
    low = np.minimum(submission["query"].min(axis=0), submission["reference"].min(axis=0))
    high = np.maximum(submission["query"].max(axis=0), submission["reference"].max(axis=0))
    rows = len(submission["query"]) + len(submission["reference"])
    if rows > 2 and (high - low).max() <= 1e-6 * max(np.abs(low).max(), np.abs(high).max()):
        raise InputError(f"{path}: all {rows} descriptors are the same; the network has collapsed, check its training")


def known_queries(ids, truth, path, ground_truth_path):
    """Which of `ids`, (n,) str, the ground truth lists. Raises InputError where it lists none."""
    ids, listed = np.asarray(ids, dtype=str), np.unique(truth["query_id"].to_numpy(str))
    known = np.isin(ids, listed)
    if not known.any():
        raise InputError(f"{path}: {ground_truth_path} lists none of its queries, such as {ids[0]}; use the same phase")
    if not known.all():
        count = len(np.unique(ids[~known]))
        warn(f"{path}: {count} queries are left out, {ground_truth_path} does not list them, such as {ids[~known][0]}")
    return known


def load_candidates(path, truth, ground_truth_path, track=None, num_gpus=-1):
    """Candidates of the queries that the ground truth lists: a table with `query_id`, `reference_id`, `score`."""
    if track_of(path, track) == "matching":
        matches = read_matches(path)
        known = known_queries(matches["query_id"], truth, path, ground_truth_path)
        repeated = int(matches[known].duplicated(["query_id", "reference_id"]).sum())
        if repeated:
            warn(f"{path}: {repeated} rows repeat a pair; each counts, as in the official script")
        return matches[known]

    submission = read_submission(path)
    check_spread(submission, path)
    if (dims := submission["query"].shape[1]) > MAX_DIMENSIONS:
        warn(f"{path}: {dims} dimensions; the descriptor track allows {MAX_DIMENSIONS}")
    known = known_queries(as_text(submission["query_ids"]), truth, path, ground_truth_path)
    absent = np.setdiff1d(truth["reference_id"].to_numpy(str), np.append(as_text(submission["reference_ids"]), ""))
    if len(absent):
        warn(f"{path}: {len(absent)} references of {ground_truth_path} are not in it, such as {absent[0]}: never found")
    max_results = CANDIDATES * int(known.sum())
    known &= submission["query"].any(axis=1)
    read = described(submission["reference"])
    return match(
        submission["query"][known],
        submission["reference"][read],
        submission["query_ids"][known],
        submission["reference_ids"][read],
        max_results,
        num_gpus,
    )


# ---- metrics ----


def micro_metrics(candidates, truth):
    """`average_precision` and `recall_p90` of scored pairs against the ground truth's distinct positive pairs.

    Sorted by score, wrong ones first among equals: average_precision = sum of precision x recall increment,
    recall_p90 = the largest recall among ranks with precision >= 0.9, or 0. A pair that is repeated counts every time.
    """
    positives = pd.MultiIndex.from_frame(truth[truth["reference_id"] != ""])
    correct = pd.MultiIndex.from_frame(candidates[["query_id", "reference_id"]]).isin(positives)
    correct = correct[np.lexsort((correct, -candidates["score"].to_numpy()))]
    found = np.cumsum(correct)
    precision, recall = found / np.arange(1, len(correct) + 1), found / len(positives)
    return {
        "average_precision": float(precision[correct].sum() / len(positives)),
        "recall_p90": float(recall[precision >= 0.9].max(initial=0.0)),
    }


def evaluate(submission_path, ground_truth_path):
    """{"average_precision", "recall_p90"} of an .h5 (descriptor track) or .csv (matching track). Writes nothing.

    Raises InputError, one line that says which file is wrong, how, and what to do.
    """
    truth = read_ground_truth(Path(ground_truth_path))
    return micro_metrics(load_candidates(Path(submission_path), truth, ground_truth_path), truth)


# ---- main ----


def parse_args(argv=None):
    """The command line; the flags are the published ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "submission", type=Path, metavar="SUBMISSION", help=".h5 with descriptors, or .csv with matches"
    )
    parser.add_argument("ground_truth", type=Path, metavar="GROUND_TRUTH", help="csv: query_id,reference_id")
    add_track_flags(parser)
    parser.add_argument(
        "--ngpu", type=int, default=-1, help="GPUs that faiss may use; -1: all it sees (default), 0: none"
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Runs the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    try:
        truth = read_ground_truth(args.ground_truth)
        candidates = load_candidates(args.submission, truth, args.ground_truth, args.track, args.ngpu)
        if track_of(args.submission, args.track) == "descriptor":
            with atomic(args.submission.with_name(f"{args.submission.stem}_candidates.csv")) as file:
                candidates.to_csv(file, index=False)
        print(json.dumps(micro_metrics(candidates, truth)))
    except (InputError, OSError) as error:
        print(f"eval_metrics.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
