"""Descriptors of anybody's image files: read by threads, kept in a cache, computed in batches."""

import hashlib
import math
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.descriptors import read_train
from common.errors import InputError
from common.images import (
    MAX_PIXELS,
    NoContent,
    check_content,
    decode,
    has_content,
    open_checked,
    pixels_to_decode,
    why_unreadable,
)
from common.search import normalize
from common.views import WHOLE

DECODED_INPUTS = 3  # sides of the input that a decoded JPEG's side has at least

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

    digest is the SHA-256 of its content, 32 bytes. descriptors {view: (dimensions,)} are from the
    cache; network_inputs {view: (3, size, size)} are of the other views. problem: why the file is
    unreadable, None where it is not; warning: what is wrong with one that is read all the same.
    has_content is false where the problem is that there is nothing to compare.
    """

    digest: bytes | None = None
    descriptors: dict = field(default_factory=dict)
    network_inputs: dict = field(default_factory=dict)
    problem: str | None = None
    warning: str | None = None
    has_content: bool = True


def load_file(path, network, cache, budget, views):
    """Read one file, as a LoadedFile. Raises InputError where the cache cannot be used."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            raise OSError("not a regular file" if Path(path).exists() else "no such file")
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            loaded = LoadedFile(digest)
            missing = []
            for view in views:
                descriptor = cache.get(digest, view)
                if descriptor is None:
                    missing.append(view)
                else:
                    loaded.descriptors[view] = descriptor
            if missing:
                file.seek(0)
                preprocess = partial(preprocess_views, network=network, views=missing)
                least_side = DECODED_INPUTS * network.input_size
                loaded.network_inputs, loaded.warning = load_image(
                    file, preprocess, budget, least_side
                )
            return loaded
    except InputError:
        raise
    except NoContent as error:
        return LoadedFile(problem=str(error), has_content=False)
    except Exception as error:  # file system, formats and decoders each fail in their own way
        return LoadedFile(problem=why_unreadable(error, path))


def preprocess_views(image, network, views):
    """The network's inputs {view: (3, size, size) float32} of views of a PIL image, mode RGB.

    A part of one color, such as sky, would resemble many images: the whole stands in for it.
    """
    inputs = {}
    for view in views:
        shown = view.of(image)
        if view.size < 1 and not has_content(shown):
            shown = image
        inputs[view] = network.preprocess(shown)
    return inputs


def load_image(file, preprocess, budget, least_side):
    """preprocess(image) of the image in an open file, upright and RGB; and a warning about the file
    or None, which cached descriptors do not repeat.

    A JPEG is decoded at a half, a quarter or an eighth of its size where both sides then still have
    `least_side` pixels: libjpeg does that far faster. Raises ValueError where the image has no
    content to compare, and whatever its decoder raises.
    """
    with open_checked(file) as image:
        image.draft(None, (least_side, least_side))
        with budget.take(pixels_to_decode(image)):
            image_as_seen, warning = decode(image)
            check_content(image_as_seen)
            return preprocess(image_as_seen), warning


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


@dataclass
class Extracted:
    """The descriptors of image files.

    rows (files, views, dimensions) float32, unit rows, zero for unreadable files; digests: SHA-256
    of each file's content, 32 bytes, None where unreadable; unreadable {path: problem}; warnings
    {path: what is wrong with a file that is read all the same}; without_content {path: what is
    said of an image that has nothing to compare}.
    """

    rows: np.ndarray
    digests: list
    unreadable: dict
    warnings: dict
    without_content: dict


def extract_descriptors(
    paths,
    network,
    cache,
    batch_size,
    workers,
    views=(WHOLE,),
    quiet=False,
    title="extracting descriptors",
):
    """Extract the descriptors of image files, in each of `views`; returns them as Extracted.

    Files are read by `workers` threads, since decoders release the interpreter. The network takes
    batches of one view, in the order of `paths`, and each content once. So a descriptor depends
    neither on the number of threads nor on the other views.
    """
    rows = np.zeros((len(paths), len(views), network.dimensions), np.float32)
    result = Extracted(rows, [None] * len(paths), {}, {}, {})
    first_file = {}  # of each SHA-256
    copies = {}  # number of a file: the first one with the same content
    batches = {view: {} for view in views}  # {number of a file: network input}

    def run(view):
        batch = batches[view]
        numbers = list(batch)
        digests = [result.digests[number] for number in numbers]
        descriptors = run_batch(list(batch.values()), digests, view, network, cache)
        rows[numbers, views.index(view)] = descriptors
        batch.clear()

    load = partial(
        load_file, network=network, cache=cache, budget=PixelBudget(MAX_PIXELS), views=views
    )
    limit = 2 * math.ceil(batch_size / len(views)) + workers
    loaded_files = map_ahead(load, paths, workers, limit)
    bar = tqdm(loaded_files, title, len(paths), unit="image", disable=quiet)
    for number, loaded in enumerate(bar):
        if loaded.problem:
            reasons = result.unreadable if loaded.has_content else result.without_content
            reasons[paths[number]] = loaded.problem
            continue
        if loaded.warning:
            result.warnings[paths[number]] = loaded.warning
        result.digests[number] = loaded.digest
        first = first_file.setdefault(loaded.digest, number)
        if first != number:
            copies[number] = first
            continue
        for view, descriptor in loaded.descriptors.items():
            rows[number, views.index(view)] = descriptor
        for view, network_input in loaded.network_inputs.items():
            batches[view][number] = network_input
            if len(batches[view]) == batch_size:
                run(view)
    for view, batch in batches.items():
        if batch:
            run(view)

    for number, first in copies.items():
        rows[number] = rows[first]
    for number in np.flatnonzero(~rows.any(axis=2).all(axis=1)).tolist():
        rows[number] = 0
        if paths[number] not in result.without_content:
            problem = "the network's descriptor of it is not finite"
            result.unreadable.setdefault(paths[number], problem)
    return result


def run_batch(network_inputs, digests, view, network, cache):
    """The descriptors of a batch of one view, (n, dimensions) float32, which the cache keeps.

    Unit rows; zero rows, and nothing in the cache, where the network's result is not finite.
    """
    descriptors = network.run(np.stack(network_inputs))
    is_valid = np.isfinite(descriptors).all(axis=1) & descriptors.any(axis=1)
    descriptors = normalize(np.where(is_valid[:, None], descriptors, np.float32(0)))
    valid_digests = [digest for digest, valid in zip(digests, is_valid, strict=True) if valid]
    cache.put(valid_digests, view, descriptors[is_valid])
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
