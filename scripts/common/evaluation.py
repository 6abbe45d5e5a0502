"""Candidates of a submission and their scores: micro average precision, recall, kinds of edits."""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.errors import InputError
from common.search import BLOCK, as_float32, described, flat_search, nearest, normalize, pair_scores
from common.submissions import MAX_DIMENSIONS, read_csv, read_matches, read_submission, track_of

CANDIDATES = 10  # per query of the ground truth, the challenge's allowance


PAIRS = 2**20  # pairs that one call of the search may return


def nearest_pairs(query, reference, max_results, num_gpus=-1, offset=None):
    """The `max_results` pairs with the smallest squared distance over all queries together,
    exactly.

    query (q, dim), reference (r, dim); offset (q,) float32, if any, is added to the distances of a
    query's pairs. Returns squared distances float32, query and reference positions int64, each
    (n,), nearest first, equal distances by query, then by reference; n is less where there are
    fewer pairs.

    Every query gets its k nearest references. The distance of the max_results-th best pair so far
    is a radius that can only shrink; a query whose k-th neighbor is still inside may own more
    pairs and is searched again with a larger k. Fewer than max_results / k queries can be, ties
    aside, so that no round is much larger than the first.
    """
    query, reference = as_float32(query), as_float32(reference)
    if (
        max_results < 1
        or not len(query)
        or not len(reference)
        or query.shape[1] != reference.shape[1]
    ):
        raise InputError(
            f"cannot find {max_results} pairs of descriptors {query.shape} and {reference.shape}"
        )
    search = flat_search(reference, "l2", num_gpus)
    norm = np.sqrt(np.einsum("nd,nd->n", query, query, dtype=np.float64))
    offset = np.zeros(len(query), np.float32) if offset is None else offset
    radius = np.inf

    def reach(rows):
        """The radius plus what faiss's |x|^2 + |y|^2 - 2xy is off by at most, for a reference y
        within the radius.
        """
        own = (
            radius - offset[rows].astype(np.float64) + 2.0**-22 * np.abs(offset[rows])
        )  # and the sum's rounding
        return (
            own + (query.shape[1] + 8) * 2.0**-24 * (2 * norm[rows] + own.clip(min=0) ** 0.5) ** 2
        )

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
                found = (
                    exact_distances(query, reference, block[row], index[row, column])
                    + offset[block[row]]
                )
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
    distance, query, reference = (
        np.concatenate(columns) for columns in zip(best, found, strict=True)
    )
    order = np.lexsort((reference, query, distance))[:count]
    return distance[order], query[order], reference[order]


def normalization_offset(query, train, beta=1.0, neighbors=(0, 2)):
    """What score normalization adds to the squared distances of each query's pairs, (q,) float32.

    query (q, dim), train (n, dim), all of unit length; neighbors: the first and the last of a
    query's nearest training descriptors, counted from 0, that enter; fewer where there are not so
    many. In cosines it takes away beta x their mean, so 2 x beta x their mean is added here. Raises
    InputError where no neighbor is left. SSCD (arXiv 2202.10261) evaluates with beta 1 and its
    neighbors 0 to 2.
    """
    first, last = neighbors
    similarity, _ = nearest(query, train, last + 1, "ip")
    if first >= similarity.shape[1]:
        raise InputError(
            f"--normalization-neighbors {first} {last}: there are {len(train)} training "
            f"descriptors only"
        )
    return np.float32(2 * beta) * similarity[:, first:].mean(axis=1)


def match(query, reference, query_ids, reference_ids, max_results, num_gpus=-1, offset=None):
    """The `max_results` nearest pairs over all queries together as a table of candidates.

    query (q, dim), reference (r, dim); query_ids (q,), reference_ids (r,) bytes or str; offset as
    in `nearest_pairs`. Returns a DataFrame with `query_id`, `reference_id` (str) and `score`
    (float32, minus the squared distance and the offset), ordered by query, then by reference
    position; all pairs where there are fewer. Exact copies of a reference get exactly the same
    score; at the border, equal scores are taken in the order of queries, then references. Memory
    does not grow with q x r.
    """
    distance, query_index, reference_index = nearest_pairs(
        query, reference, max_results, num_gpus, offset
    )
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


def warn(message):
    """One line on stderr."""
    print(f"eval_metrics.py: warning: {message}", file=sys.stderr)


def read_ground_truth(path):
    """`query_id`, `reference_id` (empty: a distractor), each row once; at least one row has a
    reference.
    """
    truth = read_csv(path, ("query_id", "reference_id")).drop_duplicates(ignore_index=True)
    if (truth["reference_id"] == "").all():
        raise InputError(
            f"{path}: no query has a reference, so there is nothing to find; use the labeled "
            f"ground truth"
        )
    return truth


def check_spread(submission, path):
    """Raises InputError where all descriptors are the same, as those of a collapsed network."""
    low = np.minimum(submission["query"].min(axis=0), submission["reference"].min(axis=0))
    high = np.maximum(submission["query"].max(axis=0), submission["reference"].max(axis=0))
    rows = len(submission["query"]) + len(submission["reference"])
    if rows > 2 and (high - low).max() <= 1e-6 * max(np.abs(low).max(), np.abs(high).max()):
        raise InputError(
            f"{path}: all {rows} descriptors are the same; the network has collapsed, check its "
            f"training"
        )


def known_queries(ids, truth, path, ground_truth_path):
    """Which of `ids`, (n,) str, the ground truth lists. Raises InputError where it lists none."""
    ids, listed = np.asarray(ids, dtype=str), np.unique(truth["query_id"].to_numpy(str))
    known = np.isin(ids, listed)
    if not known.any():
        raise InputError(
            f"{path}: {ground_truth_path} lists none of its queries, such as {ids[0]}; use the "
            f"same phase"
        )
    if not known.all():
        count = len(np.unique(ids[~known]))
        warn(
            f"{path}: {count} queries are left out, {ground_truth_path} does not list them, such "
            f"as {ids[~known][0]}"
        )
    return known


def load_candidates(path, truth, ground_truth_path, track=None, num_gpus=-1, normalization=None):
    """Candidates of the queries that the ground truth lists: a table with `query_id`,
    `reference_id`, `score`.

    normalization: a function of the queries (q, dim) that gives their offset for `match`, (q,);
    descriptors are brought to unit length for it.
    """
    if track_of(path, track) == "matching":
        if normalization:
            raise InputError(
                f"{path}: --score-normalization needs descriptors, of the .h5; leave it out"
            )
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
    absent = np.setdiff1d(
        truth["reference_id"].to_numpy(str), np.append(as_text(submission["reference_ids"]), "")
    )
    if len(absent):
        warn(
            f"{path}: {len(absent)} references of {ground_truth_path} are not in it, such as "
            f"{absent[0]}: never found"
        )
    max_results = CANDIDATES * int(known.sum())
    known &= submission["query"].any(axis=1)
    read = described(submission["reference"])
    query, reference, offset = submission["query"][known], submission["reference"][read], None
    if normalization:
        query, reference = (normalize(np.array(rows, np.float32)) for rows in (query, reference))
        offset = normalization(query)
    ids = submission["query_ids"][known], submission["reference_ids"][read]
    return match(query, reference, *ids, max_results, num_gpus, offset)


def micro_metrics(candidates, truth):
    """`average_precision` and `recall_p90` of scored pairs against the ground truth's distinct
    positive pairs.

    Sorted by score, wrong ones first among equals: average_precision = sum of precision x recall
    increment, recall_p90 = the largest recall among ranks with precision >= 0.9, or 0. A pair that
    is repeated counts every time.
    """
    positives, pairs = truth[truth["reference_id"] != ""], candidates[["query_id", "reference_id"]]
    correct = (
        pairs["reference_id"].isin(positives["reference_id"]).to_numpy(copy=True)
    )  # few are: pairs are slower
    correct[correct] = pd.MultiIndex.from_frame(pairs[correct]).isin(
        pd.MultiIndex.from_frame(positives)
    )
    correct = correct[np.lexsort((correct, -candidates["score"].to_numpy()))]
    found = np.cumsum(correct)
    precision, recall = found / np.arange(1, len(correct) + 1), found / len(positives)
    return {
        "average_precision": float(precision[correct].sum() / len(positives)),
        "recall_p90": float(recall[precision >= 0.9].max(initial=0.0)),
    }


PAIR = ["query_id", "reference_id"]


@dataclass(frozen=True)
class Ranking:
    """Scored pairs, best first, wrong ones first among equals, as eval_metrics.py ranks them.

    pairs: `query_id`, `reference_id`, `score`, `correct` (bool); positives: number of pairs in the
    ground truth.
    """

    pairs: pd.DataFrame
    positives: int

    def curve(self):
        """Precision and recall after each pair, (n,) float64 each."""
        found = self.pairs["correct"].to_numpy().cumsum()
        return found / np.arange(1, len(found) + 1), found / self.positives

    def depth(self, precision):
        """How many pairs to accept for the largest recall at this precision or more; 0: it is never
        reached.
        """
        reached = (self.curve()[0] >= precision) & self.pairs["correct"].to_numpy()
        return int(np.flatnonzero(reached).max(initial=-1)) + 1

    def average_precision(self):
        """Micro average precision."""
        return float(self.curve()[0][self.pairs["correct"].to_numpy()].sum() / self.positives)


def rank(candidates, truth):
    """The Ranking of candidates (`query_id`, `reference_id`, `score`) by a ground truth (the former
    two).
    """
    positives = pd.MultiIndex.from_frame(truth[truth["reference_id"] != ""])
    correct = pd.MultiIndex.from_frame(candidates[PAIR]).isin(positives)
    order = np.lexsort((correct, -candidates["score"].to_numpy()))
    return Ranking(
        candidates.assign(correct=correct).iloc[order].reset_index(drop=True), len(positives)
    )


def read_edits(path):
    """{query_id: [(name, parameters as JSON), ...]} of a query_edits.csv. Raises InputError with
    what is wrong.
    """
    edits = {}
    for line, (query, text) in enumerate(
        read_csv(path, ("query_id", "edits")).itertuples(index=False), 2
    ):
        try:
            edits[query] = [
                (str(name).replace("_", " "), json.dumps(details))
                for name, details in json.loads(text)
            ]
        except (TypeError, ValueError, RecursionError):
            raise InputError(
                f"{path}: edits in line {line} are no JSON list of [name, parameters]; mend it"
            ) from None
    return edits


def scores_by_edit(ranking, truth, edits):
    """A row for each kind of edit that not all queries have, the hardest first, then one for all
    queries.

    (name, queries, copies, recall of each query's best candidate, recall at 90% precision over all
    queries, average precision over these queries alone). Copies are pairs of the ground truth;
    without any, the rest is None.
    """
    parts = (
        ranking.pairs.drop_duplicates("query_id"),
        ranking.pairs[: ranking.depth(0.9)],
        ranking.pairs,
    )
    queries, kinds = set(truth["query_id"]), defaultdict(set)
    for query in queries & edits.keys():
        for name, _ in edits[query]:
            kinds[name].add(query)

    def row(name, members):
        here = truth[truth["query_id"].isin(members)]
        copies = int((here["reference_id"] != "").sum())
        if not copies:
            return name, len(members), 0, None, None, None
        best, accepted, pairs = (part[part["query_id"].isin(members)] for part in parts)
        recalls = [part["correct"].sum() / copies for part in (best, accepted)]
        return name, len(members), copies, *recalls, Ranking(pairs, copies).average_precision()

    rows = [row(name, members) for name, members in sorted(kinds.items()) if members != queries]
    return [
        *sorted(rows, key=lambda cells: 2 if cells[-1] is None else cells[-1]),
        row("all queries", queries),
    ]
