"""Candidates of a submission and their scores: micro average precision, recall, kinds of edits."""

import json
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.errors import InputError, warn
from common.search import (
    BLOCK,
    as_float32,
    flat_search,
    nearest,
    nonzero_rows,
    normalize,
    pair_scores,
)
from common.submissions import MAX_DIMENSIONS, read_csv, read_matches, read_submission, track_of

PAIR_COLUMNS = ["query_id", "reference_id"]
CANDIDATES_PER_QUERY = 10  # of the ground truth, the challenge's allowance
MAX_SEARCH_RESULTS = 2**20  # pairs that one call of the search may return


# ---- the nearest pairs ----


def nearest_pairs(query, reference, max_results, num_gpus=-1, offset=None):
    """The `max_results` pairs with the smallest squared distance over all queries together,
    exactly.

    query (q, dim), reference (r, dim); offset (q,) float32, if any, is added to the distances of a
    query's pairs. Returns squared distances float32, query and reference positions int64, each
    (n,), nearest first, equal distances by query, then by reference; n is less where there are
    fewer pairs. Raises InputError where shapes or `max_results` are invalid.

    Every query gets its k nearest references. The distance of the max_results-th best pair so far
    is a radius that can only shrink. A query whose k-th neighbor is still inside may own more
    pairs and is searched again with a larger k. Fewer than max_results / k queries can be, ties
    aside, so that no round is much larger than the first.
    """
    query = as_float32(query)
    reference = as_float32(reference)
    no_pairs = max_results < 1 or not len(query) or not len(reference)
    if no_pairs or query.shape[1] != reference.shape[1]:
        raise InputError(
            f"cannot find {max_results} pairs of descriptors {query.shape} and {reference.shape}"
        )
    search = flat_search(reference, "l2", num_gpus)
    lengths = np.sqrt(np.einsum("nd,nd->n", query, query, dtype=np.float64))
    if offset is None:
        offset = np.zeros(len(query), np.float32)

    best = (np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64))
    radius = np.inf
    todo = np.arange(len(query))
    k = 4 * -(-max_results // len(query))
    while len(todo):
        k = min(k, len(reference))
        best = without_queries(best, todo)  # this round finds their pairs again
        last_distances = []  # of the k-th neighbor of each query
        step = min(BLOCK, max(1, MAX_SEARCH_RESULTS // k))
        with tqdm(total=len(todo), desc=f"{k} nearest of {len(reference)}", unit="query") as bar:
            for start in range(0, len(todo), step):
                block = todo[start : start + step]
                distances, neighbors = search(query[block], k)
                last_distances.append(distances[:, -1].copy())  # a view would keep all of them
                limits = search_limits(radius, offset[block], lengths[block], query.shape[1])
                rows, columns = np.nonzero(distances <= limits[:, None])
                queries = block[rows]
                references = neighbors[rows, columns]
                exact = exact_distances(query, reference, queries, references) + offset[queries]
                best = merge(best, (exact, queries, references), max_results)
                if len(best[0]) == max_results:
                    radius = min(radius, float(best[0][-1]))
                bar.update(len(block))
        if k == len(reference):
            break
        limits = search_limits(radius, offset[todo], lengths[todo], query.shape[1])
        todo = todo[np.concatenate(last_distances) <= limits]
        k *= 4
    return best


def search_limits(radius, offset, lengths, dimensions):
    """The largest squared distance that faiss may give to a pair within the radius, (q,) float64.

    radius: squared distance plus offset; offset (q,) and lengths (q,) of the queries. faiss
    computes |x|^2 + |y|^2 - 2xy in float32. Its rounding error grows with |x| + |y|, and |y| is at
    most |x| plus the distance. The sum of squared distance and offset is rounded as well.
    """
    distance = radius - offset.astype(np.float64) + 2.0**-22 * np.abs(offset)
    both_lengths = 2 * lengths + np.sqrt(distance.clip(min=0))
    return distance + (dimensions + 8) * 2.0**-24 * both_lengths**2


def exact_distances(query, reference, query_index, reference_index, chunk=16384):
    """Squared distances of the given pairs, (n,) float32; each depends on its two rows alone."""
    result = np.empty(len(query_index), np.float32)
    for start in range(0, len(result), chunk):
        rows = slice(start, start + chunk)
        result[rows] = pair_scores(query[query_index[rows]], reference[reference_index[rows]], "l2")
    return result


def without_queries(pairs, queries):
    """The pairs (distances, queries, references) of all other queries."""
    distances, query_index, reference_index = pairs
    kept = ~np.isin(query_index, queries)
    return distances[kept], query_index[kept], reference_index[kept]


def merge(best, found, count):
    """The first `count` of two lists of pairs by (distance, query, reference)."""
    distance = np.concatenate([best[0], found[0]])
    query = np.concatenate([best[1], found[1]])
    reference = np.concatenate([best[2], found[2]])
    order = np.lexsort((reference, query, distance))[:count]
    return distance[order], query[order], reference[order]


def normalization_offset(query, train, beta=1.0, neighbors=(0, 2)):
    """What score normalization adds to the squared distances of each query's pairs, (q,) float32.

    query (q, dim), train (n, dim), all of unit length; neighbors: the first and the last of a
    query's nearest training descriptors, counted from 0, that are averaged; fewer where there are
    not so many. Normalization subtracts beta x their mean cosine from a pair's cosine, so 2 x beta
    x that mean is added to its squared distance. Raises InputError where no neighbor is left. SSCD
    (arXiv 2202.10261) evaluates with beta 1 and its neighbors 0 to 2.
    """
    first, last = neighbors
    similarity, _ = nearest(query, train, last + 1, "ip")
    if first >= similarity.shape[1]:
        raise InputError(
            f"--normalization-neighbors {first} {last}: there are only {len(train)} training "
            f"descriptors; choose smaller numbers"
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
    pairs = nearest_pairs(query, reference, max_results, num_gpus, offset)
    return candidate_table(pairs, query_ids, reference_ids)


def candidate_table(pairs, query_ids, reference_ids):
    """The table of `match` for the pairs that `nearest_pairs` returns."""
    distance, query_index, reference_index = pairs
    order = np.lexsort((reference_index, query_index))
    return pd.DataFrame(
        {
            "query_id": as_text(query_ids)[query_index[order]],
            "reference_id": as_text(reference_ids)[reference_index[order]],
            "score": -distance[order],
        }
    )


# ---- ground truth and candidates ----


def as_text(ids):
    """Ids as a str array, from bytes or str."""
    ids = np.asarray(ids)
    if ids.dtype.kind == "S":
        return np.char.decode(ids, "utf-8")
    return ids.astype(str)


def read_ground_truth(path):
    """`query_id`, `reference_id` (empty: a distractor), each row once; at least one row has a
    reference. Raises InputError with what is wrong.
    """
    truth = read_csv(path, PAIR_COLUMNS).drop_duplicates(ignore_index=True)
    if (truth["reference_id"] == "").all():
        raise InputError(
            f"{path}: no query has a reference, so there is nothing to find; use the labeled "
            f"ground truth"
        )
    return truth


def check_spread(submission, path):
    """Raise InputError where all descriptors are the same, as those of a collapsed network."""
    query = submission["query"]
    reference = submission["reference"]
    low = np.minimum(query.min(axis=0), reference.min(axis=0))
    high = np.maximum(query.max(axis=0), reference.max(axis=0))
    largest = max(np.abs(low).max(), np.abs(high).max())
    rows = len(query) + len(reference)
    if rows > 2 and (high - low).max() <= 1e-6 * largest:
        raise InputError(
            f"{path}: all {rows} descriptors are the same; the network has collapsed, check its "
            f"training"
        )


def known_queries(ids, truth, path, ground_truth_path):
    """Which of `ids`, (n,) str, the ground truth lists, (n,) bool. Raises InputError where it lists
    none.
    """
    ids = np.asarray(ids, dtype=str)
    listed = np.unique(truth["query_id"].to_numpy(str))
    known = np.isin(ids, listed)
    if not known.any():
        remedy = "use the ground truth of the same phase"
        if not set(listed).isdisjoint(without_suffix(ids)):
            remedy = f"ids must not have a file suffix: remove it in {path}"
        elif not set(ids).isdisjoint(without_suffix(listed)):
            remedy = f"ids must not have a file suffix: remove it in {ground_truth_path}"
        raise InputError(
            f"{path}: {ground_truth_path} lists none of its queries, such as {ids[0]}; {remedy}"
        )
    if not known.all():
        unlisted = ids[~known]
        warn(
            f"{path}: {len(np.unique(unlisted))} queries are left out, {ground_truth_path} does "
            f"not list them, such as {unlisted[0]}"
        )
    return known


def without_suffix(ids):
    """The ids that have a file suffix, such as .jpg, without it."""
    return [name.rpartition(".")[0] for name in ids if "." in name]


def load_candidates(path, truth, ground_truth_path, track=None, num_gpus=-1, normalization=None):
    """Candidates of the queries that the ground truth lists: a table with `query_id`,
    `reference_id`, `score`.

    normalization: a function of the queries (q, dim) that gives their offset for `match`, (q,);
    descriptors are brought to unit length for it. Raises InputError where the submission cannot be
    evaluated.
    """
    if track_of(path, track) == "matching":
        if normalization:
            raise InputError(
                f"{path}: --score-normalization needs descriptors, of the .h5; leave it out"
            )
        return candidates_from_matches(path, truth, ground_truth_path)
    return candidates_from_descriptors(path, truth, ground_truth_path, num_gpus, normalization)


def candidates_from_matches(path, truth, ground_truth_path):
    """The rows of a matching-track file whose queries the ground truth lists."""
    matches = read_matches(path)
    known = known_queries(matches["query_id"], truth, path, ground_truth_path)
    candidates = matches[known]
    repeated = int(candidates.duplicated(PAIR_COLUMNS).sum())
    if repeated:
        warn(f"{path}: {repeated} rows repeat a pair; each counts, as in the official script")
    return candidates


def candidates_from_descriptors(path, truth, ground_truth_path, num_gpus, normalization):
    """The nearest pairs of a descriptor-track file among the queries that the ground truth
    lists.
    """
    submission = read_submission(path)
    check_spread(submission, path)
    dimensions = submission["query"].shape[1]
    if dimensions > MAX_DIMENSIONS:
        warn(f"{path}: {dimensions} dimensions; the descriptor track allows {MAX_DIMENSIONS}")
    known = known_queries(as_text(submission["query_ids"]), truth, path, ground_truth_path)
    warn_of_absent_references(submission, truth, path, ground_truth_path)

    max_results = CANDIDATES_PER_QUERY * int(known.sum())
    queries = known & submission["query"].any(axis=1)
    references = nonzero_rows(submission["reference"])
    query = submission["query"][queries]
    reference = submission["reference"][references]
    offset = None
    if normalization:
        query = normalize(query)
        reference = normalize(reference)
        offset = normalization(query)
    query_ids = submission["query_ids"][queries]
    reference_ids = submission["reference_ids"][references]
    return match(query, reference, query_ids, reference_ids, max_results, num_gpus, offset)


def warn_of_absent_references(submission, truth, path, ground_truth_path):
    """Warn where the ground truth has references that the submission lacks."""
    present = np.append(as_text(submission["reference_ids"]), "")  # "": a query without a copy
    absent = np.setdiff1d(truth["reference_id"].to_numpy(str), present)
    if len(absent):
        warn(
            f"{path}: {len(absent)} references of {ground_truth_path} are not in it, such as "
            f"{absent[0]}: never found"
        )


# ---- metrics ----


@dataclass(frozen=True)
class Ranking:
    """Scored pairs, best first, wrong ones first among equals.

    pairs: `query_id`, `reference_id`, `score`, `correct` (bool); positives: number of pairs in the
    ground truth. A pair that is repeated counts every time.
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
        precisions, _ = self.curve()
        reached = (precisions >= precision) & self.pairs["correct"].to_numpy()
        return int(np.flatnonzero(reached).max(initial=-1)) + 1

    def recall_at(self, precision):
        """The largest recall at this precision or more; 0: it is never reached."""
        depth = self.depth(precision)
        if depth == 0:
            return 0.0
        _, recalls = self.curve()
        return float(recalls[depth - 1])

    def average_precision(self):
        """Micro average precision: the sum of precision x recall increment."""
        precisions, _ = self.curve()
        return float(precisions[self.pairs["correct"].to_numpy()].sum() / self.positives)


def rank(candidates, truth):
    """The Ranking of candidates by a ground truth.

    candidates: `query_id`, `reference_id`, `score`; truth: `query_id`, `reference_id`.
    """
    positives = truth[truth["reference_id"] != ""]
    # Few candidates have a reference of the ground truth, and comparing pairs takes longer.
    correct = candidates["reference_id"].isin(positives["reference_id"]).to_numpy(copy=True)
    likely = pd.MultiIndex.from_frame(candidates.loc[correct, PAIR_COLUMNS])
    correct[correct] = likely.isin(pd.MultiIndex.from_frame(positives[PAIR_COLUMNS]))
    order = np.lexsort((correct, -candidates["score"].to_numpy()))
    pairs = candidates.assign(correct=correct).iloc[order].reset_index(drop=True)
    return Ranking(pairs, len(positives))


def micro_metrics(candidates, truth):
    """`average_precision` and `recall_p90` of scored pairs against the ground truth's distinct
    positive pairs.

    Sorted by score, wrong ones first among equals: average_precision = sum of precision x recall
    increment, recall_p90 = the largest recall among ranks with precision >= 0.9, or 0. A pair that
    is repeated counts every time.
    """
    ranking = rank(candidates, truth)
    return {
        "average_precision": ranking.average_precision(),
        "recall_p90": ranking.recall_at(0.9),
    }


# ---- kinds of edits ----


def read_edits(path):
    """{query_id: [(name, parameters as JSON), ...]} of a query_edits.csv. Raises InputError with
    what is wrong.
    """
    edits = {}
    table = read_csv(path, ("query_id", "edits"))
    for line, row in enumerate(table.itertuples(), start=2):
        try:
            edits[row.query_id] = parse_edits(row.edits)
        except (TypeError, ValueError, RecursionError):
            raise InputError(
                f"{path}: edits in line {line} are not a JSON list of [name, parameters]; "
                f"correct them"
            ) from None
    return edits


def parse_edits(text):
    """[(name, parameters as JSON), ...] of a JSON list of [name, parameters]."""
    edits = []
    for name, parameters in json.loads(text):
        edits.append((str(name).replace("_", " "), json.dumps(parameters)))
    return edits


def scores_by_edit(ranking, truth, edits):
    """A row for each kind of edit that not all queries have, the hardest first, then one for all
    queries.

    (name, queries, copies, recall of each query's best candidate, recall at 90% precision over all
    queries, average precision over these queries alone). Copies are pairs of the ground truth;
    without any, the rest is None.
    """
    all_queries = set(truth["query_id"])
    queries_of = defaultdict(set)
    for query in all_queries & edits.keys():
        for name, _ in edits[query]:
            queries_of[name].add(query)

    rows = []
    for name, queries in sorted(queries_of.items()):
        if queries != all_queries:
            rows.append(scores_of_queries(name, queries, ranking, truth))
    rows.sort(key=lambda row: 2 if row[-1] is None else row[-1])
    return [*rows, scores_of_queries("all queries", all_queries, ranking, truth)]


def scores_of_queries(name, queries, ranking, truth):
    """The row of `scores_by_edit` for a set of queries."""
    positives = truth[truth["reference_id"] != ""]
    copies = int(positives["query_id"].isin(queries).sum())
    if not copies:
        return name, len(queries), 0, None, None, None
    mine = ranking.pairs["query_id"].isin(queries)
    pairs = ranking.pairs[mine]
    best_of_each = pairs.drop_duplicates("query_id")
    found = (ranking.pairs["correct"] & mine)[: ranking.depth(0.9)]
    recall_at_1 = best_of_each["correct"].sum() / copies
    recall_at_90 = found.sum() / copies
    average_precision = Ranking(pairs, copies).average_precision()
    return name, len(queries), copies, recall_at_1, recall_at_90, average_precision
