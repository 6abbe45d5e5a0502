"""Database augmentation and negative embedding subtraction: from extracted descriptors to the two
submission files.

    cd exp && python ../scripts/postprocess.py  # v107, phase 1, as published
    python scripts/postprocess.py v107 --phase 2
    python scripts/postprocess.py v98 v107      # both stages' descriptors, concatenated

Needs   exp/vNN/extract/train_feats.npy and fb-isc-submission.h5 (phase 2:
        fb-isc-submission-phase2.h5), which `python vNN.py --mode extract --target-set qrt ...`
        writes.
Writes  exp/vNN/extract/vNN_iso.h5 (descriptor track) and vNN_iso.csv (matching track); phase 2:
        vNN_iso_phase2.*.

The challenge forbids using query or reference images to process each other: only training
descriptors enter. Paper: arXiv 2112.04323.
"""

import argparse
import errno
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import faiss
import h5py
import numpy as np
import pandas as pd
from tqdm import tqdm

from validate_submission import (
    DATASETS,
    MAX_DIMENSIONS,
    InputError,
    check_descriptors,
    check_submission,
    read_matches,
    read_submission,
)

EXP = Path(__file__).resolve().parents[1] / "exp"
SUBMISSION = {1: "fb-isc-submission.h5", 2: "fb-isc-submission-phase2.h5"}
SUFFIX = {1: "", 2: "_phase2"}
MATCHES = 10  # references per query in the csv, the challenge's allowance
BLOCK = 4096  # queries per call of faiss
CHUNK = 256  # rows whose neighbours are held at once: (CHUNK, k, dim)
MARGIN = (
    6  # neighbours fetched beyond k, so that rounding inside faiss does not decide who is the k-th
)
GPU_MAX_K = 2048  # faiss's limit on GPUs


# ---- search ----


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
            f"cannot find {k} neighbours of descriptors {queries.shape} among {base.shape}"
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


# ---- descriptors ----


def as_float32(descriptors):
    """`descriptors` as a C-contiguous (n, dim) float32 array, itself where it is one already."""
    descriptors = np.ascontiguousarray(descriptors, dtype=np.float32)
    if descriptors.ndim != 2:
        raise InputError(f"descriptors must be (rows, dimensions), not {descriptors.shape}")
    return descriptors


def normalise(rows):
    """L2-normalises (n, dim) float32 in place and returns it; a zero row stays zero."""
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    rows /= np.where(norm > 0, norm, 1)[:, None]
    return rows


def described(descriptors):
    """Which rows of (n, dim) are descriptors, as an index: not those of zeros, of images that could
    not be read.
    """
    read = descriptors.any(axis=1)
    return slice(None) if read.all() else np.flatnonzero(read)  # a slice copies nothing


def neighbour_sum(base, indices, weights):
    """sum_j weights[i, j] * base[indices[i, j]] as (n, dim) float32, in chunks: (n, k, dim) is 10
    GB for a million.
    """
    result = np.empty((len(indices), base.shape[1]), np.float32)
    for start in range(0, len(indices), CHUNK):
        rows = slice(start, start + CHUNK)
        result[rows] = np.einsum("nk,nkd->nd", weights[rows], base[indices[rows]])
    return result


def database_augmentation(train, k=10, alpha=3.0):
    """Each training descriptor becomes the normalised sum of its k nearest (itself included),
    weighted by similarity.

    train (n, dim) -> (n, dim) float32, unit length; the weight is the inner product to the power
    alpha, with its sign. Fewer than k descriptors: all of them are used. A zero row stays zero. The
    input is left as it is.
    """
    train = as_float32(train)
    similarity, indices = nearest(train, train, k, "ip")
    weights = np.copysign(np.abs(similarity) ** np.float32(alpha), similarity)
    result = normalise(neighbour_sum(train, indices, weights))
    result[~train.any(axis=1)] = 0
    return result


def negative_embedding_subtraction(descriptors, negatives, num_iter=1, k=10, beta=0.35):
    """Moves descriptors away from the negatives they resemble: x <- normalise(x - beta * mean of
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
        result -= neighbour_sum(negatives, indices, weights)
        normalise(result)
        result[unread] = 0
    return result


# ---- files ----


@contextmanager
def atomic(path):
    """Gives a temporary path beside `path`, which takes its place when the block ends well and
    vanishes otherwise.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def concatenated(parts):
    """Descriptors of several stages side by side, at unit length so that beta keeps its meaning;
    one stage as it is.
    """
    return parts[0] if len(parts) == 1 else normalise(np.concatenate(parts, axis=1))


def find_matches(data):
    """The 10 nearest references of each query: `query_id`, `reference_id`, `score`; nothing matches
    a row of zeros.
    """
    queries, references = described(data["query"]), described(data["reference"])
    distance, indices = nearest(
        data["query"][queries], data["reference"][references], MATCHES, "l2"
    )
    return pd.DataFrame(
        {
            "query_id": np.repeat(np.char.decode(data["query_ids"][queries]), indices.shape[1]),
            "reference_id": np.char.decode(data["reference_ids"][references])[indices.ravel()],
            "score": -distance.ravel(),
        }
    )


def write_submission(h5_path, csv_path, data, matches):
    """Writes both tracks; neither file changes before both are complete and read back well."""
    with atomic(csv_path) as csv_file, atomic(h5_path) as h5_file:
        matches.to_csv(csv_file, index=False)
        if (
            2**16 + sum(data[name].nbytes for name in DATASETS)
            > shutil.disk_usage(h5_path.parent).free
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(h5_path))  # HDF5 would crash
        with h5py.File(h5_file, "w") as file:
            for name in DATASETS:
                file.create_dataset(name, data=data[name])
        read_matches(csv_file)
        check_submission(h5_file)


# ---- main ----


def postprocess(args):
    """Reads the extracted descriptors of `args.versions`, writes both submission files; returns
    their paths.
    """
    folders = [args.exp / version / "extract" for version in args.versions]
    submissions = [read_submission(folder / SUBMISSION[args.phase]) for folder in folders]
    trains = [read_train(folder / "train_feats.npy") for folder in folders]
    data = submissions[0]
    for folder, submission, train in zip(folders, submissions, trains, strict=True):
        if train.shape[1] != submission["query"].shape[1]:
            dims = (
                f"{train.shape[1]}, those of {SUBMISSION[args.phase]} "
                f"{submission['query'].shape[1]}"
            )
            raise InputError(
                f"{folder}/train_feats.npy: its dimensions are {dims}; extract all with one model"
            )
        if len(train) != len(trains[0]) or any(
            not np.array_equal(submission[name], data[name])
            for name in ("query_ids", "reference_ids")
        ):
            raise InputError(
                f"{folder}: its images are not those of {folders[0]}; extract both from the same "
                f"input"
            )

    train = concatenated(trains)
    del trains
    train = database_augmentation(train[described(train)], args.k, args.alpha)
    for name in ("query", "reference"):
        data[name] = negative_embedding_subtraction(
            concatenated([submission.pop(name) for submission in submissions]),
            train,
            args.num_iter,
            args.k,
            args.beta,
        )
    matches = find_matches(data)

    stem = "_".join(folder.parent.name for folder in folders) + "_iso" + SUFFIX[args.phase]
    h5_path, csv_path = folders[-1] / f"{stem}.h5", folders[-1] / f"{stem}.csv"
    write_submission(h5_path, csv_path, data, matches)
    if (dims := data["query"].shape[1]) > MAX_DIMENSIONS:
        message = f"{h5_path}: {dims} dimensions; the descriptor track allows {MAX_DIMENSIONS}"
        print(f"postprocess.py: warning: {message}", file=sys.stderr)
    return h5_path, csv_path


def at_least(kind, low):
    """An argparse type: a finite number no less than `low`."""

    def number(text):
        value = kind(text)
        if not low <= value < float("inf"):
            raise ValueError(text)
        return value

    number.__name__ = f"{kind.__name__} >= {low}"
    return number


def parse_args(argv=None):
    """The command line; the defaults are the published run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "versions",
        nargs="*",
        default=["v107"],
        metavar="VERSION",
        help="stage(s) whose descriptors are used; those of several are concatenated, and the "
        "result goes to the last "
        "one's folder under all their names (default: v107)",
    )
    parser.add_argument(
        "--exp",
        type=Path,
        default=EXP,
        help="folder that holds VERSION/extract (default: %(default)s)",
    )
    parser.add_argument(
        "--phase", type=int, choices=(1, 2), default=1, help="query set (default: 1)"
    )
    parser.add_argument(
        "--k", type=at_least(int, 1), default=10, help="neighbours in both steps (default: 10)"
    )
    parser.add_argument(
        "--alpha", type=at_least(float, 0), default=3.0, help="power of the similarity (default: 3)"
    )
    parser.add_argument(
        "--beta", type=at_least(float, 0), default=0.35, help="share subtracted (default: 0.35)"
    )
    parser.add_argument(
        "--num-iter", type=at_least(int, 0), default=1, help="subtractions in turn (default: 1)"
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Runs the command; returns the exit code: 0, or 2 with one line on stderr."""
    args = parse_args(argv)
    try:
        for path in postprocess(args):
            print(path)
    except (InputError, OSError) as error:
        print(f"postprocess.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
