"""Database augmentation and negative embedding subtraction (paper: arXiv 2112.04323)."""

import numpy as np

from common.errors import InputError
from common.search import as_float32, nearest, neighbor_sum, normalize
from common.submissions import check_descriptors


def database_augmentation(train, k=10, alpha=3.0):
    """Replace each training descriptor by the normalized sum of its k nearest, itself included.

    train (n, dim) -> (n, dim) float32, unit length. Each neighbor's weight is its inner product to
    the power alpha, with its sign. Fewer than k descriptors: all of them are used. A zero row stays
    zero. The input is left as it is.
    """
    train = as_float32(train)
    similarity, indices = nearest(train, train, k, "ip")
    return weighted_neighbor_sum(train, indices, similarity, alpha)


def weighted_neighbor_sum(train, indices, similarity, alpha=3.0):
    """The rest of `database_augmentation`, once the neighbors are found.

    train (n, dim) float32; indices and similarity (n, k): each descriptor's neighbors and the inner
    products with them. Returns (n, dim) float32, unit length.
    """
    weights = np.copysign(np.abs(similarity) ** np.float32(alpha), similarity)
    result = normalize(neighbor_sum(train, indices, weights))
    result[~train.any(axis=1)] = 0
    return result


def negative_embedding_subtraction(descriptors, negatives, num_iter=1, k=10, beta=0.35):
    """Move descriptors away from the negatives that they resemble.

    x <- normalize(x - beta * mean of its k nearest negatives), `num_iter` times; each iteration
    searches with the result of the one before. descriptors (n, dim), negatives (m, dim), e.g.
    database-augmented training descriptors -> (n, dim) float32, unit length. Fewer than k
    negatives: all of them are used. A zero row, of an unreadable image, stays zero. The inputs are
    left as they are.
    """
    result = as_float32(descriptors).copy()
    negatives = as_float32(negatives)
    is_zero = ~result.any(axis=1)
    for _ in range(num_iter):
        _, indices = nearest(result, negatives, k, "ip")
        weights = np.full(indices.shape, beta / indices.shape[1], np.float32)
        result -= neighbor_sum(negatives, indices, weights)
        normalize(result)
        result[is_zero] = 0
    return result


def read_train(path):
    """Read and check `train_feats.npy`, (n, dim) floating point -> float32.

    Raises InputError where it is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; extract with a t in it: --mode extract --target-set qrt"
        )
    try:
        # A mapped file is refused where its header claims more than it holds.
        train = np.load(path, mmap_mode="r", allow_pickle=False)
        dtype = train.dtype
    except (ValueError, OSError, EOFError, AttributeError) as error:
        reason = str(error).replace("\n", " ")
        raise InputError(f"{path}: not a readable .npy file ({reason}); extract again") from None
    if dtype.kind != "f":
        raise InputError(f"{path}: holds {dtype}, not floating point numbers; extract again")
    with np.errstate(over="ignore"):
        train = np.array(train, dtype=np.float32, order="C")
    check_descriptors(train, f"{path}: the array")
    return train
