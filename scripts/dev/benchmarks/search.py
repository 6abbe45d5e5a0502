"""The search of nearest neighbors against faiss alone."""

import faiss
import torch

from benchmarks.comparison import Comparison, compare
from benchmarks.inputs import random_descriptors
from common import search

NEIGHBORS = 10


class Search(Comparison):
    """A case is the number of descriptors."""

    description = (
        "The 10 nearest of n random descriptors to some of them, by inner product; on a GPU where "
        "there is one. A case is n."
    )
    published = "faiss.IndexFlatIP.search"
    own = "common/search.py: nearest"
    unit = "queries"
    cases = {"8192 x 20000": 20_000}

    def __init__(self, n, _photos, _folder):
        torch.manual_seed(0)
        self.base = random_descriptors(n).numpy()
        self.queries = self.base[: 2 * search.BLOCK]
        self.amount = len(self.queries)
        self.index = faiss.IndexFlatIP(self.base.shape[1])
        if faiss.get_num_gpus():
            self.index = faiss.index_cpu_to_all_gpus(self.index)
        self.index.add(self.base)

    def baseline(self, _number):
        return self.index.search(self.queries, NEIGHBORS)

    def ours(self, _number):
        return search.nearest(self.queries, self.base, NEIGHBORS, "ip")

    def agreement(self, a, b):
        scores_a, indices_a = a
        scores_b, indices_b = b
        equal = (indices_a == indices_b).mean()
        return {"equal indices %": 100 * float(equal), **compare(scores_a, scores_b)}
