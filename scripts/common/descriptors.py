"""Database augmentation and negative embedding subtraction (paper: arXiv 2112.04323)."""

import numpy as np

from common.errors import InputError
from common.search import as_float32, nearest, neighbor_sum, normalize
from common.submissions import check_descriptors


def database_augmentation(train, k=10, alpha=3.0):
    """Each training descriptor becomes the normalized sum of its k nearest (itself included),
    weighted by similarity.

    train (n, dim) -> (n, dim) float32, unit length; the weight is the inner product to the power
    alpha, with its sign. Fewer than k descriptors: all of them are used. A zero row stays zero. The
    input is left as it is.
    """
    train = as_float32(train)
    similarity, indices = nearest(train, train, k, "ip")
    weights = np.copysign(np.abs(similarity) ** np.float32(alpha), similarity)
    result = normalize(neighbor_sum(train, indices, weights))
    result[~train.any(axis=1)] = 0
    return result


def negative_embedding_subtraction(descriptors, negatives, num_iter=1, k=10, beta=0.35):
    """Moves descriptors away from the negatives they resemble: x <- normalize(x - beta * mean of
    its k nearest).

    descriptors (n, dim), negatives (m, dim), e.g. database-augmented training descriptors -> (n,
    dim) float32, unit length; every iteration searches with the result of the one before. Fewer
    than k negatives: all of them are used. A zero row, an image that could not be read, stays zero.
    The inputs are left as they are. Paper: arXiv 2112.04323.
    """
    result, negatives = as_float32(descriptors).copy(), as_float32(negatives)
    unread = ~result.any(axis=1)
    for _ in range(num_iter):
        _, indices = nearest(result, negatives, k, "ip")
        weights = np.full(indices.shape, beta / indices.shape[1], np.float32)
        result -= neighbor_sum(negatives, indices, weights)
        normalize(result)
        result[unread] = 0
    return result


def read_train(path):
    """Reads and checks `train_feats.npy`, (n, dim) floating point -> float32. Raises InputError
    with what is wrong.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; extract with a t in it: --mode extract --target-set qrt"
        )
    try:
        train = np.load(
            path, mmap_mode="r", allow_pickle=False
        )  # mapped: a header that lies about the size is refused
        kind = train.dtype.kind
    except (ValueError, OSError, EOFError, AttributeError) as error:
        raise InputError(
            f"{path}: not a readable .npy file ({error}); extract again".replace("\n", " ")
        ) from None
    if kind != "f":
        raise InputError(f"{path}: holds {train.dtype}, not floating point numbers; extract again")
    with np.errstate(over="ignore"):
        train = np.array(train, dtype=np.float32, order="C")
    check_descriptors(train, f"{path}: the array")
    return train
