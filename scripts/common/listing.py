"""The image files that a command line names: folders, single images, text files of paths."""

import codecs
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from common.errors import InputError
from common.files import shown
from common.images import SUFFIXES, starts_as_image

MAX_KINDS = 10  # of other files that are named


def list_files(places):
    """List the image files of all `places`, each real file once.

    Returns paths (str), for each place an int64 array of the numbers of its files, {folder: why it
    is unreadable}, and a Counter {suffix: number} of the other files in the folders. Raises
    InputError where there is no such place, or no image in it.
    """
    number_of_file = {}  # by each of its identities
    paths = []
    members = []
    unreadable = {}
    all_others = set()
    for place in places:
        place_paths, unreadable_folders, others = list_place(place)
        unreadable |= unreadable_folders
        all_others.update(others)
        numbers = []
        for path in place_paths:
            keys = identities(path)
            known = [number_of_file[key] for key in keys if key in number_of_file]
            number = known[0] if known else len(paths)
            if not known:
                paths.append(path)
            number_of_file.update(dict.fromkeys(keys, number))
            numbers.append(number)
        once = list(dict.fromkeys(numbers))
        members.append(np.array(once))
    return paths, members, unreadable, count_suffixes(all_others)


def identities(path):
    """What two paths of one file have in common: the real path, where symbolic links lead to it, or
    the number in the file system, where it has several names (hard links).

    Size and time of the last change stand beside that number, which some network file systems give
    to more than one file.
    """
    keys = [os.path.realpath(path)]
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return keys
    if status.st_ino:  # 0 where the file system has no such numbers
        keys.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return keys


def list_place(place):
    """The paths (str) that one argument of the command line names, in a fixed order; {folder: why
    it is unreadable}; and real paths of the other files in a folder.

    Raises InputError where there is nothing of that name, or no image in it.
    """
    unreadable = {}
    others = []
    if not Path(place).exists():
        raise InputError(f"{shown(place)}: no such file or folder; check the path")
    if Path(place).is_dir():
        paths, unreadable, others = images_below(place)
        problem = "a folder without images"
        if others:
            problem += f" ({describe_left_out(count_suffixes(others))})"
    elif is_image_name(place) or starts_as_image(place):
        return [place], unreadable, others
    else:
        paths = paths_listed_in(place)
        problem = "no image by its suffix, and no line of it is the path of a file"
    if not paths:
        remedy = "give a folder, an image, or a text file of paths, one a line"
        raise InputError(f"{shown(place)}: {problem}; {remedy}")
    return paths, unreadable, others


def count_suffixes(paths):
    """A Counter {suffix: number} of paths."""
    return Counter(map(suffix_of, paths))


def describe_left_out(left_out):
    """One line about a Counter {suffix: number} of files: "2 other files left out: .txt 1, ..."."""
    kinds = sorted(left_out.items(), key=lambda kind: (-kind[1], kind[0]))
    counts = [f"{shown(suffix or 'no suffix')} {number:,}" for suffix, number in kinds[:MAX_KINDS]]
    others = sum(number for _, number in kinds[MAX_KINDS:])
    if others:
        counts.append(f"others {others:,}")
    total = left_out.total()
    files = "file" if total == 1 else "files"
    return f"{total:,} other {files} left out: {', '.join(counts)}"


def images_below(folder):
    """Paths of the visible files below `folder` that have an image's suffix, or none and the first
    bytes of an image; each real folder once.

    Returns them sorted folder by folder, {folder: why it is unreadable}, and the real paths of the
    other visible files.
    """
    paths = []
    unreadable = {}
    others = []

    def note_unreadable(error):
        unreadable[error.filename] = error.strerror

    visited = set()
    for parent, folders, names in os.walk(folder, onerror=note_unreadable, followlinks=True):
        real_folder = os.path.realpath(parent)
        if real_folder in visited:  # symbolic links may lead in circles
            folders.clear()
            continue
        visited.add(real_folder)
        # By bytes, so that the order is the same in every locale.
        folders[:] = sorted(filter(is_visible, folders), key=os.fsencode)
        for name in sorted(filter(is_visible, names), key=os.fsencode):
            path = f"{parent.rstrip(os.sep)}{os.sep}{name}"
            suffix = suffix_of(name)
            if suffix in SUFFIXES or (not suffix and starts_as_image(path)):
                paths.append(path)
            else:
                others.append(f"{real_folder}{os.sep}{name}")
    return paths, unreadable, others


def is_visible(name):
    """Whether a file or folder of this name is not hidden."""
    return not name.startswith(".")


def suffix_of(name):
    """The suffix of a file name in lower case, with its dot; "" where it has none."""
    suffix = Path(name).suffix.lower()
    return "" if suffix == "." else suffix


def is_image_name(name):
    """Whether a file is an image by its suffix."""
    return suffix_of(name) in SUFFIXES


def paths_listed_in(file):
    """The paths in a text file, one a line or each ended by a NUL byte; none where no file exists
    of them.
    """
    content = Path(file).read_bytes()
    # Windows' text files begin with a byte order mark.
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", "replace").encode("utf-8", "replace")
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    encoding = sys.getfilesystemencoding()
    paths = []
    for line in lines:
        # os.fsdecode() would raise on Windows for bytes that are not UTF-8.
        path = line.decode(encoding, "surrogateescape")
        if path.strip():
            paths.append(path)
    # Path.is_file() raises for a line that is too long for a path; os.path.isfile() does not.
    return paths if any(map(os.path.isfile, paths)) else []
