"""Exhaustive nearest neighbor search, by faiss on CPUs or GPUs."""

import faiss
import numpy as np
from tqdm import tqdm

from common.errors import InputError

BLOCK = 4096  # queries per call of faiss


CHUNK = 256  # rows whose neighbors are held at once: (CHUNK, k, dim)


MARGIN = (
    6  # neighbors fetched beyond k, so that rounding inside faiss does not decide who is the k-th
)


GPU_MAX_K = 2048  # faiss's limit on GPUs


def flat_search(base, metric, num_gpus=-1):
    """Exhaustive search in `base`, (n, dim) float32: a function (queries, k) -> (scores (q, k),
    indices (q, k)).

    `metric` is "ip" (largest inner product first) or "l2" (smallest squared distance first). It
    runs on `num_gpus` of the GPUs that faiss sees (-1: all), else on the CPU, there without a copy
    of `base`.
    """
    kind = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[metric]
    available = faiss.get_num_gpus()
    num_gpus = available if num_gpus < 0 else min(num_gpus, available)
    if num_gpus:
        index = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(base.shape[1], kind), ngpu=num_gpus)
        index.add(base)

    def search(queries, k):
        if num_gpus and k <= GPU_MAX_K:
            return index.search(queries, k)
        return faiss.knn(queries, base, k, metric=kind)

    return search


def pair_scores(a, b, metric):
    """Inner products or squared distances of the rows of `a` and `b`, (..., dim) float32, as (...)
    float32.

    Computed in double precision and rounded once, so that a pair's value depends on the pair alone,
    neither on CPU or GPU nor on the block it is in, and exact copies tie.
    """
    if metric == "l2":
        a = b = np.subtract(a, b, dtype=np.float64)
    return np.einsum("...d,...d->...", a, b, dtype=np.float64).astype(np.float32)


def nearest(queries, base, k, metric):
    """The `k` rows of `base` nearest to each query, best first; equal scores in the order of
    `base`.

    queries (q, dim), base (n, dim); metric "ip" (inner product) or "l2". Returns scores (q, k)
    float32, inner products or squared distances, and indices (q, k) int64; k is at most n. Raises
    InputError where shapes or k make no sense.
    """
    queries, base = as_float32(queries), as_float32(base)
    if k < 1 or not len(base) or queries.shape[1] != base.shape[1]:
        raise InputError(
            f"cannot find {k} neighbors of descriptors {queries.shape} among {base.shape}"
        )
    k = min(k, len(base))
    search = flat_search(base, metric)
    scores, indices = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    with tqdm(total=len(queries), desc=f"search among {len(base)}", unit="query") as bar:
        for start in range(0, len(queries), BLOCK):
            block = queries[start : start + BLOCK]
            _, found = search(block, min(k + MARGIN, len(base)))
            for first in range(0, len(block), CHUNK):
                rows, candidates = block[first : first + CHUNK], found[first : first + CHUNK]
                score = pair_scores(rows[:, None], base[candidates], metric)
                order = np.lexsort((candidates, -score if metric == "ip" else score))[:, :k]
                here = slice(start + first, start + first + len(rows))
                scores[here] = np.take_along_axis(score, order, 1)
                indices[here] = np.take_along_axis(candidates, order, 1)
            bar.update(len(block))
    return scores, indices


def as_float32(descriptors):
    """`descriptors` as a C-contiguous (n, dim) float32 array, itself where it is one already."""
    descriptors = np.ascontiguousarray(descriptors, dtype=np.float32)
    if descriptors.ndim != 2:
        raise InputError(f"descriptors must be (rows, dimensions), not {descriptors.shape}")
    return descriptors


def normalize(rows):
    """L2-normalizes (n, dim) float32 in place and returns it; a zero row stays zero."""
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    rows /= np.where(norm > 0, norm, 1)[:, None]
    return rows


def described(descriptors):
    """Which rows of (n, dim) are descriptors, as an index: not those of zeros, of images that could
    not be read.
    """
    read = descriptors.any(axis=1)
    return slice(None) if read.all() else np.flatnonzero(read)  # a slice copies nothing


def neighbor_sum(base, indices, weights):
    """sum_j weights[i, j] * base[indices[i, j]] as (n, dim) float32, in chunks: (n, k, dim) is 10
    GB for a million.
    """
    result = np.empty((len(indices), base.shape[1]), np.float32)
    for start in range(0, len(indices), CHUNK):
        rows = slice(start, start + CHUNK)
        result[rows] = np.einsum("nk,nkd->nd", weights[rows], base[indices[rows]])
    return result
