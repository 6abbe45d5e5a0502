"""Descriptors of anybody's image files: read by threads, kept in a cache, computed in batches."""

import hashlib
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from common.descriptors import read_train
from common.errors import InputError
from common.images import (
    MAX_PIXELS,
    formats,
    needs_heif,
    open_checked,
    pixels_to_decode,
    upright_rgb,
)
from common.search import normalize

# ---- reading ----


class PixelBudget:
    """Pixels that may be decoded at once, so that many threads need no more memory than one.

    Large images wait for each other.
    """

    def __init__(self, pixels):
        self.free = pixels
        self.changed = threading.Condition()

    @contextmanager
    def take(self, pixels):
        """Wait until so many are free, and hold them for the length of the block."""
        with self.changed:
            self.changed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.free += pixels
                self.changed.notify_all()


@dataclass
class LoadedFile:
    """What is known of a file after reading it.

    digest is the SHA-256 of its content, 32 bytes. Of the others one is set: `descriptor`
    (dimensions,) from the cache, `network_input` (3, size, size), or `problem`, why the file is
    unreadable.
    """

    digest: bytes | None = None
    descriptor: np.ndarray | None = None
    network_input: np.ndarray | None = None
    problem: str | None = None


def load_file(path, network, cache, budget):
    """Read one file, as a LoadedFile. Raises InputError where the cache cannot be used."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            raise OSError("not a regular file" if Path(path).exists() else "no such file")
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            descriptor = cache.get(digest)
            if descriptor is not None:
                return LoadedFile(digest, descriptor=descriptor)
            file.seek(0)
            network_input = load_image(file, network.preprocess, budget)
            return LoadedFile(digest, network_input=network_input)
    except InputError:
        raise
    except Exception as error:  # file system, formats and decoders each fail in their own way
        return LoadedFile(problem=problem_of(error, path))


def load_image(file, preprocess, budget):
    """preprocess(image) of the image in an open file, upright and RGB.

    Raises whatever its decoder raises.
    """
    with open_checked(file) as image, budget.take(pixels_to_decode(image)):
        return preprocess(upright_rgb(image))


def problem_of(error, path):
    """Why a file is unreadable, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        if needs_heif(path):
            return "HEIC needs pillow-heif: pip install pillow-heif"
        return f"no image in a known format ({', '.join(formats())})"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def map_ahead(function, items, workers, limit):
    """Yield function(item) of each item, in order, computed by `workers` threads.

    They are at most `limit` items ahead of the caller.
    """
    pool = ThreadPoolExecutor(workers)
    futures = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) == limit:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- descriptors ----


def extract_descriptors(
    paths, network, cache, batch_size, workers, quiet=False, title="extracting descriptors"
):
    """Extract the descriptors of image files.

    Returns unit rows (n, dimensions) float32, zero for unreadable files, and {path: problem} of
    these. Files are read by `workers` threads, since decoders release the interpreter. The network
    takes batches in the order of `paths`, and each content once. So nothing depends on the number
    of threads.
    """
    rows = np.zeros((len(paths), network.dimensions), np.float32)
    row_of_content = np.arange(len(paths))  # for each path, the first path with the same content
    first_row = {}  # of each SHA-256
    unreadable = {}
    batch = {}  # row: LoadedFile

    load = partial(load_file, network=network, cache=cache, budget=PixelBudget(MAX_PIXELS))
    loaded_files = map_ahead(load, paths, workers, limit=2 * batch_size + workers)
    bar = tqdm(loaded_files, title, len(paths), unit="image", disable=quiet)
    for row, loaded in enumerate(bar):
        if loaded.problem:
            unreadable[paths[row]] = loaded.problem
            continue
        row_of_content[row] = first_row.setdefault(loaded.digest, row)
        if row_of_content[row] != row:
            continue
        if loaded.descriptor is not None:
            rows[row] = loaded.descriptor
            continue
        batch[row] = loaded
        if len(batch) == batch_size:
            rows[list(batch)] = run_batch(batch.values(), network, cache)
            batch.clear()
    if batch:
        rows[list(batch)] = run_batch(batch.values(), network, cache)

    rows = rows[row_of_content]
    for row in np.flatnonzero(~rows.any(axis=1)).tolist():
        unreadable.setdefault(paths[row], "the network's descriptor of it is not finite")
    return rows, unreadable


def run_batch(files, network, cache):
    """The descriptors of a batch of LoadedFiles, (n, dimensions) float32, which the cache keeps.

    Unit rows; zero rows, and nothing in the cache, where the network's result is not finite.
    """
    network_inputs = [file.network_input for file in files]
    descriptors = network.run(np.stack(network_inputs))
    is_valid = np.isfinite(descriptors).all(axis=1) & descriptors.any(axis=1)
    descriptors = normalize(np.where(is_valid[:, None], descriptors, np.float32(0)))
    digests = [file.digest for file, valid in zip(files, is_valid, strict=True) if valid]
    cache.put(digests, descriptors[is_valid])
    return descriptors


def read_background(path, network):
    """The background descriptors in a .npy file, (n, dimensions) float32.

    Raises InputError where the file is unreadable or of another network's dimensions.
    """
    rows = read_train(Path(path))
    if rows.shape[1] != network.dimensions:
        has = f"{rows.shape[1]} dimensions, where the network has {network.dimensions}"
        raise InputError(f"{path}: has {has}; extract it with the same network")
    return rows
