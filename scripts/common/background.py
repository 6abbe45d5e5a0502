"""Background normalization: how similar a query is to images that are no copies of it.

A gray sky resembles many images, a face few. So what a cosine is worth depends on the query: the
score of a pair is its cosine less the query's background, the mean of its next best cosines with
the collection.
"""

import math

import numpy as np
from tqdm import tqdm

from common.search import nearest, pair_scores

RANKS = 9  # how many cosines make the background: in a collection those of rank 2 to 10
ALIKE = 0.8  # least cosine with a query's best match of an image that does not count either
LEAST_COLLECTION = 50  # images; the background of fewer says nothing
CALIBRATED_ON = 600  # images of the collection that the networks' thresholds were measured with
SLOPE = 0.12  # of the threshold over the logarithm of a smaller collection's size, measured
SURE_SLOPE = 0.035  # of the sure cosine over the logarithm of a larger collection's size
MOST_SURE_COSINE = 0.85
NEIGHBORS = 32  # of a view, searched first; all images where too few of these count
BLOCK = 2048  # views at once, whose neighbors are held
MAX_SIMILARITIES = 2**23  # held at once, float32, where all images are looked at


def threshold_for(threshold, collection_size):
    """The least normalized score of a copy in a collection of so many images.

    The fewer images, the less similar are those of rank 2 to 10: scores rise, and so must the
    threshold, for the same precision. Above CALIBRATED_ON, precision does not fall.
    """
    missing = max(1, CALIBRATED_ON / collection_size)
    return round(threshold + SLOPE * math.log(missing), 2)


def sure_cosine(cosine_threshold, collection_size):
    """The cosine from which a pair matches whatever the query's background.

    Else a copy could be missed because the collection holds many images that resemble it. Up to
    CALIBRATED_ON images the threshold for cosines serves; more images give more chances to err.
    """
    more = max(1, collection_size / CALIBRATED_ON)
    raised = min(MOST_SURE_COSINE, cosine_threshold + SURE_SLOPE * math.log(more))
    return round(max(cosine_threshold, raised), 2)


def collection_background(views, own_rows, collection, copy_cosine, neutral, quiet=True):
    """The background of queries in the collection in which their copies are searched.

    views (queries, views, dim) float32; collection (n, dim) float32; own_rows (queries,) int64: the
    row of the collection that is the query itself, or -1. Returns (queries,) float64: for each view
    the mean of its best RANKS cosines, without the query itself, its best match, what resembles
    this, and cosines of at least `copy_cosine` (copies in numbers must not cancel each other); of a
    query's views the largest mean. `neutral` stands for each cosine that is missing, where nearly
    all images are left out.
    """
    view_count = views.shape[1]
    step = max(1, BLOCK // view_count)
    result = np.empty(len(views))
    with tqdm(total=len(views), desc="background", unit="image", disable=quiet) as bar:
        for start in range(0, len(views), step):
            block = slice(start, start + step)
            rows = views[block].reshape(-1, views.shape[2])
            own = np.repeat(own_rows[block], view_count)
            means = mean_beyond_best(rows, own, collection, copy_cosine, neutral)
            result[block] = means.reshape(-1, view_count).max(axis=1)
            bar.update(len(means) // view_count)
    return result


def mean_beyond_best(rows, own, collection, copy_cosine, neutral):
    """What collection_background says of each view, for rows (n, dim) whose own rows are `own`."""
    scores, neighbors = nearest(rows, collection, NEIGHBORS, "ip", quiet=True)
    best = best_neighbor(neighbors, own)
    best_rows = collection[best][:, None]
    likeness = pair_scores(collection[neighbors], best_rows, "ip")
    is_copy = (likeness >= ALIKE) | (scores >= copy_cosine)
    counts = (neighbors != own[:, None]) & ~is_copy
    means = np.empty(len(rows))
    is_complete = (counts.sum(axis=1) >= RANKS) | (neighbors.shape[1] == len(collection))
    for row in np.flatnonzero(is_complete):
        means[row] = mean_of_ranks(scores[row, counts[row]], neutral)

    others = np.flatnonzero(~is_complete)  # whose best match has many likes
    step = max(1, MAX_SIMILARITIES // len(collection))
    for start in range(0, len(others), step):
        block = others[start : start + step]
        means[block] = mean_among_all(
            rows[block], own[block], best[block], collection, copy_cosine, neutral
        )
    return means


def best_neighbor(neighbors, own):
    """The first of each view's neighbors (n, k), best first, that is not its own row; (n,)."""
    if neighbors.shape[1] == 1:
        return neighbors[:, 0]
    is_own = neighbors[:, 0] == own
    return np.where(is_own, neighbors[:, 1], neighbors[:, 0])


def mean_of_ranks(cosines, neutral):
    """The mean of the first RANKS of cosines, best first; `neutral` stands for missing ones."""
    cosines = cosines[:RANKS]
    missing = RANKS - len(cosines)
    return (cosines.sum(dtype=float) + missing * neutral) / RANKS


def mean_among_all(rows, own, best, collection, copy_cosine, neutral):
    """As mean_beyond_best, for views whose best matches `best` (n,) resemble many images."""
    similarity = rows @ collection.T
    likeness = collection[best] @ collection.T
    similarity[(likeness >= ALIKE) | (similarity >= copy_cosine)] = -np.inf
    has_own = np.flatnonzero(own >= 0)
    similarity[has_own, own[has_own]] = -np.inf
    means = np.empty(len(rows))
    for row, cosines in enumerate(similarity):
        left = min(RANKS, np.count_nonzero(np.isfinite(cosines)))
        highest = np.argpartition(-cosines, RANKS - 1)[:RANKS]
        highest = highest[np.argsort(-cosines[highest])][:left]
        exact = pair_scores(collection[highest], rows[row], "ip")
        means[row] = mean_of_ranks(exact, neutral)
    return means


def given_background(views, background, quiet=True):
    """The background of queries in images of which nothing is a copy of them.

    views (queries, views, dim), background (n, dim) float32. Returns (queries,) float64: for each
    view the mean of its best RANKS cosines; of a query's views the largest mean.
    """
    rows = views.reshape(-1, views.shape[2])
    scores, _ = nearest(rows, background, RANKS, "ip", quiet=quiet)
    means = scores.astype(float).mean(axis=1)
    return means.reshape(len(views), -1).max(axis=1)
