"""Pairs of copies among descriptors, and the groups that these form. Exact, in bounded memory.

Each query may have several views; a pair's cosine is the greatest over them. A score is the cosine
less the query's background (common/background.py), which is 0 where scores are not normalized.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.search import pair_scores

MAX_SIMILARITIES = 2**24  # held at once, float32: 64 MiB
SCORE_DECIMALS = 6  # A score is rounded before it is compared with the threshold.
PAIRS_AT_ONCE = 1024  # whose views are held in double precision


@dataclass
class Excluded:
    """Which files are never paired.

    contents (files,): a number for each different content. ignored: pairs of such numbers, judged
    not to be copies. folders (files,) int64: files of the same folder are not paired; -1 pairs with
    all.
    """

    contents: np.ndarray
    folders: np.ndarray
    ignored: set = field(default_factory=set)


@dataclass
class Pairs:
    """What find_pairs finds, arrays (pairs,).

    query and reference: numbers of files. score, cosine: float64; view: the number of the query's
    view that matches. groups (files,): the number of the group that a file is in, from 0 in the
    order of files, or -1. A group is what all pairs connect, not only the best of each query.
    """

    query: np.ndarray
    reference: np.ndarray
    score: np.ndarray
    cosine: np.ndarray
    view: np.ndarray
    groups: np.ndarray


def find_pairs(
    descriptors,
    queries,
    references,
    threshold,
    top_k,
    views=None,
    background=None,
    sure_cosine=None,
    excluded=None,
    quiet=True,
    max_similarities=MAX_SIMILARITIES,
):
    """Find the copies among files, and the groups that they form; returns Pairs.

    descriptors (files, dim) float32, unit rows; queries and references: numbers of files, int64.
    views (queries, views, dim) float32, the whole image first (default: the whole alone).
    background (queries,) float64: what is subtracted from each query's cosines (default: 0).
    A query is paired with its `top_k` best other files whose score is at least `threshold`, or
    whose cosine is at least `sure_cosine` (default: the score alone decides), equal scores in the
    order of references. Where `queries is references`, a pair is listed once, in the direction of
    the higher score.
    """
    if views is None:
        views = descriptors[queries][:, None]
    if background is None:
        background = np.zeros(len(queries))
    if sure_cosine is None:
        sure_cosine = np.inf
    search = Search(
        descriptors, views, background, queries, references, threshold, sure_cosine, excluded
    )
    pairs = search.run(top_k, quiet, max_similarities)
    query, reference = concatenate_pairs(pairs)
    if queries is references:
        query, reference = each_pair_once(query, reference, len(descriptors))
    scored = search.score(query, reference, both_directions=queries is references)
    query, reference, score, cosine, view = scored
    order = np.lexsort((reference, -score, query))
    return Pairs(
        query[order], reference[order], score[order], cosine[order], view[order], search.groups()
    )


class Search:
    """The state of find_pairs: rows to compare, connected files."""

    def __init__(
        self,
        descriptors,
        views,
        background,
        queries,
        references,
        threshold,
        sure_cosine,
        excluded,
    ):
        self.descriptors = descriptors
        self.views = views
        self.background = background
        self.threshold = threshold
        self.sure_cosine = sure_cosine
        # The least cosine of a match of each query.
        self.least = np.minimum(threshold + background, sure_cosine)
        self.slack = rounding_error(descriptors.shape[1])
        self.number_of_query = np.full(len(descriptors), -1)  # rows of views, by file
        self.number_of_query[queries] = np.arange(len(queries))
        self.position = np.empty(len(descriptors), np.int64)
        self.position[references] = np.arange(len(references))

        # Files that differ in what excludes them must not share a row.
        keys = [b""] * len(descriptors)
        if excluded:
            keys = [
                f"{content} {folder}".encode()
                for content, folder in zip(excluded.contents, excluded.folders, strict=True)
            ]
        self.reference_set = distinct_rows(label_distinct(descriptors, keys), references)
        self.reference_rows = descriptors[self.reference_set.first]
        query_labels = np.full(len(descriptors), -1)
        query_labels[queries] = label_distinct(views, [keys[file] for file in queries])
        self.query_set = distinct_rows(query_labels, queries)
        self.masks = masked_rows(self.query_set, self.reference_set, excluded)
        self.folders = excluded.folders if excluded else np.full(len(descriptors), -1)
        # Connected are rows: those of query_set, then those of reference_set.
        row_count = len(self.query_set.first) + len(self.reference_set.first)
        self.connected = UnionFind(row_count)
        self.has_match = np.zeros(row_count, bool)

    def run(self, top_k, quiet, max_similarities):
        """A list of (queries, references), arrays of file numbers: the best of each query."""
        pairs = []
        for row, similarity in self.similar_rows(quiet, max_similarities):
            first = self.query_set.first[row]
            near = self.matching_rows(first, similarity)
            if len(near) == 0:
                continue
            matched = np.append(near + len(self.query_set.first), row)
            self.has_match[matched] = True
            self.connected.unite(matched)
            # One of the best may be the query itself.
            files = self.best_files(first, near, similarity, count=top_k + 1)
            for query_file in self.query_set.files[row]:
                others = files[files != query_file][:top_k]
                pairs.append((np.full(len(others), query_file), others))
        return pairs

    def similar_rows(self, quiet, max_similarities):
        """Yield (row of query_set, similarity (m,) float32) of each query that may have a match.

        The similarities are the greatest inner products of the query's views with the m distinct
        reference rows; -inf where the pair is excluded. They are computed in blocks of at most
        `max_similarities`, or of one query.
        """
        count = len(self.query_set.first)
        view_count, dim = self.views.shape[1:]
        step = max(1, max_similarities // (len(self.reference_rows) * view_count))
        with tqdm(total=count, desc="comparing", unit="image", disable=quiet) as bar:
            for start in range(0, count, step):
                files = self.query_set.first[start : start + step]
                numbers = self.number_of_query[files]
                views = self.views[numbers].reshape(-1, dim)
                similarity = views @ self.reference_rows.T
                similarity = similarity.reshape(len(files), view_count, -1).max(axis=1)
                for offset, file in enumerate(files):
                    similarity[offset, self.masks[start + offset]] = -np.inf
                    similarity[offset, self.in_folder_of(file)] = -np.inf
                least = self.least[numbers, None] - self.slack
                may_match = (similarity >= least).any(axis=1)
                for offset in np.flatnonzero(may_match):
                    yield start + offset, similarity[offset]
                bar.update(len(files))

    def in_folder_of(self, file):
        """The reference rows, as an index, that are not paired with a file for their folder."""
        if self.folders[file] < 0:
            return []
        return self.folders[self.reference_set.first] == self.folders[file]

    def matching_rows(self, query, similarity):
        """The distinct reference rows whose score with a query file is at least the threshold.

        similarity (m,) float32 is off by less than the slack. So only the cosines of those rows are
        computed exactly that are closer than that to the least one of a match. Returns int64,
        ascending.
        """
        number = self.number_of_query[query]
        near = np.flatnonzero(similarity >= self.least[number] - self.slack)
        unsure = np.flatnonzero(similarity[near] < self.least[number] + self.slack)
        cosines = self.exact_cosines(query, self.reference_rows[near[unsure]])
        scores = subtract(cosines, self.background[number])
        is_match = (scores >= self.threshold) | (cosines >= self.sure_cosine)
        return np.delete(near, unsure[~is_match])

    def best_files(self, query, near, similarity, count):
        """The `count` best files among the distinct reference rows `near`, best first, int64.

        Files of equal scores are in the order of the references.
        """
        if len(near) > count:
            count_th_best = np.partition(similarity[near], -count)[-count]
            near = near[similarity[near] >= count_th_best - 2 * self.slack]
        files_by_row = [self.reference_set.files[row][:count] for row in near]
        row_sizes = [len(files) for files in files_by_row]
        files = np.concatenate(files_by_row)
        cosines = np.repeat(self.exact_cosines(query, self.reference_rows[near]), row_sizes)
        best = np.lexsort((self.position[files], -cosines))[:count]
        return files[best]

    def exact_cosines(self, query, rows):
        """Cosines (n,) float64 of a query file with reference rows (n, dim): its best views'."""
        cosines, _ = self.best_views(np.full(len(rows), self.number_of_query[query]), rows)
        return cosines

    def score(self, query, reference, both_directions):
        """Scores of pairs (n,): query, reference, score, cosine and view, (n,) each.

        both_directions: a pair is turned round where the reference as a query scores higher.
        """
        score, best_cosine, view = self.score_one_way(query, reference)
        if both_directions:
            turned_score, turned_cosine, turned_view = self.score_one_way(reference, query)
            turned = turned_score > score
            query, reference = (
                np.where(turned, reference, query),
                np.where(turned, query, reference),
            )
            score = np.where(turned, turned_score, score)
            best_cosine = np.where(turned, turned_cosine, best_cosine)
            view = np.where(turned, turned_view, view)
        return query, reference, score, best_cosine, view

    def score_one_way(self, query, reference):
        """Scores, cosines (n,) float64 and numbers of the best views of pairs (n,) of files."""
        numbers = self.number_of_query[query]
        best_cosine, view = self.best_views(numbers, self.descriptors[reference])
        return subtract(best_cosine, self.background[numbers]), best_cosine, view

    def best_views(self, numbers, rows):
        """Greatest cosines (n,) float64 of queries' views with one row (n, dim) each, and the
        numbers of these views; numbers (n,): rows of `views`.
        """
        best_cosine = np.empty(len(rows))
        view = np.empty(len(rows), np.int64)
        for start in range(0, len(rows), PAIRS_AT_ONCE):
            block = slice(start, start + PAIRS_AT_ONCE)
            cosines = cosine(self.views[numbers[block]], rows[block][:, None])
            view[block] = cosines.argmax(axis=1)
            best_cosine[block] = cosines.max(axis=1)
        return best_cosine, view

    def groups(self):
        """The number of each file's group, (files,) int64, from 0 in the order of files, or -1."""
        file_count = len(self.descriptors)
        as_query = self.query_set.row_of_file(file_count)
        as_reference = self.reference_set.row_of_file(file_count)
        as_reference[as_reference >= 0] += len(self.query_set.first)
        as_query[~self.has_match[as_query]] = -1
        as_reference[~self.has_match[as_reference]] = -1
        for file in np.flatnonzero((as_query >= 0) & (as_reference >= 0)):
            self.connected.unite(np.array([as_query[file], as_reference[file]]))
        row = np.maximum(as_query, as_reference)
        roots = np.where(row >= 0, self.connected.roots()[row], np.nan)
        group_numbers, _ = pd.factorize(roots)  # NaN becomes -1
        return group_numbers


# ---- equal descriptors, which are compared once ----


@dataclass(frozen=True)
class DistinctRows:
    """The m different rows of a set of files.

    files: m arrays int64, the files that have the row, in the order of the set. first (m,) int64:
    the first of each.
    """

    files: list
    first: np.ndarray

    def row_of_file(self, file_count):
        """The row of each of `file_count` files, int64; -1 of files that are not in the set."""
        rows = np.full(file_count, -1)
        for row, files in enumerate(self.files):
            rows[files] = row
        return rows

    def row_of_single_file(self, file_count):
        """As row_of_file; -1 also of files that share their row."""
        rows = np.full(file_count, -1)
        for row, files in enumerate(self.files):
            if len(files) == 1:
                rows[files] = row
        return rows


def label_distinct(rows, keys):
    """For each row of (n, ...) float32 the number of its value and key among the different ones.

    keys: n bytes objects. Rows are told apart by a hash of 128 bits, so that nothing is copied.
    """
    hashes = []
    for row, key in zip(rows, keys, strict=True):
        digest = hashlib.blake2b(np.ascontiguousarray(row), digest_size=16)
        digest.update(key)
        hashes.append(digest.digest())
    _, labels = np.unique(np.frombuffer(b"".join(hashes), "V16"), return_inverse=True)
    return labels


def distinct_rows(labels, files):
    """The DistinctRows of some files, int64; labels (all files,) are those of label_distinct."""
    _, files_by_label = group_by_label(labels, files)
    first = np.array([same[0] for same in files_by_label], np.int64)
    return DistinctRows(files_by_label, first)


def group_by_label(labels, files):
    """The labels that occur among `files`, sorted, and for each label an array of its files.

    labels (all files,) int64; files (n,) int64, whose order is kept within each array.
    """
    sorted_files = files[np.argsort(labels[files], kind="stable")]
    distinct_labels, starts = np.unique(labels[sorted_files], return_index=True)
    return distinct_labels, np.split(sorted_files, starts[1:])


# ---- pairs that are left out ----


def own_rows(query_set, reference_set):
    """For each row of query_set the row of reference_set that stands for the same single file.

    Returns (queries,) int64; -1 where there is none, or where several files share the row.
    """
    file_count = max(query_set.first.max(), reference_set.first.max()) + 1
    row_of_file = reference_set.row_of_single_file(file_count)
    own_row = np.full(len(query_set.files), -1)
    for row, files in enumerate(query_set.files):
        if len(files) == 1:
            own_row[row] = row_of_file[files[0]]
    return own_row


def masked_rows(query_set, reference_set, excluded):
    """For each row of query_set the rows of reference_set with its own file alone, or with a
    content that `excluded` (or None) says to ignore: lists of int.
    """
    masks = [[row] if row >= 0 else [] for row in own_rows(query_set, reference_set).tolist()]
    if excluded is None:
        return masks
    ignored_with = {}
    for a, b in excluded.ignored:
        ignored_with.setdefault(a, set()).add(b)
        ignored_with.setdefault(b, set()).add(a)
    rows_of_content = rows_by_value(excluded.contents[reference_set.first])
    for mask, content in zip(masks, excluded.contents[query_set.first].tolist(), strict=True):
        for other in ignored_with.get(content, ()):
            mask += rows_of_content.get(other, [])
    return masks


def rows_by_value(values):
    """{value: list of the rows that have it} of an int64 array."""
    rows = {}
    for row, value in enumerate(values.tolist()):
        rows.setdefault(value, []).append(row)
    return rows


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


def subtract(cosines, background):
    """Scores of cosines, rounded to SCORE_DECIMALS."""
    return np.round(cosines - background, SCORE_DECIMALS)


def rounding_error(dim):
    """More than a float32 product of two unit rows differs from their cosine."""
    return (dim + 64) * 2.0**-24


# ---- lists of pairs ----


def concatenate_pairs(pairs):
    """A list of (queries, references) arrays as two arrays (n,) int64."""
    if not pairs:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    query, reference = zip(*pairs, strict=True)
    return np.concatenate(query), np.concatenate(reference)


def each_pair_once(query, reference, file_count):
    """Pairs (n,) of one set with itself, each once, its smaller file number as the query."""
    smaller = np.minimum(query, reference)
    larger = np.maximum(query, reference)
    numbers = np.unique(smaller * file_count + larger)
    return numbers // file_count, numbers % file_count
