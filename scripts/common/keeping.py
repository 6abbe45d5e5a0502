"""What is known of the files of a group of copies, and the one that is worth keeping.

Nothing here changes or deletes a file.
"""

import os
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from PIL import Image

from common.images import open_checked

ORIENTATION = 0x0112  # EXIF tag
ON_THEIR_SIDE = (5, 6, 7, 8)  # its values that swap width and height
PNG_SIGNATURE = 8  # bytes at the beginning of a PNG


@dataclass(frozen=True)
class FileDetails:
    """An image file: width and height in pixels, upright as viewers show it; size in bytes; when it
    was modified, in seconds since 1970 (UTC).
    """

    width: int
    height: int
    bytes: int
    modified: float

    @property
    def pixels(self):
        """How many pixels the image has."""
        return self.width * self.height

    @property
    def modified_text(self):
        """The local date and time of the modification, such as 2024-05-31 13:45."""
        try:
            return f"{datetime.fromtimestamp(self.modified):%Y-%m-%d %H:%M}"
        except (OSError, OverflowError, ValueError):  # a year that no calendar here has
            return f"{self.modified:.0f} seconds after 1970"

    @property
    def bytes_text(self):
        """The size of the file, such as 340 kB or 2.9 MB: a kB is 1000 bytes."""
        if self.bytes < 1000:
            return f"{self.bytes} bytes"
        if self.bytes < 999_500:  # more rounds to 1000 kB
            return f"{self.bytes / 1e3:.0f} kB"
        if self.bytes < 999_950_000:  # more rounds to 1000.0 MB
            return f"{self.bytes / 1e6:.1f} MB"
        return f"{self.bytes / 1e9:.1f} GB"


UNKNOWN = {field.name: None for field in fields(FileDetails)}


def file_details(path):
    """FileDetails of an image file, by its header only; None where it is unreadable."""
    try:
        status = os.stat(path)  # noqa: PTH116  (paths here are str, of any bytes)
        with open_checked(path) as image:
            width, height = image.size
            if is_on_its_side(image, path):
                width, height = height, width
    except Exception:  # file system, formats and decoders each fail in their own way
        return None
    return FileDetails(width, height, status.st_size, status.st_mtime)


def is_on_its_side(image, path):
    """Whether viewers show an opened image with its `size` swapped, as EXIF says; not decoded.

    Damaged EXIF turns nothing, as in upright_rgb.
    """
    if ORIENTATION in getattr(image, "tag_v2", {}):  # of a TIFF, whose size Pillow has swapped
        return False
    with suppress(Exception):
        # The method of PNG images would decode all pixels to see whether EXIF comes after them.
        exif = Image.Image.getexif(image)
        if image.format == "PNG" and ORIENTATION not in exif:
            chunk = exif_chunk(path)
            if chunk:
                exif.load(chunk)
        return exif.get(ORIENTATION) in ON_THEIR_SIDE
    return False


def exif_chunk(path):
    """The content of a PNG file's eXIf chunk, bytes; b"" where it has none."""
    with Path(path).open("rb") as file:
        file.seek(PNG_SIGNATURE)
        while True:
            header = file.read(8)
            if len(header) < 8:
                return b""
            length, kind = struct.unpack(">I4s", header)
            if kind == b"eXIf":
                return file.read(length)
            checksum = 4  # bytes
            file.seek(length + checksum, os.SEEK_CUR)


# ---- the one to keep ----

CRITERIA = (  # in the order in which they decide
    ("most pixels", lambda details: details.pixels),
    ("most bytes", lambda details: details.bytes),
    ("oldest", lambda details: -details.modified),
)


def choose_kept(paths, details):
    """The path to keep of a group of copies: most pixels, then most bytes, then oldest, then first.

    details: {path: FileDetails, or None where it is unreadable}. Unreadable files are kept only
    where all are.
    """
    return kept_and_reason(paths, details)[0]


def kept_and_reason(paths, details):
    """choose_kept's path, and what decided, such as "most pixels, then oldest"."""
    readable = [path for path in paths if details[path] is not None]
    if not readable:
        return paths[0], "none can be read"
    left = readable
    reasons = []
    for reason, value in CRITERIA:
        values = [value(details[path]) for path in left]
        best = max(values)
        if min(values) < best:
            reasons.append(reason)
            left = [path for path, own in zip(left, values, strict=True) if own == best]
    if reasons:
        return left[0], ", then ".join(reasons)
    if len(readable) == 1:
        return left[0], "the only one that can be read"
    return left[0], "first of equal files"


def group_record(number, paths):
    """A line of groups.jsonl, a dict: the group's number and files, the one to keep, and `details`.

    `details` has, for each file in the same order, path, width, height, bytes, and modified (in
    seconds since 1970); the last four are None where the file cannot be read.
    """
    details = {path: file_details(path) for path in paths}
    rows = []
    for path in paths:
        known = UNKNOWN
        if details[path] is not None:
            known = asdict(details[path])
        rows.append({"path": path, **known})
    return {
        "group": number,
        "files": list(paths),
        "keep": choose_kept(paths, details),
        "details": rows,
    }
