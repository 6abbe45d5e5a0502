"""Files that match.py never pairs: pairs judged not to be copies, files of one folder."""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import InputError
from common.files import as_path
from common.pairs import Excluded


def excluded_files(paths, digests, ignore_files, depth, places):
    """What --ignore and --not-within exclude, as Excluded, or None where they are not given.

    digests: SHA-256 of each file's content, 32 bytes or None; ignore_files: csv files of pairs;
    depth: of folders below `places`, or None. Raises InputError where a csv is unusable.
    """
    if not (ignore_files or depth):
        return None
    contents, _ = pd.factorize(np.array([digest or b"" for digest in digests], object))
    folders = np.full(len(paths), -1)
    if depth:
        folders = number_folders(paths, depth, places)
    ignored = set()
    for file in ignore_files:
        ignored |= ignored_contents(file, paths, digests, contents)
    return Excluded(contents, folders, ignored)


# ---- pairs judged not to be copies ----


def ignored_contents(file, paths, digests, contents):
    """The pairs of a csv of --ignore, as a set of pairs of numbers of contents.

    A file is known by its SHA-256, also after it was renamed; by its path where the csv has none.
    Pairs of other files are left out. Raises InputError where the csv is unusable.
    """
    content_of = {}
    for path, digest, content in zip(paths, digests, contents.tolist(), strict=True):
        content_of[os.path.realpath(path)] = content
        if digest:
            content_of[digest.hex()] = content
    table = read_pairs(file)
    pairs = set()
    for row in table.to_dict("records"):
        query = content_of.get(row["query_sha256"].lower() or real_path(row["query"]))
        reference = content_of.get(row["reference_sha256"].lower() or real_path(row["reference"]))
        if query is not None and reference is not None:
            pairs.add((query, reference))
    return pairs


def real_path(name):
    """The real path of a file that a csv names, in UTF-8 whatever the locale; None of nonsense."""
    try:
        return os.path.realpath(as_path(name))
    except ValueError:  # a NUL byte
        return None


def read_pairs(file):
    """A csv of pairs as a DataFrame of str: query, reference, query_sha256, reference_sha256.

    What the csv does not have is "". Raises InputError where it is unreadable or has neither paths
    nor SHA-256.
    """
    try:
        table = pd.read_csv(
            file,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            encoding_errors="surrogateescape",
            index_col=False,  # else a row with a field too many would shift all others
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: is not a readable csv ({reason})") from None
    for side in ("query", "reference"):
        if not {side, f"{side}_sha256"} & set(table.columns):
            remedy = "give a csv of match.py, or of the button on its page"
            raise InputError(f"{file}: has no column {side} or {side}_sha256; {remedy}")
    columns = ["query", "reference", "query_sha256", "reference_sha256"]
    return table.reindex(columns=columns, fill_value="")


# ---- folders ----


def number_folders(paths, depth, places):
    """For each path the number of its folder `depth` levels below one of `places`, (n,) int64.

    -1 for a file that lies less deep, or below none of them.
    """
    roots = [Path(place).absolute() for place in places]
    folders = [folder_at_depth(Path(path).absolute(), roots, depth) for path in paths]
    numbers, _ = pd.factorize(np.array(folders, object))  # None becomes -1
    return numbers


def folder_at_depth(path, roots, depth):
    """The folder, str, `depth` levels below the one of `roots` that a path is in, or None."""
    for root in roots:
        if not path.is_relative_to(root):
            continue
        folders = path.relative_to(root).parts[:-1]
        if len(folders) >= depth:
            return str(root.joinpath(*folders[:depth]))
    return None
