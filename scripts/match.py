# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "faiss-cpu==1.15.1",
#     "h5py==3.16.0",
#     "jinja2==3.1.6",
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "onnxruntime==1.32.0",
#     "pandas==3.1.1",
#     "pillow==13.0.0",
#     "tqdm==4.70.1",
# ]
# ///
r"""Find copies among pictures of one's own: cropped, recompressed, renamed, edited.

    python scripts/match.py FOLDER  # copies inside one folder
    # which of these are copies of those?
    python scripts/match.py uploads/ archive/ --output matches.csv
    python scripts/match.py photo.jpg archive/ --weight checkpoint_0009.pth.tar
    python scripts/match.py uploads.txt archive/ --onnx isc.onnx --device cpu
    python scripts/match.py FOLDER --groups groups.jsonl --report page.html
    uv run scripts/match.py FOLDER  # which installs what it needs, as requirements-match.txt does

QUERIES, REFERENCES and FOLDER are each a folder, searched through: hidden files are skipped,
symbolic links followed, a folder read once; or one picture; or a text file of paths, one a line (or
each ended by a NUL byte, as by `find -print0`), relative to where the command runs. A file that two
paths lead to is one file, and no copy of itself.

Reads   JPEG, PNG, WEBP, BMP, GIF, TIFF, AVIF, and HEIC where pillow-heif is installed; the first
        picture of an animation; upright as EXIF says and viewers show it; at most 100 million
        pixels. In a folder, files are chosen by suffix, then read by content. What cannot be read
        is named at the end, on stderr.
Needs   requirements-match.txt only, not torch: descriptors are those of the small network
        weights/v98.onnx, by ONNX Runtime. --onnx takes another file of export.py. --weight takes
        the published network, which is fetched once, or a checkpoint; it needs requirements.txt.
Writes  query,reference,score,group. The score is the cosine of two descriptors, 1 for the same
        picture. A group is all pictures that copies, and copies of copies, connect: over every pair
        at or above --threshold, reported or not. Paths keep their bytes: csv has them as they are,
        in quotes where they hold commas, quotes or line ends; JSON has \udc80 to \udcff for bytes
        that are not UTF-8, which Python's os.fsencode() turns back.
Keeps   finished descriptors in --cache, by content and network: after whatever ended it, the same
        command does the rest only, and several commands may run at once. To clear the cache, delete
        the file.

Exit code: 0 with matches, 1 without, 2 after an error, 130 after Ctrl-C. Bad files change it only
where they are all of QUERIES or of REFERENCES, or with --bad-images error: then it is 2.
"""

import argparse
import hashlib
import io
import json
import os
import sqlite3
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from common.cli import at_least
from common.descriptors import database_augmentation, negative_embedding_subtraction, read_train
from common.errors import InputError
from common.files import atomic, sha256_of
from common.images import (
    MAX_PIXELS,
    SUFFIXES,
    formats,
    needs_heif,
    open_checked,
    pixels_to_decode,
    upright_rgb,
)
from common.search import described, normalize, pair_scores

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = (
    "isc_ft_v107",
    "isc_selfsup_v98",
)  # entry points of hubconf.py, whose weights are fetched
THRESHOLD = 0.604169  # DataComp's for isc_ft_v107
DEFAULT_ONNX = ROOT / "weights" / "v98.onnx"

# Part of the cache's key, as it stands: other words would make every cached descriptor invalid.
PREPROCESSING = "upright, RGB, resized to a square by Pillow's bilinear filter, normalized"

SIMILARITIES = 2**24  # held at once, float32
DECIMALS = 6  # of a score, which is rounded before it is compared with the threshold


# ---- files ----


def list_pictures(place):
    """What an argument of the command line names: paths (str) in a fixed order, and {folder: why it
    cannot be read}.

    Raises InputError where there is nothing of that name, or no picture in it.
    """
    bad = {}
    if not Path(place).exists():
        raise InputError(f"{shown(place)}: no such file or folder; check the path")
    if Path(place).is_dir():
        paths, what = list(walk(place, bad)), "a folder without pictures"
    elif place.lower().endswith(SUFFIXES):
        paths, what = [place], ""
    else:
        data, what = (
            Path(place).read_bytes(),
            "no picture by its suffix, and no line of it is the path of a file",
        )
        lines = data.split(b"\0") if b"\0" in data else data.splitlines()
        encoding = sys.getfilesystemencoding()
        # os.fsdecode(), which on Windows would raise for bytes that are not UTF-8
        lines = [line.decode(encoding, "surrogateescape") for line in lines]
        paths = [line for line in lines if line.strip()]
        paths = (
            paths if any(map(os.path.isfile, paths)) else []
        )  # which, unlike Path's, takes any nonsense
    if not paths:
        raise InputError(
            f"{shown(place)}: {what}; give a folder, a picture, or a text file of paths, one a line"
        )
    return paths, bad


def walk(folder, bad):
    """Paths of the visible files below `folder` that have a picture's suffix, each real folder
    once.
    """

    def refuse(error):
        bad[error.filename] = error.strerror

    seen = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # symbolic links may lead in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = (
            name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        )
        yield from (f"{parent.rstrip(os.sep)}{os.sep}{name}" for name in sorted(pictures))


def collect(places):
    """The files of all `places`, each real file once: paths (str), an int64 array of their numbers
    for each place, and {folder: why it cannot be read}."""
    number, paths, members, bad = {}, [], [], {}
    for place in places:
        found, unreadable = list_pictures(place)
        bad |= unreadable
        real = [os.path.realpath(path) for path in found]
        for path, file in zip(found, real, strict=True):
            if file not in number:
                number[file] = len(paths)
                paths.append(path)
        members.append(np.array(list(dict.fromkeys(number[file] for file in real))))
    return paths, members, bad


def shown(path):
    """A path fit for one line of a terminal: what does not print is escaped."""
    return path if path.isprintable() else repr(path)[1:-1]


# ---- pictures ----


class Budget:
    """Pixels that may be decoded at once: large pictures wait for each other, lest threads multiply
    memory.
    """

    def __init__(self, pixels):
        self.free, self.changed = pixels, threading.Condition()

    @contextmanager
    def take(self, pixels):
        """Waits for so many, at most all, and holds them for the length of the block."""
        with self.changed:
            self.changed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.free += pixels
                self.changed.notify_all()


def read_picture(file, prepare, budget):
    """prepare(image) of the picture in an open file, upright and RGB; raises whatever its decoder
    does.
    """
    with open_checked(file) as image, budget.take(pixels_to_decode(image)):
        return prepare(upright_rgb(image))


def why(error, path):
    """What is wrong with a bad file, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        if needs_heif(path):
            return "HEIC needs pillow-heif: pip install pillow-heif"
        return f"no picture in a known format ({', '.join(formats())})"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


# ---- networks ----


@dataclass(frozen=True)
class Network:
    """What makes descriptors: `run` takes float32 (n, 3, input_size, input_size), returns float32
    (n, dimensions). `threshold` is the least cosine of a copy, or None: it is not known.
    """

    run: Callable
    weights: str  # SHA-256
    backend: str
    input_size: int
    mean: tuple
    std: tuple
    dimensions: int
    threshold: float | None = None

    @property
    def key(self):
        """SHA-256 of all that a descriptor depends on beside the picture, 32 bytes."""
        about = PREPROCESSING, self.weights, self.backend, self.input_size, self.mean, self.std
        return hashlib.sha256(repr(about).encode()).digest()

    def prepare(self, image):
        """A PIL image of mode RGB as the network's input, float32 (3, input_size, input_size), as
        extraction has it.
        """
        pixels = image.resize((self.input_size, self.input_size), Image.Resampling.BILINEAR)
        values = np.asarray(pixels, np.float32) / np.float32(255)
        values = (values - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def torch_network(args):
    """The network of --weight, by torch. Raises InputError where it cannot be had."""
    sys.path.insert(0, str(ROOT))
    try:
        import hubconf
        import torch
    except ImportError as error:
        raise InputError(
            f"{error.name}: is not installed, and --weight needs it; install requirements.txt, or "
            f"leave out --weight"
        ) from None
    arch, input_size = args.arch or hubconf.ARCH, args.input_size or 512
    published = args.weight in PUBLISHED
    weights = None if published else args.weight
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        half = args.amp == "fp16"
        if half and device.type != "cuda":
            raise InputError(f"--amp fp16: is for CUDA, not {device}; leave it out")
        load = getattr(hubconf, args.weight if published else PUBLISHED[0])
        with redirect_stderr(io.StringIO()) if args.quiet else nullcontext():  # what is fetched
            model, _ = load(
                weights=weights, arch=arch, input_size=input_size, device=device, half=half
            )
    except ValueError as error:  # which names the file
        raise InputError(f"{error}") from None
    except OSError as error:
        remedy = "give --weight FILE, as scripts/download_weights.py fetches it, or --onnx FILE"
        raise InputError(f"{args.weight}: cannot be fetched ({error}); {remedy}") from None
    except (RuntimeError, AssertionError) as error:  # of CUDA, and of a torch without it
        raise InputError(
            f"--device {args.device or 'cuda'}: {str(error).splitlines()[0]}"
        ) from None
    digest = hashlib.sha256(arch.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().numpy().tobytes())

    @torch.inference_mode()
    def run(images):
        try:
            return (
                model(torch.from_numpy(images).to(device, memory_format=torch.channels_last))
                .cpu()
                .numpy()
            )
        except torch.OutOfMemoryError:
            raise InputError(
                f"--batch-size {args.batch_size}: too many for {device}'s memory; give less"
            ) from None

    config, backend = model.backbone.default_cfg, f"torch {device.type}"
    if half:
        backend += " fp16"  # whose descriptors are others, for the cache too
    weights, dimensions = digest.hexdigest(), model.fc.out_features
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Network(run, weights, backend, input_size, mean, std, dimensions, THRESHOLD)


def onnx_network(args):
    """The network of --onnx, by ONNX Runtime. Raises InputError where it cannot be had."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            "onnxruntime: is not installed; pip install -r requirements-match.txt"
        ) from None
    device, _, number = (args.device or "").partition(":")
    available = onnxruntime.get_available_providers()
    cuda = "CUDAExecutionProvider" in available
    if device not in ("", "cpu", "cuda") or (device == "cuda" and not cuda):
        has = f"this onnxruntime has {', '.join(available)}"
        raise InputError(f"--device {args.device}: {has}; say cpu, or install onnxruntime-gpu")
    gpu = "CUDAExecutionProvider", {"device_id": number or "0"}
    providers = [gpu] if cuda and device != "cpu" else ["CPUExecutionProvider"]
    onnxruntime.set_default_logger_severity(4)  # what goes wrong is raised as well
    if not Path(args.onnx).is_file():
        raise InputError(f"{args.onnx}: no such file; make it with export.py")
    digest = sha256_of(Path(args.onnx))
    try:
        session = onnxruntime.InferenceSession(args.onnx, providers=providers)
        (images,), (output,) = session.get_inputs(), session.get_outputs()
        config = json.loads(session.get_modelmeta().custom_metadata_map["config"])
        input_size, mean, std = (
            int(config["input_size"]),
            tuple(config["mean"]),
            tuple(config["std"]),
        )
        fixed, dimensions = isinstance(images.shape[2], int), int(output.shape[1])
        threshold = config.get("threshold")
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"threshold {threshold}")
    except Exception as error:  # parser, metadata and the lack of any each fail in their own way
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{args.onnx}: is no ONNX file of export.py ({what}); export it again"
        ) from None
    if fixed and args.input_size not in (None, input_size):
        raise InputError(
            f"{args.onnx}: takes {input_size} pixels only; leave out --input-size {args.input_size}"
        )

    def run(batch):
        try:
            return session.run([output.name], {images.name: batch})[0]
        except Exception as error:  # whatever its kernels raise, also where memory does not suffice
            raise InputError(
                f"{args.onnx}: does not run ({str(error).splitlines()[0]}); export it again"
            ) from None

    backend = f"onnxruntime {session.get_providers()[0]}"
    input_size = args.input_size or input_size
    return Network(run, digest, backend, input_size, mean, std, dimensions, threshold)


# ---- cache ----


class Cache:
    """Finished descriptors of one network, in an sqlite file that several commands may use at once;
    None: in memory.

    A picture is known by the SHA-256 of its file, 32 bytes. Raises InputError where the cache
    cannot be used.
    """

    def __init__(self, path, network):
        self.path, self.key, self.dimensions, self.added = path, network.key, network.dimensions, 0
        self.lock = threading.Lock()
        with self.usable():
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(
                path or ":memory:", timeout=60, check_same_thread=False
            )
            self.connection.execute(
                "CREATE TABLE IF NOT EXISTS descriptors "
                "(picture BLOB, network BLOB, descriptor BLOB, PRIMARY KEY (picture, network))"
            )

    @contextmanager
    def usable(self):
        """One thread at a time; what sqlite or the file system finds wrong becomes one line."""
        try:
            with self.lock:
                yield
        except (sqlite3.Error, OSError) as error:
            remedy = "delete it, name another file with --cache, or say --no-cache"
            raise InputError(
                f"{self.path}: cannot be used as a cache ({error}); {remedy}"
            ) from None

    def get(self, picture):
        """The descriptor of a picture, (dimensions,) float32, or None: it is not there, or is
        none.
        """
        query = "SELECT descriptor FROM descriptors WHERE picture = ? AND network = ?"
        with self.usable():
            found = self.connection.execute(query, (picture, self.key)).fetchone()
        if found is None or len(found[0]) != 4 * self.dimensions:
            return None
        row = np.frombuffer(found[0], "<f4")
        return row if abs(float(row @ row) - 1) < 1e-3 else None

    def put(self, pictures, rows):
        """Keeps the descriptors (n, dimensions) of n pictures, which are on the disk when this
        returns.
        """
        blobs = (row.astype("<f4").tobytes() for row in rows)
        records = [(picture, self.key, blob) for picture, blob in zip(pictures, blobs, strict=True)]
        with self.usable(), self.connection:
            self.connection.executemany(
                "INSERT OR REPLACE INTO descriptors VALUES (?, ?, ?)", records
            )
        self.added += len(records)


# ---- descriptors ----


def ahead(function, items, workers, limit):
    """function(item) of each item in their order, by threads that are at most `limit` items ahead
    of the caller.
    """
    pool, futures = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) == limit:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_file(path, network, store, budget):
    """(SHA-256, descriptor or None, network's input or None, why it is bad or None) of one file."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise OSError("no file" if Path(path).exists() else "no such file")
        with Path(path).open("rb") as file:
            picture = hashlib.file_digest(file, "sha256").digest()
            descriptor = store.get(picture)
            if descriptor is not None:
                return picture, descriptor, None, None
            file.seek(0)
            return picture, None, read_picture(file, network.prepare, budget), None
    except InputError:
        raise
    except Exception as error:  # file system, formats and decoders each fail in their own way
        return None, None, None, why(error, path)


def describe(paths, network, store, args, title):
    """Descriptors of pictures: unit rows (n, dimensions) float32, of zeros where bad, and {path:
    reason} of those.

    Threads read, since decoders release the interpreter; the network takes batches in the order of
    `paths`, and each content once. So nothing depends on the number of threads.
    """
    rows, same = np.zeros((len(paths), network.dimensions), np.float32), np.arange(len(paths))
    first, bad, todo = {}, {}, []

    def finish():
        indices, pictures, images = map(list, zip(*todo, strict=True))
        todo.clear()
        found = network.run(np.stack(images))
        good = np.isfinite(found).all(axis=1) & found.any(axis=1)
        rows[indices] = found = normalize(np.where(good[:, None], found, np.float32(0)))
        store.put(
            [picture for picture, fine in zip(pictures, good, strict=True) if fine], found[good]
        )

    read = partial(read_file, network=network, store=store, budget=Budget(MAX_PIXELS))
    results = ahead(read, paths, args.workers, 2 * args.batch_size + args.workers)
    bar = tqdm(results, title, len(paths), unit="picture", disable=args.quiet)
    for index, (picture, descriptor, image, reason) in enumerate(bar):
        same[index] = first.setdefault(picture, index) if picture else index
        if reason:
            bad[paths[index]] = reason
        elif same[index] != index:
            continue
        elif descriptor is not None:
            rows[index] = descriptor
        else:
            todo.append((index, picture, image))
        if len(todo) == args.batch_size:
            finish()
    if todo:
        finish()
    rows = rows[same]
    for index in np.flatnonzero(~rows.any(axis=1)).tolist():
        bad.setdefault(paths[index], "the network's descriptor of it is not finite")
    return rows, bad


def read_negatives(network, store, args):
    """The background descriptors that --negatives names, (n, dimensions) float32, and {path:
    reason} of bad files.
    """
    if args.negatives.endswith(".npy"):
        rows, bad = read_train(Path(args.negatives)), {}
        if rows.shape[1] != network.dimensions:
            has = f"{rows.shape[1]} dimensions, where the network has {network.dimensions}"
            raise InputError(f"{args.negatives}: has {has}; extract it with the same network")
    else:
        paths, _, bad = collect([args.negatives])
        rows, unread = describe(paths, network, store, args, "background")
        bad |= unread
    rows = rows[described(rows)]
    if not len(rows):
        raise InputError(
            f"{shown(args.negatives)}: has no descriptor; give pictures that can be read"
        )
    return rows, bad


# ---- pairs ----


def cosine(a, b):
    """Cosines of unit rows (..., dim), float64 (...): 1 - d^2 / 2, which is exactly 1 for equal
    rows, rounded.
    """
    return np.round(1 - pair_scores(a, b, "l2").astype(np.float64) / 2, DECIMALS)


def merge(root, members):
    """Makes one tree of those in which `members` stand: root[i] is nearer to i's root than i, which
    is its own.
    """
    roots = root[members]
    while (root[roots] != roots).any():
        roots = root[roots]
    root[members] = root[roots] = roots.min()


def alike(label, files):
    """The labels that occur in `files`, sorted, and for each an array of its files, in their
    order.
    """
    order = np.argsort(label[files], kind="stable")
    labels, starts = np.unique(label[files][order], return_index=True)
    return labels, np.split(files[order], starts[1:])


def find_pairs(descriptors, queries, references, threshold, top_k, quiet=True):
    """The copies among files, and the groups that they form.

    descriptors (files, dim) float32, unit rows; queries, references: numbers of files, int64.
    Returns queries, references (pairs,) int64 and scores (pairs,) float64: for each query its
    `top_k` best other files with a cosine of at least `threshold`, equal ones in the order of
    references; a pair once where queries are references; and groups (files,) int64: the number of
    the group that a file is in, from 0 in the order of files, or -1. A group is what all such pairs
    connect, not the `top_k` only. Exact; memory does not grow with the number of such pairs.
    """
    # Equal descriptors, as of masses of the same picture, are compared once.
    _, label = np.unique(descriptors.view(f"V{descriptors[0].nbytes}").ravel(), return_inverse=True)
    asking, askers = answering, answers = alike(label, references)
    a = b = descriptors[[files[0] for files in answers]]
    if queries is not references:
        asking, askers = alike(label, queries)
        a = descriptors[[files[0] for files in askers]]
    itself = np.searchsorted(answering, asking).clip(max=len(answering) - 1)
    alone = np.array(
        [len(x) == 1 and np.array_equal(x, answers[i]) for x, i in zip(askers, itself, strict=True)]
    )
    place = np.empty(len(descriptors), np.int64)
    place[references] = np.arange(len(references))
    root = np.arange(label.max() + 1)
    matched = np.zeros(len(root), bool)
    slack = (
        descriptors.shape[1] + 64
    ) * 2.0**-24  # more than float32 products of unit rows are off by
    found, step = [(queries[:0], queries[:0], np.empty(0))], max(1, SIMILARITIES // len(b))
    with tqdm(total=len(a), desc="comparing", unit="picture", disable=quiet) as bar:
        for start in range(0, len(a), step):
            similarity = a[start : start + step] @ b.T
            lonely = np.flatnonzero(alone[start : start + step])
            similarity[lonely, itself[start + lonely]] = -np.inf  # a file is no copy of itself
            for row in np.flatnonzero((similarity >= threshold - slack).any(axis=1)):
                rough, query = similarity[row], a[start + row]
                near = np.flatnonzero(rough >= threshold - slack)
                unsure = np.flatnonzero(rough[near] < threshold + slack)
                near = np.delete(near, unsure[cosine(query, b[near[unsure]]) < threshold])
                if not len(near):
                    continue
                members = np.append(answering[near], asking[start + row])
                matched[members] = True
                merge(root, members)
                if len(near) > top_k + 1:  # one of which may be the query itself
                    near = near[
                        rough[near] >= np.partition(rough[near], -top_k - 1)[-top_k - 1] - 2 * slack
                    ]
                score = cosine(query, b[near])
                files = [answers[i][: top_k + 1] for i in near]
                score = np.repeat(score, [len(part) for part in files])
                files = np.concatenate(files)
                best = np.lexsort((place[files], -score))[: top_k + 1]
                for file in askers[start + row]:
                    others = best[files[best] != file][:top_k]
                    found.append((np.full(len(others), file), files[others], score[others]))
            bar.update(len(similarity))
    query, reference, score = map(np.concatenate, zip(*found, strict=True))
    if queries is references:
        query, reference = np.minimum(query, reference), np.maximum(query, reference)
        _, once = np.unique(query * len(descriptors) + reference, return_index=True)
        query, reference, score = query[once], reference[once], score[once]
    order = np.lexsort((reference, -score, query))
    while (root[root] != root).any():
        root = root[root]
    groups, _ = pd.factorize(np.where(matched, root, np.nan)[label])
    return query[order], reference[order], score[order], groups


# ---- output ----


def as_csv(table):
    """A table of matches as the bytes of a csv."""
    text = table.to_csv(index=False, float_format=f"%.{DECIMALS}f", lineterminator="\n")
    return text.encode("utf-8", sys.getfilesystemencodeerrors())


def as_lines(records):
    """Dicts as bytes, JSON one a line."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(path, data):
    """Writes bytes to a file, which appears whole or not at all, or to stdout, where `path` is "-".

    Raises InputError where the file cannot be written.
    """
    if path != "-":
        try:
            with atomic(Path(path)) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); make room, and run again"
            ) from None
        return
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has had enough; Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- main ----


def match(args, paths, members, network, store, bad):
    """Finds copies among the files `paths`, queries and references as `collect` gives them: a table
    of query, reference, score, group, and the list of paths of each group. Adds to `bad`. Raises
    InputError where none is left.
    """
    rows, unread = describe(paths, network, store, args, "describing")
    bad |= unread
    for place, files in zip((args.queries, args.references), members, strict=False):
        if not rows[files].any():
            raise InputError(
                f"{shown(place)}: not one picture of {len(files)} can be read; see below"
            )
    readable = [files[rows[files].any(axis=1)] for files in members]
    if args.negatives:
        negatives, unread = read_negatives(network, store, args)
        bad |= unread
        with (
            redirect_stderr(io.StringIO()) if args.quiet else nullcontext()
        ):  # the progress of both
            rows = negative_embedding_subtraction(rows, database_augmentation(negatives))
    query, reference, score, group = find_pairs(
        rows, readable[0], readable[-1], args.threshold, args.top_k, args.quiet
    )
    files = np.array(paths, object)
    table = {
        "query": files[query],
        "reference": files[reference],
        "score": score,
        "group": group[query] + 1,
    }
    groups = zip(*alike(group, np.arange(len(files))), strict=True)
    return pd.DataFrame(table), [
        files[members].tolist() for number, members in groups if number >= 0
    ]


def parse_args(argv=None):
    """The command line. Exits with one line and code 2 where options do not fit together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, at_least(int, 1)
    add(
        "queries",
        metavar="QUERIES",
        help="folder, picture, or text file of paths; alone: FOLDER, matched with itself",
    )
    add(
        "references", metavar="REFERENCES", nargs="?", help="folder, picture, or text file of paths"
    )
    names = " or ".join(PUBLISHED)
    add(
        "--weight",
        metavar="FILE",
        help=f"{names}, or a checkpoint; by torch, which requirements.txt installs",
    )
    add(
        "-a",
        "--arch",
        help=f"backbone of --weight, any name timm knows (default: {PUBLISHED[0]}'s)",
    )
    add(
        "--input-size",
        type=count,
        metavar="PIXELS",
        help="side of the input (default: the ONNX file's own; with --weight 512)",
    )
    add(
        "--onnx",
        metavar="FILE",
        help=f"network that export.py has written (default: {DEFAULT_ONNX.relative_to(ROOT)})",
    )
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add(
        "--amp",
        choices=("off", "fp16"),
        default="off",
        help="precision of the network; fp16 on CUDA only, its error is not measured yet "
        "(default: %(default)s)",
    )
    add("--batch-size", type=count, help="pictures described at once (default: 8, by CUDA 32)")
    add(
        "--workers",
        type=count,
        default=os.cpu_count(),
        help="threads that read (default: one a core)",
    )
    add(
        "--threshold",
        type=at_least(float, -1),
        help=f"least cosine of a match (default: the one in the ONNX file's metadata; with "
        f"--weight {THRESHOLD}, which is DataComp's for {PUBLISHED[0]}: other networks have "
        f"others)",
    )
    add(
        "--top-k",
        type=count,
        default=10,
        help="matches of a query, the best (default: %(default)s)",
    )
    add(
        "--negatives",
        metavar="FILE.npy|FOLDER",
        help="background, of which nothing is a copy, for negative embedding subtraction: "
        "pictures, or descriptors, "
        "such as extraction's train_feats.npy; it lowers scores, so choose the threshold anew",
    )
    default = (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        / "isc21"
        / "descriptors.sqlite"
    )
    add(
        "--cache",
        type=Path,
        default=default,
        metavar="FILE",
        help="finished descriptors (default: %(default)s)",
    )
    add(
        "--no-cache",
        dest="cache",
        action="store_const",
        const=None,
        help="neither use nor keep descriptors",
    )
    add(
        "--output",
        action="append",
        metavar="FILE",
        help="matches: .csv, .jsonl, or - for csv on stdout, the default; may be given several "
        "times",
    )
    add(
        "--groups",
        metavar="FILE.jsonl",
        help='groups of copies, one a line: {"group": 1, "files": [...]}',
    )
    add("--report", metavar="FILE.html", help="page that shows the matches as pictures")
    add(
        "--bad-images",
        choices=("skip", "error"),
        default="skip",
        help="error: with any, end with code 2, after all",
    )
    add(
        "-q",
        "--quiet",
        action="store_true",
        help="no progress or summary; bad files and errors are still named",
    )
    args = parser.parse_args(argv)
    args.output = args.output or ["-"]
    if args.onnx and args.weight:
        parser.error("--onnx: not with --weight; give one of them")
    if args.arch and not args.weight:
        parser.error("--arch: goes with --weight only; an ONNX file has its own")
    if args.amp != "off" and not args.weight:
        parser.error(
            f"--amp {args.amp}: goes with --weight only; for --onnx, use export.py --precision fp16"
        )
    if args.threshold is not None and args.threshold > 1:
        parser.error(f"--threshold {args.threshold}: no cosine is above 1")
    if wrong := [
        path for path in args.output if path != "-" and not path.endswith((".csv", ".jsonl"))
    ]:
        parser.error(f"--output {wrong[0]}: must end in .csv or .jsonl, or be -")
    for path in (*args.output, args.groups, args.report):
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"{path}: there is no such folder; make it first")
    return args


def main(argv=None):
    """Runs the command; returns the exit code: 0 with matches, 1 without, 2 after an error, 130
    after Ctrl-C.
    """
    args = parse_args(argv)
    warnings.simplefilter("ignore")  # of libraries; what a user should know is said here
    store, bad, code = None, {}, 2
    try:
        if args.report:
            from common import page  # now, so that a missing library shows before hours of work
        paths, members, bad = collect(
            [args.queries, args.references] if args.references else [args.queries]
        )
        if not (args.weight or args.onnx):
            args.onnx = str(DEFAULT_ONNX)
            if not args.quiet:
                name = DEFAULT_ONNX.relative_to(ROOT)
                print(
                    f"match.py: using the small network {name}; for the published one, which is "
                    f"far larger, give --weight {PUBLISHED[0]}",
                    file=sys.stderr,
                )
        network = torch_network(args) if args.weight else onnx_network(args)
        if args.threshold is None:
            args.threshold = network.threshold
        if args.threshold is None:
            raise InputError(
                f"{args.onnx}: has no threshold in its metadata; give --threshold "
                f"({THRESHOLD} for {PUBLISHED[0]})"
            )
        args.batch_size = args.batch_size or (32 if "cuda" in network.backend.lower() else 8)
        store = Cache(args.cache, network)
        table, groups = match(args, paths, members, network, store, bad)
        for path in args.output:
            write(
                path,
                as_lines(table.to_dict("records")) if path.endswith(".jsonl") else as_csv(table),
            )
        if args.groups:
            write(
                args.groups,
                as_lines({"group": i, "files": files} for i, files in enumerate(groups, 1)),
            )
        if args.report:
            page.write_match_page(Path(args.report), table, list(bad.items()), args.threshold)
        if not args.quiet:
            counts = f"{len(paths)} pictures, {store.added} of them new"
            print(
                f"match.py: {counts}; {len(table)} matches in {len(groups)} groups", file=sys.stderr
            )
        code = 0 if len(table) else 1
        if bad and args.bad_images == "error":
            raise InputError(
                f"--bad-images error: {len(bad)} bad files; what the others match is written"
            )
    except (InputError, ImportError, OSError) as error:
        code = 2
        remedy = "; install it" if isinstance(error, ImportError) else ""
        print(f"match.py: error: {error}{remedy}", file=sys.stderr)
    except KeyboardInterrupt:
        kept = (
            f"{store.added} new descriptors are in {args.cache}"
            if store and args.cache
            else "nothing is kept"
        )
        print(f"match.py: interrupted; {kept}", file=sys.stderr)
        return 130
    if bad:
        print(f"match.py: bad files ({len(bad)}):", file=sys.stderr)
    for path, reason in bad.items():
        print(f"{shown(path)}: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
