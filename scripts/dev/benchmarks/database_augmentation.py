"""Database augmentation without its search against arrays of all neighbors at once."""

import numpy as np
import torch

from benchmarks.comparison import Comparison, compare
from benchmarks.inputs import random_descriptors
from common import descriptors, search

NEIGHBORS = 10


class DatabaseAugmentation(Comparison):
    """The neighbors are given; both ways sum them up."""

    description = (
        "n random descriptors, each augmented by 10 neighbors, drawn at random: the sum does not "
        "depend on how near they are. A case is n."
    )
    published = (
        "(train[indices] * (similarity**3)[..., None]).sum(axis=1), L2-normalized, all rows at once"
    )
    own = "common/descriptors.py: weighted_neighbor_sum, database_augmentation without its search"
    unit = "rows"
    cases = {"50000": 50_000}

    def __init__(self, n, _photos, _folder):
        self.amount = n
        torch.manual_seed(0)
        self.train = random_descriptors(n).numpy()
        rng = np.random.default_rng(0)
        self.indices = rng.integers(n, size=(n, NEIGHBORS))
        self.similarity = rng.uniform(0.3, 1, size=(n, NEIGHBORS)).astype(np.float32)

    def published_sums(self):
        return (self.train[self.indices] * (self.similarity**3)[..., None]).sum(axis=1)

    def baseline(self, _number):
        augmented = self.published_sums()
        return augmented / np.linalg.norm(augmented, axis=1, keepdims=True)

    def ours(self, _number):
        return descriptors.weighted_neighbor_sum(self.train, self.indices, self.similarity)

    def agreement(self, a, b):
        sums = search.neighbor_sum(self.train, self.indices, self.similarity**3)
        identical = np.array_equal(self.published_sums(), sums)
        return {"sums identical": identical, **compare(a, b)}

    @staticmethod
    def agreement_of_figures(n, baseline, ours):
        """Peak memory at a million rows, beyond the 1.02 GB of the rows, in proportion to n."""
        gigabytes = [1_000_000 / n * side.peak / 1e9 for side in (baseline, ours)]
        return {"GB at 1,000,000 rows A, B": gigabytes}
