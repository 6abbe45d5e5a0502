"""Evaluation's search of the nearest pairs against faiss's range search."""

import faiss
import numpy as np
import torch
from faiss.contrib import exhaustive_search

from benchmarks.comparison import Comparison, compare
from benchmarks.inputs import random_descriptors
from common import evaluation

QUERIES = 4096


class EvaluationSearch(Comparison):
    """10 pairs a query, as many as the challenge allows."""

    description = (
        "The 10 q nearest pairs, over all queries together, of q = 4096 queries and n references, "
        "random descriptors. A case is n."
    )
    published = (
        "faiss's exhaustive range search, whose radius shrinks as results come in; sorted and cut"
    )
    own = "common/evaluation.py: nearest_pairs"
    unit = "queries"
    cases = {"4096 x 20000": 20_000}

    def __init__(self, n, _photos, _folder):
        torch.manual_seed(0)
        rows = random_descriptors(n + QUERIES).numpy()
        self.queries = rows[:QUERIES]
        self.references = rows[QUERIES:]
        self.amount = QUERIES
        self.pairs = 10 * QUERIES
        self.index = faiss.IndexFlatL2(rows.shape[1])
        self.index.add(self.references)

    def baseline(self, _number):
        """Squared distances, positions of queries and of references, (pairs,) each."""
        batches = exhaustive_search.exponential_query_iterator(self.queries)
        _, limits, distances, references = exhaustive_search.range_search_max_results(
            self.index, batches, 1e10, min_results=self.pairs, ngpu=-1
        )
        pairs_of_a_query = np.diff(limits.astype(np.int64))
        queries = np.repeat(np.arange(QUERIES), pairs_of_a_query)
        nearest = np.argsort(distances, kind="stable")[: self.pairs]
        return distances[nearest], queries[nearest], references[nearest]

    def ours(self, _number):
        """The same."""
        return evaluation.nearest_pairs(self.queries, self.references, self.pairs)

    def agreement(self, a, b):
        distances_a, queries_a, references_a = a
        distances_b, queries_b, references_b = b
        pairs_a = set(zip(queries_a, references_a, strict=True))
        pairs_b = set(zip(queries_b, references_b, strict=True))
        in_common = len(pairs_a & pairs_b) / self.pairs
        return {"pairs in common %": 100 * in_common, **compare(distances_a, distances_b)}
