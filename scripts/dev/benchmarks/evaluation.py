"""Evaluation without its search against loops over Python objects."""

import numpy as np
import pandas as pd

from benchmarks.comparison import Comparison
from common import evaluation

REFERENCES = 20_000
NEIGHBORS = 10  # candidate pairs of a query


class Evaluation(Comparison):
    """The nearest pairs are given; both ways make the table of them and score it."""

    description = (
        "From 10 candidate pairs a query, a fifth of the queries being copies, to the csv of "
        "candidates and the scores. A case is the number of queries."
    )
    published = "isin of Python objects, the table row by row, loops over a sorted list"
    own = "common/evaluation.py: known_queries, candidate_table, micro_metrics"
    unit = "queries"
    cases = {"8000 x 10": 8_000}

    def __init__(self, queries, _photos, _folder):
        self.amount = queries
        self.query_ids = numbered_ids("Q", 5, queries)
        self.reference_ids = numbered_ids("R", 6, REFERENCES)
        rng = np.random.default_rng(0)
        first_neighbors = rng.integers(REFERENCES, size=(queries, 1))
        neighbors = np.sort((first_neighbors + 997 * np.arange(NEIGHBORS)) % REFERENCES, axis=1)
        distances = rng.uniform(0.5, 2, size=neighbors.shape).astype(np.float32)

        copies = np.flatnonzero(rng.random(queries) < 0.2)
        originals = rng.integers(NEIGHBORS, size=len(copies))  # which neighbor each is a copy of
        distances[copies, originals] *= 0.5
        self.truth = pd.DataFrame({"query_id": self.query_ids, "reference_id": ""})
        original_ids = self.reference_ids[neighbors[copies, originals]]
        self.truth.loc[copies, "reference_id"] = original_ids

        query_positions = np.repeat(np.arange(queries), NEIGHBORS)
        self.found = (distances.ravel(), query_positions, neighbors.ravel())
        nearest_first = np.argsort(distances.ravel(), kind="stable")
        self.search_result = tuple(column[nearest_first] for column in self.found)

    def baseline(self, _number):
        """(csv, average precision, recall at 90% precision)."""
        query_ids = self.query_ids.tolist()
        reference_ids = self.reference_ids.tolist()
        return published_evaluation(self.found, query_ids, reference_ids, self.truth)

    def ours(self, _number):
        """The same."""
        ids = evaluation.as_text(self.query_ids.astype("S"))
        known = evaluation.known_queries(ids, self.truth, "h5", "csv")
        candidates = evaluation.candidate_table(
            self.search_result, self.query_ids[known], self.reference_ids
        )
        metrics = evaluation.micro_metrics(candidates, self.truth)
        return candidates.to_csv(index=False), *metrics.values()

    def agreement(self, a, b):
        csv_a, *scores_a = a
        csv_b, *scores_b = b
        return {
            "csv identical": csv_a == csv_b,
            "score difference": float(np.abs(np.subtract(scores_a, scores_b)).max()),
        }


def numbered_ids(letter, digits, count):
    """Ids as DISC21's, such as Q00000: (count,) str."""
    return np.array([f"{letter}{number:0{digits}}" for number in range(count)])


def published_evaluation(found, query_ids, reference_ids, truth):
    """Candidates row by row, and the metrics by a loop over a sorted list: (csv, average precision,
    recall at 90% precision).

    found: squared distances, positions of queries and of references, (n,) each; ids: lists of str.
    """
    # Ids are Python objects: each query is compared with each row of the ground truth.
    known = np.isin(query_ids, truth["query_id"])
    assert known.all()
    rows = (
        (query_ids[query], reference_ids[reference], -distance)
        for distance, query, reference in zip(*found, strict=True)
    )
    candidates = pd.DataFrame(rows, columns=["query_id", "reference_id", "score"])

    truth_pairs = zip(truth["query_id"], truth["reference_id"], strict=True)
    positives = {(query, reference) for query, reference in truth_pairs if reference}
    ranked = sorted(
        (-row.score, (row.query_id, row.reference_id) in positives)
        for row in candidates.itertuples()
    )
    right = 0
    average_precision = 0.0
    recall_p90 = 0.0
    for rank, (_, correct) in enumerate(ranked, start=1):
        right += correct
        average_precision += correct * right / rank / len(positives)
        if right / rank >= 0.9:
            recall_p90 = right / len(positives)
    return candidates.to_csv(index=False), average_precision, recall_p90
