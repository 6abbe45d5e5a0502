"""Pairs of copies among descriptors, and the groups that these form. Exact, in bounded memory."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.search import pair_scores

MAX_SIMILARITIES = 2**24  # held at once, float32: 64 MiB
SCORE_DECIMALS = 6  # A score is rounded before it is compared with the threshold.


def find_pairs(
    descriptors,
    queries,
    references,
    threshold,
    top_k,
    quiet=True,
    max_similarities=MAX_SIMILARITIES,
):
    """Find the copies among files, and the groups that they form.

    descriptors (files, dim) float32, unit rows; queries and references: numbers of files, int64.
    Returns queries, references (pairs,) int64 and scores (pairs,) float64: for each query its
    `top_k` best other files with a cosine of at least `threshold`, equal scores in the order of
    references; a pair once where `queries is references`. Returns also groups (files,) int64: the
    number of the group that a file is in, from 0 in the order of files, or -1. A group is what all
    pairs at or above the threshold connect, not only the `top_k`.
    """
    labels = label_distinct(descriptors)
    reference_set = distinct_rows(descriptors, labels, references)
    query_set = reference_set
    if queries is not references:
        query_set = distinct_rows(descriptors, labels, queries)
    position = np.empty(len(descriptors), np.int64)
    position[references] = np.arange(len(references))

    connected = UnionFind(labels.max() + 1)
    has_match = np.zeros(labels.max() + 1, bool)
    pairs = []
    slack = rounding_error(descriptors.shape[1])
    candidates = similar_rows(query_set, reference_set, threshold - slack, max_similarities, quiet)
    for row, similarity in candidates:
        query = query_set.rows[row]
        near = matching_rows(query, reference_set.rows, similarity, threshold, slack)
        if len(near) == 0:
            continue
        matched = np.append(reference_set.labels[near], query_set.labels[row])
        has_match[matched] = True
        connected.unite(matched)
        # One of the best may be the query itself.
        count = top_k + 1
        files, scores = best_files(query, reference_set, near, similarity, position, count, slack)
        pairs += pairs_of_files(query_set.files[row], files, scores, top_k)

    query, reference, score = concatenate_pairs(pairs)
    if queries is references:
        query, reference, score = each_pair_once(query, reference, score, len(descriptors))
    order = np.lexsort((reference, -score, query))
    group = np.where(has_match, connected.roots(), np.nan)[labels]
    group_numbers, _ = pd.factorize(group)  # NaN becomes -1
    return query[order], reference[order], score[order], group_numbers


# ---- equal descriptors, which are compared once ----


@dataclass(frozen=True)
class DistinctRows:
    """The m different descriptors of a set of files.

    rows (m, dim) float32. labels (m,) int64, ascending: the numbers of these descriptors among the
    different ones of all files. files: m arrays int64, the files that have the descriptor, in the
    order of the set.
    """

    rows: np.ndarray
    labels: np.ndarray
    files: list


def label_distinct(descriptors):
    """For each row of (files, dim) float32 the number of its value among the different rows."""
    as_bytes = descriptors.view(f"V{descriptors[0].nbytes}").ravel()
    _, labels = np.unique(as_bytes, return_inverse=True)
    return labels


def distinct_rows(descriptors, labels, files):
    """The DistinctRows of some files, int64; labels (all files,) are those of label_distinct."""
    distinct_labels, files_by_label = group_by_label(labels, files)
    first_files = [same[0] for same in files_by_label]
    return DistinctRows(descriptors[first_files], distinct_labels, files_by_label)


def group_by_label(labels, files):
    """The labels that occur among `files`, sorted, and for each label an array of its files.

    labels (all files,) int64; files (n,) int64, whose order is kept within each array.
    """
    sorted_files = files[np.argsort(labels[files], kind="stable")]
    distinct_labels, starts = np.unique(labels[sorted_files], return_index=True)
    return distinct_labels, np.split(sorted_files, starts[1:])


# ---- groups ----


class UnionFind:
    """Disjoint sets of the numbers 0 ... size - 1, at first each in a set of its own."""

    def __init__(self, size):
        self.parent = np.arange(size)  # the root of a set is its own parent

    def unite(self, members):
        """Make one set of all sets that hold one of `members`, (n,) int64."""
        roots = self.parent[members]
        while (self.parent[roots] != roots).any():
            roots = self.parent[roots]
        root = roots.min()
        self.parent[roots] = root
        self.parent[members] = root

    def roots(self):
        """The root of each number's set, (size,) int64: equal for the numbers of one set."""
        roots = self.parent
        while (roots[roots] != roots).any():
            roots = roots[roots]
        return roots


# ---- scores ----


def cosine(a, b):
    """Cosines of unit rows (..., dim) as float64 (...), rounded to SCORE_DECIMALS.

    Computed as 1 - d^2 / 2 of the distance d, which is exactly 1 for equal rows.
    """
    squared_distance = pair_scores(a, b, "l2").astype(np.float64)
    return np.round(1 - squared_distance / 2, SCORE_DECIMALS)


def rounding_error(dim):
    """More than a float32 product of two unit rows differs from their cosine."""
    return (dim + 64) * 2.0**-24


def similar_rows(query_set, reference_set, least, max_similarities, quiet):
    """Yield (row of query_set, similarity (m,) float32) of each query that has one >= `least`.

    The similarities are inner products with the m rows of reference_set. They are computed in
    blocks of at most `max_similarities`, or of one query. A file is no copy of itself: where a
    query's own file is the only one with its descriptor, the similarity is -inf.
    """
    own_row = own_rows(query_set, reference_set)
    count = len(query_set.rows)
    step = max(1, max_similarities // len(reference_set.rows))
    with tqdm(total=count, desc="comparing", unit="image", disable=quiet) as bar:
        for start in range(0, count, step):
            block = slice(start, start + step)
            similarity = query_set.rows[block] @ reference_set.rows.T
            has_own_row = np.flatnonzero(own_row[block] >= 0)
            similarity[has_own_row, own_row[block][has_own_row]] = -np.inf
            for offset in np.flatnonzero((similarity >= least).any(axis=1)):
                yield start + offset, similarity[offset]
            bar.update(len(similarity))


def own_rows(query_set, reference_set):
    """For each row of query_set the row of reference_set that stands for the same single file.

    Returns (queries,) int64; -1 where there is none, or where several files share the descriptor.
    """
    own_row = np.full(len(query_set.labels), -1)
    candidates = np.searchsorted(reference_set.labels, query_set.labels)
    for row, candidate in enumerate(candidates):
        files = query_set.files[row]
        if len(files) > 1 or candidate == len(reference_set.labels):
            continue
        if np.array_equal(files, reference_set.files[candidate]):
            own_row[row] = candidate
    return own_row


def matching_rows(query, references, similarity, threshold, slack):
    """The rows of `references` (m, dim) whose cosine with `query` (dim,) is at least `threshold`.

    similarity (m,) float32 is off by less than `slack`. So only the cosines of those rows are
    computed exactly that are closer to the threshold than that. Returns int64, ascending.
    """
    near = np.flatnonzero(similarity >= threshold - slack)
    unsure = np.flatnonzero(similarity[near] < threshold + slack)
    exact = cosine(query, references[near[unsure]])
    return np.delete(near, unsure[exact < threshold])


# ---- the best of a query ----


def best_files(query, reference_set, near, similarity, position, count, slack):
    """The `count` best files among the rows `near` of reference_set, best first.

    query (dim,); near (n,) int64; similarity (m,) float32 of all rows, off by less than `slack`.
    Files of equal scores are in the order of position (all files,). Returns files int64 and their
    exact scores float64.
    """
    if len(near) > count:
        count_th_best = np.partition(similarity[near], -count)[-count]
        near = near[similarity[near] >= count_th_best - 2 * slack]
    files_by_row = [reference_set.files[row][:count] for row in near]
    row_sizes = [len(files) for files in files_by_row]
    files = np.concatenate(files_by_row)
    scores = np.repeat(cosine(query, reference_set.rows[near]), row_sizes)
    best = np.lexsort((position[files], -scores))[:count]
    return files[best], scores[best]


def pairs_of_files(query_files, files, scores, top_k):
    """(query, reference, score) arrays, one triple for each of the equal `query_files`.

    Each gets the first `top_k` of `files`, best first, without itself.
    """
    pairs = []
    for query_file in query_files:
        others = np.flatnonzero(files != query_file)[:top_k]
        pairs.append((np.full(len(others), query_file), files[others], scores[others]))
    return pairs


def concatenate_pairs(pairs):
    """A list of (query, reference, score) arrays as three arrays (n,): int64, int64, float64."""
    if not pairs:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    query, reference, score = zip(*pairs, strict=True)
    return np.concatenate(query), np.concatenate(reference), np.concatenate(score)


def each_pair_once(query, reference, score, file_count):
    """Pairs (n,) of one set with itself, each once, its smaller file number as the query."""
    smaller = np.minimum(query, reference)
    larger = np.maximum(query, reference)
    _, first = np.unique(smaller * file_count + larger, return_index=True)
    return smaller[first], larger[first], score[first]
