"""Exhaustive nearest neighbor search by faiss, on CPUs or GPUs, and exact scores of pairs."""

import faiss
import numpy as np
from tqdm import tqdm

from common.errors import InputError

METRICS = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
BLOCK = 4096  # queries per call of faiss
CHUNK = 256  # queries whose neighbors are held at once, as (CHUNK, k, dim)
MARGIN = 6  # neighbors fetched beyond k: faiss's rounding must not decide which one is the k-th
GPU_MAX_K = 2048  # faiss's limit on GPUs


def flat_search(base, metric, num_gpus=-1):
    """Prepare exhaustive search in `base`, (n, dim) float32.

    Returns a function (queries (q, dim), k) -> (scores (q, k), indices (q, k)). `metric` is "ip"
    (largest inner product first) or "l2" (smallest squared distance first). The search runs on
    `num_gpus` of the GPUs that faiss sees (-1: all), else on the CPU, there without a copy of
    `base`.
    """
    faiss_metric = METRICS[metric]
    available = faiss.get_num_gpus()
    num_gpus = available if num_gpus < 0 else min(num_gpus, available)
    if num_gpus:
        index = faiss.IndexFlat(base.shape[1], faiss_metric)
        index = faiss.index_cpu_to_all_gpus(index, ngpu=num_gpus)
        index.add(base)

    def search(queries, k):
        if num_gpus and k <= GPU_MAX_K:
            return index.search(queries, k)
        return faiss.knn(queries, base, k, metric=faiss_metric)

    return search


def pair_scores(a, b, metric):
    """Inner products or squared distances of the rows of `a` and `b`, (..., dim) float32, as (...)
    float32.

    Computed in double precision and rounded once. So a pair's value depends on the pair alone, not
    on CPU or GPU nor on the block it is in, and exact copies tie.
    """
    if metric == "l2":
        difference = np.subtract(a, b, dtype=np.float64)
        a = difference
        b = difference
    return np.einsum("...d,...d->...", a, b, dtype=np.float64).astype(np.float32)


def nearest(queries, base, k, metric, quiet=False):
    """The `k` rows of `base` nearest to each query, best first; equal scores in the order of
    `base`.

    queries (q, dim), base (n, dim); metric "ip" (inner product) or "l2". Returns scores (q, k)
    float32, inner products or squared distances, and indices (q, k) int64; k is at most n.
    `quiet` hides the progress bar. Raises InputError where shapes or k make no sense.
    """
    queries = as_float32(queries)
    base = as_float32(base)
    if k < 1 or not len(base) or queries.shape[1] != base.shape[1]:
        raise InputError(
            f"cannot find {k} neighbors of descriptors {queries.shape} among {base.shape}"
        )
    k = min(k, len(base))
    fetched = min(k + MARGIN, len(base))
    search = flat_search(base, metric)
    scores = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int64)
    title = f"search among {len(base)}"
    with tqdm(total=len(queries), desc=title, unit="query", disable=quiet) as bar:
        for start in range(0, len(queries), BLOCK):
            block = queries[start : start + BLOCK]
            _, candidates = search(block, fetched)
            for offset in range(0, len(block), CHUNK):
                chunk = slice(offset, offset + CHUNK)
                best = best_candidates(block[chunk], base, candidates[chunk], k, metric)
                target = slice(start + offset, start + offset + len(best[0]))
                scores[target] = best[0]
                indices[target] = best[1]
            bar.update(len(block))
    return scores, indices


def best_candidates(queries, base, candidates, k, metric):
    """The `k` best of each query's candidates, by exact scores.

    queries (q, dim); candidates (q, c) int64 are rows of base (n, dim). Returns scores (q, k)
    float32 and indices (q, k) int64, best first, equal scores in the order of `base`.
    """
    scores = pair_scores(queries[:, None], base[candidates], metric)
    costs = -scores if metric == "ip" else scores
    order = np.lexsort((candidates, costs))[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)


def as_float32(descriptors):
    """`descriptors` as a C-contiguous (n, dim) float32 array, itself where it is one already."""
    descriptors = np.ascontiguousarray(descriptors, dtype=np.float32)
    if descriptors.ndim != 2:
        raise InputError(f"descriptors must be (rows, dimensions), not {descriptors.shape}")
    return descriptors


def normalize(rows):
    """L2-normalize (n, dim) float32 in place and return it; a zero row stays zero."""
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    rows /= np.where(norm > 0, norm, 1)[:, None]
    return rows


def nonzero_rows(descriptors):
    """An index of the rows of (n, dim) that are not zero. Rows of unreadable images are zero.

    A slice where that is all of them, since indexing with a slice copies nothing.
    """
    nonzero = descriptors.any(axis=1)
    return slice(None) if nonzero.all() else np.flatnonzero(nonzero)


def neighbor_sum(base, indices, weights):
    """sum_j weights[i, j] * base[indices[i, j]] as (n, dim) float32.

    Computed in chunks of rows: for a million, all neighbors (n, k, dim) would take 10 GB.
    """
    result = np.empty((len(indices), base.shape[1]), np.float32)
    for start in range(0, len(indices), CHUNK):
        rows = slice(start, start + CHUNK)
        result[rows] = np.einsum("nk,nkd->nd", weights[rows], base[indices[rows]])
    return result
