"""Reading anybody's image files: suffixes, formats, HEIC, size limit, 16 bits, EXIF, in one place.

The stages in exp/ keep a reader of their own, with the published preprocessing. It knows fewer
formats and ignores EXIF's orientation.
"""

import warnings
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import InputError

HEIC_SUFFIXES = (".heic", ".heif", ".hif")
SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
    *HEIC_SUFFIXES,
)
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftyphevx")  # bytes 4 to 11 of a file
MAX_PIXELS = 100_000_000  # a file that claims more is a decompression bomb
TILE_WIDTH = 322  # TIFF tags
TILE_LENGTH = 323


@cache
def formats():
    """The formats that may be opened: HEIC too, where pillow-heif is installed."""
    Image.init()  # here, since several threads must not do it at once
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def needs_heif(path):
    """Whether a file is HEIC, by its suffix or its first bytes, and pillow-heif is missing."""
    if "HEIF" in formats():
        return False
    return str(path).lower().endswith(HEIC_SUFFIXES) or starts_as_heic(path)


def starts_as_heic(path):
    """Whether the first bytes of a file say that it is HEIC, as those of a renamed one do."""
    try:
        with Path(path).open("rb") as file:
            return file.read(12).endswith(HEIC_BRANDS)
    except OSError:
        return False


@contextmanager
def open_checked(file):
    """Open a path or file object as a PIL image that is safe to decode, for the length of a block.

    Raises ValueError where it claims more than MAX_PIXELS, and what Pillow raises. Pillow's
    warnings about files that it can read are not shown.
    """
    with (
        warnings.catch_warnings(action="ignore"),
        Image.open(file, formats=formats()) as image,
    ):
        pixels_to_decode(image)
        yield image


def pixels_to_decode(image):
    """How many pixels decoding an opened image takes; raises ValueError for over MAX_PIXELS."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles may be larger than the image
    tile_pixels = tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)
    pixels = max(image.width * image.height, tile_pixels)
    if pixels > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{size}, more than {MAX_PIXELS} to decode")
    return pixels


def upright_rgb(image):
    """Decode an opened image as viewers show it: turned as EXIF says, mode RGB.

    16 bits are scaled to 8; convert() would clip them. Of an animation, the first frame is taken.
    """
    image.load()
    with suppress(Exception):  # damaged EXIF: viewers do not turn such an image either
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path):
    """The image of a file, upright and RGB. Raises InputError where it is unreadable."""
    try:
        with open_checked(path) as image:
            return upright_rgb(image)
    except Exception as error:  # file system, formats and decoders each fail in their own way
        if isinstance(error, UnidentifiedImageError) and needs_heif(path):
            remedy = "pip install pillow-heif"
            raise InputError(f"{path}: is HEIC, which needs a package; {remedy}") from error
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as an image ({reason})") from error
