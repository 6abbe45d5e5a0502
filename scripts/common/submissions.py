"""Submissions and ground truths, from untrusted files.

In an .h5, links, external and virtual data, filters, and shapes are checked before any data is
read: a file can make the reader neither open another file nor use much more memory than its own
size. Rules of the challenge: arXiv 2106.09672.
"""

import math
import zlib
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from common.errors import InputError

DATASETS = ("query", "reference", "query_ids", "reference_ids")
COLUMNS = ("query_id", "reference_id", "score")
TRACKS = {".h5": "descriptor", ".hdf5": "descriptor", ".csv": "matching"}

# The challenge's rules
ROWS = {"query": 50_000, "reference": 1_000_000}  # of DISC21, in either phase
IDS = {"query": ("S6", "Q[0-9]{5}"), "reference": ("S7", "R[0-9]{6}")}
MAX_DIMENSIONS = 256
MAX_MATCHES = 10 * ROWS["query"]

# Limits for untrusted files
MAX_LINE = 64  # bytes of a csv's line; Q00000,R000000 and a score in full take half of it
MAX_HEADER = 2**16  # bytes of a csv's first line
MAX_ID = 255  # bytes, the longest file name
GZIP = h5py.h5z.FILTER_DEFLATE
SHUFFLE = h5py.h5z.FILTER_SHUFFLE
PIPELINES = ([], [SHUFFLE], [GZIP], [SHUFFLE, GZIP])  # lzf inflates crafted data slowly
# Descriptors of few distinct values shrink to a sixth, those of a network hardly at all.
COMPRESSION = 20
SMALL = 2**24  # bytes that any compressed data may inflate to: consecutive ids shrink to a 400th
BLOCK = 16384  # rows read at once
HDF5_ERRORS = (OSError, RuntimeError, LookupError, TypeError, ValueError, zlib.error)


@contextmanager
def open_submission(path):
    """Open a descriptor-track file, for the length of a block, and check everything but its values.

    Gives {name: h5py.Dataset}: query and reference are (n, dim) floating point of one dim, their
    ids n strings. Raises InputError with what is wrong, also for what HDF5 finds unreadable in the
    block.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; extract first: python vNN.py --mode extract --target-set qrt "
            f"..."
        )
    try:
        with h5py.File(path) as file:
            datasets = {name: plain_dataset(file, name, path) for name in DATASETS}
            for name, dataset in datasets.items():
                check_shape(dataset, name, path)
                check_storage(dataset, name, path)
            check_counts(datasets, path)
            yield datasets
    except InputError:
        raise
    except HDF5_ERRORS as error:
        raise InputError(
            f"{path}: not a readable HDF5 file ({error}); extract again".replace("\n", " ")
        ) from None


def plain_dataset(file, name, path):
    """The dataset `name` of this file. A link is not followed: it could open another file.

    Raises InputError where there is none that is stored in this file, plainly or compressed.
    """
    links = file.id.links
    key = name.encode()
    if not links.exists(key):
        raise InputError(
            f"{path}: there is no dataset '{name}'; a submission has {', '.join(DATASETS)}"
        )
    is_link = links.get_info(key).type != h5py.h5l.TYPE_HARD
    if is_link or not is_plain(file[name]):
        raise InputError(
            f"{path}: '{name}' is not a plain dataset of this file; copy the data into it"
        )
    dataset = file[name]
    if filters_of(dataset) not in PIPELINES:
        raise InputError(
            f"{path}: '{name}' is stored with filters other than gzip and shuffle; write it without"
        )
    return dataset


def is_plain(item):
    """Whether an item of a file is a dataset whose data are in the file itself."""
    return isinstance(item, h5py.Dataset) and not item.is_virtual and not item.external


def filters_of(dataset):
    """The numbers of a dataset's filters, in the order in which they were applied."""
    creation = dataset.id.get_create_plist()
    return [creation.get_filter(i)[0] for i in range(creation.get_nfilters())]


def check_shape(dataset, name, path):
    """Raise InputError unless this is (n, dim) floating point numbers, or n strings."""
    shape = dataset.shape or ()
    if name.endswith("_ids"):
        if h5py.check_string_dtype(dataset.dtype) is None or len(shape) != 1:
            raise InputError(
                f"{path}: '{name}' must be one string per row, such as Q00000; extract again"
            )
        if dataset.dtype.kind == "O" and dataset.id.get_offset() is None:
            raise InputError(
                f"{path}: '{name}' has text of variable length in chunks; store it at fixed length"
            )
        return
    if len(shape) != 2 or 0 in shape:
        raise InputError(
            f"{path}: '{name}' is empty or not (rows, dimensions): {shape}; extract again"
        )
    if dataset.dtype.kind != "f":
        raise InputError(
            f"{path}: '{name}' holds {dataset.dtype}, not floating point numbers; extract again"
        )


def check_storage(dataset, name, path):
    """Raise InputError where the file cannot hold as many values as the shape claims.

    Reads no values, except that gzip chunks are inflated up to their proper size: HDF5 would
    inflate a chunk to any size.
    """
    value_size = dataset.id.get_type().get_size()
    stored = dataset.id.get_storage_size()
    compressed = GZIP in filters_of(dataset)
    most = max(COMPRESSION * stored, SMALL) if compressed else stored
    if dataset.chunks:
        count = number_of_chunks(dataset)
        size = math.prod(dataset.chunks) * value_size
        written = dataset.id.get_num_chunks() == count
    else:
        count = 1
        size = math.prod(dataset.shape) * value_size
        written = True
    if stored > path.stat().st_size or count * size > most or not written:
        raise InputError(
            f"{path}: '{name}' claims {dataset.shape} values, more than the file can hold; "
            f"extract again"
        )
    if compressed:
        check_gzip(dataset, size, name, path)


def number_of_chunks(dataset):
    """How many chunks a dataset's shape takes."""
    count = 1
    for rows, chunk_rows in zip(dataset.shape, dataset.chunks, strict=True):
        count *= -(-rows // chunk_rows)
    return count


def check_gzip(dataset, size, name, path):
    """Raise InputError unless every chunk inflates to exactly `size` bytes; inflates at most one
    byte more.
    """
    chunks = []
    dataset.id.chunk_iter(chunks.append)
    gzip_skipped = 1 << filters_of(dataset).index(GZIP)  # a bit of the chunk's mask
    for chunk in chunks:
        _, data = dataset.id.read_direct_chunk(chunk.chunk_offset)
        if not chunk.filter_mask & gzip_skipped:
            data = zlib.decompressobj().decompress(data, size + 1)
        if len(data) != size:
            raise InputError(
                f"{path}: '{name}' has a chunk that is not of {size} bytes; write it without "
                f"compression"
            )


def check_counts(datasets, path):
    """Raise InputError unless each row has one id, ids are short, and all descriptors have the same
    number of dimensions.
    """
    for name in ROWS:
        rows = len(datasets[name])
        ids = datasets[f"{name}_ids"]
        if len(ids) != rows:
            raise InputError(f"{path}: {rows} rows in '{name}' but {len(ids)} ids; extract again")
        if longest_id(ids, path) > MAX_ID:
            raise InputError(
                f"{path}: '{name}_ids' is wider than {MAX_ID} bytes; store short ids, such as "
                f"Q00000"
            )
    query_dim = datasets["query"].shape[1]
    reference_dim = datasets["reference"].shape[1]
    if query_dim != reference_dim:
        raise InputError(
            f"{path}: queries and references have different dimensions, {query_dim} and "
            f"{reference_dim}; extract both with one model"
        )


def longest_id(ids, path):
    """Bytes of the longest id.

    Texts of variable length are not read, since every row may point to the same huge one. HDF5
    stores 16 bytes for each row: 4 of the length, 12 of the place of the text.
    """
    if ids.dtype.kind == "S":
        return ids.dtype.itemsize
    if ids.id.get_storage_size() != 16 * len(ids):
        raise InputError(
            f"{path}: text of variable length in an unusual file; store ids at fixed length, S6 "
            f"and S7"
        )
    rows = np.fromfile(
        path, [("length", "<u4"), ("place", "V12")], len(ids), offset=ids.id.get_offset()
    )
    return int(rows["length"].max())


def blocks(dataset, name, path):
    """(slice, rows as float32) of a descriptor dataset, each block checked to be finite."""
    step = max(BLOCK, dataset.chunks[0] if dataset.chunks else 0)
    for start in range(0, len(dataset), step):
        here = slice(start, min(start + step, len(dataset)))
        with np.errstate(over="ignore"):  # too large for float32: infinity, refused below
            rows = dataset[here].astype(np.float32, copy=False)
        check_descriptors(rows, f"{path}: '{name}'", start)
        yield here, rows


def check_descriptors(descriptors, where, start=0):
    """Raise InputError unless `descriptors` is a non-empty (rows, dimensions) array of finite
    numbers.

    A row of zeros, of an unreadable image, is accepted. `start` is the number of the first row.
    """
    if descriptors.ndim != 2 or not descriptors.size:
        raise InputError(
            f"{where} is empty or not (rows, dimensions): {descriptors.shape}; extract again"
        )
    # NaN and infinity show in the extremes, which take no array of the same size.
    if not np.isfinite([descriptors.min(), descriptors.max()]).all():
        finite_rows = np.isfinite(descriptors).all(axis=1)
        row = start + int(finite_rows.argmin())
        raise InputError(
            f"{where} has NaN or infinity, first in row {row}; extract again, or check the "
            f"checkpoint"
        )


def read_ids(dataset, name, path):
    """Ids as fixed-width bytes (n,), whatever string type they are stored as: UTF-8, printable,
    each once.
    """
    ids = dataset[()]
    if ids.dtype.kind == "O":
        ids = ids.astype("S")
    try:
        printable = all(text and text.decode().isprintable() for text in ids.tolist())
    except UnicodeDecodeError:
        raise InputError(f"{path}: '{name}' is not UTF-8 text; extract again") from None
    if not printable:
        raise InputError(
            f"{path}: '{name}' has an empty id or one with control characters; extract again"
        )
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        twice = unique[counts.argmax()].decode()
        raise InputError(
            f"{path}: '{name}' holds {twice} more than once; ids must be unique, extract again"
        )
    return ids


def read_submission(path):
    """Read and check a descriptor-track file of any data set.

    Returns a dict: `query`, `reference` (n, dim) float32, `query_ids`, `reference_ids` (n,)
    fixed-width bytes. Raises InputError with what is wrong.
    """
    path = Path(path)
    data = {}
    with open_submission(path) as datasets:
        for ids in ("query_ids", "reference_ids"):
            data[ids] = read_ids(datasets[ids], ids, path)
        for name in ("query", "reference"):
            data[name] = np.empty(datasets[name].shape, np.float32)
            for here, rows in blocks(datasets[name], name, path):
                data[name][here] = rows
    return data


def check_submission(path, challenge=False, partial=False):
    """Check a descriptor-track file, a block at a time; returns its line for the user.

    `challenge`: float32 of at most 256 dimensions, ids of DISC21 as S6 and S7, and its 50,000
    queries and 1,000,000 references, or `partial`, at most so many. Raises InputError with what is
    wrong.
    """
    with open_submission(path) as datasets:
        if challenge:
            check_format(datasets, path, partial)
        for name in ROWS:
            ids = read_ids(datasets[f"{name}_ids"], f"{name}_ids", path)
            if challenge:
                check_form(pd.Series(np.char.decode(ids)), name, path)
            for _ in blocks(datasets[name], name, path):  # reading checks them
                pass
        queries = len(datasets["query"])
        references, dimensions = datasets["reference"].shape
    return f"{path}: {queries} queries, {references} references, {dimensions} dimensions"


def check_format(datasets, path, partial):
    """Raise InputError where types, dimensions or numbers of rows are not the challenge's."""
    for name, count in ROWS.items():
        dataset = datasets[name]
        ids = datasets[f"{name}_ids"]
        id_type, _ = IDS[name]
        if dataset.dtype != np.float32:
            raise InputError(f"{path}: '{name}' holds {dataset.dtype}; store float32")
        if dataset.shape[1] > MAX_DIMENSIONS:
            raise InputError(
                f"{path}: '{name}' has {dataset.shape[1]} dimensions; the descriptor track allows "
                f"{MAX_DIMENSIONS}, reduce them"
            )
        rows = f"{path}: {len(dataset)} rows in '{name}', DISC21 has {count}"
        if len(dataset) > count:
            raise InputError(f"{rows}; submit those alone")
        if len(dataset) < count and not partial:
            raise InputError(f"{rows}; submit all of them, or say --partial")
        if ids.dtype != np.dtype(id_type):
            kind = "text of variable length" if ids.dtype.kind == "O" else ids.dtype
            raise InputError(
                f"{path}: '{name}_ids' holds {kind}; store ids as fixed-length bytes, {id_type}"
            )


def check_form(ids, name, path):
    """Raise InputError unless all `ids`, a Series of str, are DISC21's for `name`: Q00000 or
    R000000.
    """
    _, form = IDS[name]
    well_formed = ids.str.fullmatch(form)
    if not well_formed.all():
        wrong = ids[~well_formed].iloc[0]
        raise InputError(
            f"{path}: {wrong!r} is not the id of a {name}; DISC21's are of the form {form}, "
            f"without a file suffix"
        )


def read_csv(path, columns):
    """The named columns of a csv as text, empty where there is nothing. Raises InputError with what
    is wrong.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    with path.open("rb") as file:
        first_line = file.readline(MAX_HEADER)
    if len(first_line) == MAX_HEADER:  # pandas would read all of it into memory
        raise InputError(
            f"{path}: its first line does not end within {MAX_HEADER} bytes of "
            f"{path.stat().st_size} bytes; give a csv"
        )
    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False
        ).fillna("")
    except ValueError as error:  # not text, not a table, or empty
        raise InputError(f"{path}: not a readable csv ({error})".replace("\n", " ")) from None
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(missing)}; its first line must name {','.join(columns)}"
        )
    if not len(table):
        raise InputError(f"{path}: no rows below the header; nothing to evaluate")
    empty = table[columns[0]] == ""
    if empty.any():
        line = int(empty.argmax()) + 2
        raise InputError(f"{path}: no {columns[0]} in line {line}; give every row one")
    for column in columns[:2]:
        if not table[column].map(str.isprintable).all():
            raise InputError(f"{path}: {column} has control characters; write plain ids")
    return table[list(columns)]


def read_matches(path):
    """A matching-track file of any data set: `query_id`, `reference_id`, `score` (float64).

    Raises InputError with what is wrong.
    """
    matches = read_csv(path, COLUMNS)
    score = pd.to_numeric(matches["score"], errors="coerce").to_numpy(np.float64)
    finite = np.isfinite(score)
    if not finite.all():
        row = int(finite.argmin())
        raise InputError(
            f"{path}: score {matches['score'][row]!r} in line {row + 2} is not a finite number"
        )
    return matches.assign(score=score)


def check_matches(path):
    """Check a matching-track file against the challenge's rules; returns its line for the user.

    Plain UTF-8 with LF, exactly the three columns, each pair once, at most 10 rows per query over
    all 50,000 queries together. Raises InputError with what is wrong.
    """
    if path.is_file():
        check_text(path)
    matches = read_matches(path)
    for name in ROWS:
        check_form(matches[f"{name}_id"], name, path)
    repeated = matches.duplicated(["query_id", "reference_id"])
    if repeated.any():
        row = int(repeated.argmax())
        pair = ",".join(matches.loc[row, ["query_id", "reference_id"]])
        raise InputError(f"{path}: line {row + 2} repeats the pair {pair}; give each pair once")
    return f"{path}: {len(matches)} pairs of {matches['query_id'].nunique()} queries"


def check_text(path):
    """Raise InputError for what a csv's bytes show before it is parsed: its size, byte order mark,
    line ends, header, number of fields.
    """
    header = ",".join(COLUMNS)
    size = path.stat().st_size
    if size > MAX_LINE * (MAX_MATCHES + 1):
        raise InputError(
            f"{path}: {size} bytes, more than {MAX_MATCHES} rows take; give at most 10 per query "
            f"overall"
        )
    text = path.read_bytes()
    lines = text.count(b"\n") + (not text.endswith(b"\n"))
    if text.startswith(b"\xef\xbb\xbf"):
        raise InputError(f"{path}: starts with a byte order mark (BOM); save as plain UTF-8")
    if b"\r" in text:
        raise InputError(f"{path}: lines end in CR LF; save with LF alone")
    if text.partition(b"\n")[0] != header.encode():
        raise InputError(f"{path}: other columns; its first line must be {header}")
    if lines - 1 > MAX_MATCHES:
        raise InputError(
            f"{path}: {lines - 1} rows; give at most 10 per query overall, {MAX_MATCHES}"
        )
    if text.count(b",") != (len(COLUMNS) - 1) * lines:
        raise InputError(
            f"{path}: not {len(COLUMNS)} fields in every line; write {header} and nothing else"
        )


def track_of(path, track=None):
    """ "descriptor" or "matching", from the suffix; raises InputError where it contradicts
    `track`.
    """
    expected = TRACKS.get(path.suffix.lower())
    if expected is None and track is None:
        raise InputError(f"{path}: neither .h5 nor .csv; say --descriptor or --matching")
    if expected and track and expected != track:
        raise InputError(
            f"{path}: a {path.suffix} is for the {expected} track; use --{expected}, or another "
            f"file"
        )
    return track or expected


def add_submission_arguments(parser):
    """SUBMISSION, a path as `submission`, and its track, as add_track_flags."""
    parser.add_argument(
        "submission",
        type=Path,
        metavar="SUBMISSION",
        help=".h5 with descriptors, or .csv with matches",
    )
    add_track_flags(parser)


def add_track_flags(parser):
    """-m/--matching and -d/--descriptor, the published flags, as `track`."""
    track = parser.add_mutually_exclusive_group()
    for name in ("matching", "descriptor"):
        track.add_argument(
            f"-{name[0]}",
            f"--{name}",
            dest="track",
            action="store_const",
            const=name,
            help=f"SUBMISSION is for the {name} track (default: by its suffix)",
        )
