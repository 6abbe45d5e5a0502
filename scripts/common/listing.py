"""The image files that a command line names: folders, single images, text files of paths."""

import os
import sys
from pathlib import Path

import numpy as np

from common.errors import InputError
from common.files import shown
from common.images import SUFFIXES


def list_files(places):
    """List the image files of all `places`, each real file once.

    Returns paths (str), for each place an int64 array of the numbers of its files, and {folder: why
    it is unreadable}. Raises InputError where there is no such place, or no image in it.
    """
    number_of_file = {}  # by real path
    paths = []
    members = []
    unreadable = {}
    for place in places:
        place_paths, unreadable_folders = list_place(place)
        unreadable |= unreadable_folders
        numbers = []
        for path in place_paths:
            real_path = os.path.realpath(path)
            if real_path not in number_of_file:
                number_of_file[real_path] = len(paths)
                paths.append(path)
            numbers.append(number_of_file[real_path])
        once = list(dict.fromkeys(numbers))
        members.append(np.array(once))
    return paths, members, unreadable


def list_place(place):
    """The paths (str) that one argument of the command line names, in a fixed order, and {folder:
    why it is unreadable}.

    Raises InputError where there is nothing of that name, or no image in it.
    """
    unreadable = {}
    if not Path(place).exists():
        raise InputError(f"{shown(place)}: no such file or folder; check the path")
    if Path(place).is_dir():
        paths, unreadable = images_below(place)
        problem = "a folder without images"
    elif is_image_name(place):
        return [place], {}
    else:
        paths = paths_listed_in(place)
        problem = "no image by its suffix, and no line of it is the path of a file"
    if not paths:
        remedy = "give a folder, an image, or a text file of paths, one a line"
        raise InputError(f"{shown(place)}: {problem}; {remedy}")
    return paths, unreadable


def images_below(folder):
    """Paths of the visible files below `folder` that have an image's suffix, each real folder once.

    Returns them sorted folder by folder, and {folder: why it is unreadable}.
    """
    paths = []
    unreadable = {}

    def note_unreadable(error):
        unreadable[error.filename] = error.strerror

    visited = set()
    for parent, folders, names in os.walk(folder, onerror=note_unreadable, followlinks=True):
        real_folder = os.path.realpath(parent)
        if real_folder in visited:  # symbolic links may lead in circles
            folders.clear()
            continue
        visited.add(real_folder)
        folders[:] = sorted(name for name in folders if is_visible(name))
        for name in sorted(names):
            if is_visible(name) and is_image_name(name):
                paths.append(f"{parent.rstrip(os.sep)}{os.sep}{name}")
    return paths, unreadable


def is_visible(name):
    """Whether a file or folder of this name is not hidden."""
    return not name.startswith(".")


def is_image_name(name):
    """Whether a file is an image by its suffix."""
    return name.lower().endswith(SUFFIXES)


def paths_listed_in(file):
    """The paths in a text file, one a line or each ended by a NUL byte; none where no file exists
    of them.
    """
    content = Path(file).read_bytes()
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
