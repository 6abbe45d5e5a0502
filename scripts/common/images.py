"""Reading anybody's image files: suffixes, formats, HEIC, size limit, EXIF, cut files, in one
place.

common/pixels.py has what becomes of the pixels, common/cut_files.py how much of a file is missing.
The stages in exp/ keep a reader of their own, with the published preprocessing. It knows fewer
formats, drops transparency and ignores EXIF's orientation.
"""

import io
import re
import warnings
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common import pixels
from common.cut_files import lacks_only_the_end, why_cut, with_end_marker
from common.errors import InputError

# Those that the stages in exp/ read.
STAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HEIC_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")
SUFFIXES = (
    *STAGE_SUFFIXES,
    *HEIC_SUFFIXES,
    *(".apng", ".avif", ".avifs", ".dib", ".jfif", ".jpe", ".mpo"),
    *(".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),  # JPEG 2000
    *(".pbm", ".pfm", ".pgm", ".pnm", ".ppm"),
)
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
FIRST_BYTES = 32  # of a file, which tell its format
HEIC_START = re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
IMAGE_START = re.compile(
    rb"\xff\xd8\xff"  # JPEG
    rb"|\x89PNG\r\n\x1a\n"
    rb"|GIF8[79]a"
    rb"|RIFF....WEBP"
    rb"|II[*+]\0|MM\0[*+]"  # TIFF
    rb"|....ftyp(hei[cxms]|hev[cxms]|mif1|msf1|avi[fs])"  # HEIC, AVIF
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"  # JPEG 2000
    rb"|BM....\0\0\0\0....[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"
    rb"|P[1-6fF]\s+(#|\d+\s+\d+\s)",  # PPM, PGM, PBM, PFM
    re.DOTALL,
)
MAX_PIXELS = 100_000_000  # a file that claims more is a decompression bomb
TILE_WIDTH = 322  # TIFF tags
TILE_LENGTH = 323

# How far from the median color pixels are that are content, in levels of 255: see has_content.
FAR = 48
FAR_SHARE = 1e-4
CELLS = 32  # a side
CELL_FAR = 10
FAR_CELLS = 10


class NoImage(ValueError):
    """A file that is complete, and of no use; the message says why."""


class NoContent(NoImage):
    """An image that has nothing to compare."""


# ---- formats ----


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
    return str(path).lower().endswith(HEIC_SUFFIXES) or starts_as(HEIC_START, path)


def starts_as_image(path):
    """Whether a file's first bytes are those of an image format, known by suffix or not."""
    return starts_as(IMAGE_START, path)


def starts_as(pattern, path):
    """Whether a regular file's first bytes match a pattern."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            return False
        with Path(path).open("rb") as file:
            return pattern.match(file.read(FIRST_BYTES)) is not None
    except (OSError, ValueError):
        return False


# ---- decoding ----


@contextmanager
def open_checked(file):
    """Open a path or file object as a PIL image that is safe to decode, for the length of a block.

    Raises NoImage where it claims more than MAX_PIXELS, and what Pillow raises. Pillow's warnings
    about files that it can read are not shown.
    """
    if not hasattr(file, "read"):
        # Opened here, the file stays open when Pillow has decoded it: see `load`.
        with Path(file).open("rb") as opened, open_checked(opened) as image:
            yield image
        return
    with (
        warnings.catch_warnings(action="ignore"),
        Image.open(file, formats=formats()) as image,
    ):
        pixels_to_decode(image)
        yield image


def pixels_to_decode(image):
    """How many pixels decoding an opened image takes; raises NoImage for over MAX_PIXELS."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles may be larger than the image
    tile_pixels = tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)
    number = max(image.width * image.height, tile_pixels)
    if number > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise NoImage(f"{size}, more than {MAX_PIXELS} to decode")
    return number


def upright_rgb(image):
    """Decode an opened image as viewers show it: turned as EXIF says, mode RGB, on white where it
    is transparent.

    More than 8 bits are scaled to 8; convert() would clip them. Of an animation, the first frame is
    taken.
    """
    return decode(image)[0]


def decode(image):
    """As upright_rgb, and what is wrong with the file though it is read all the same, in a few
    words, or None.
    """
    file = image.fp
    pixels.mend_byte_order(image)
    raw_mode = pixels.raw_mode(image)
    image, warning = load(image, file)
    if pixels.is_dark_rgb(image, raw_mode):
        pixels.brighten_dark_rgb(image, file, raw_mode)
    with suppress(Exception):  # damaged EXIF: viewers do not turn such an image either
        ImageOps.exif_transpose(image, in_place=True)
    pixels.scale_transparent_color(image, raw_mode)
    if pixels.is_deep(image):
        image = pixels.gray_of_deep(image)
    return pixels.rgb_on_white(image), warning


def load(image, file):
    """Decode an opened image from its file object; returns it, and a warning or None, as decode.

    A JPEG that lacks its end, and next to nothing else, is decoded up to there, as viewers do.
    """
    try:
        image.load()
    except OSError:
        if image.format not in ("JPEG", "MPO"):
            raise
        file.seek(0)
        content = file.read()
        if not lacks_only_the_end(content):
            raise
    else:
        return image, None
    mended = Image.open(io.BytesIO(with_end_marker(content)), formats=["JPEG"])
    mended.draft(None, image.size)
    mended.load()
    return mended, "lacks its end marker; read all the same"


def open_image(path):
    """The image of a file, upright and RGB. Raises InputError where it is unreadable."""
    try:
        with open_checked(path) as image:
            return upright_rgb(image)
    except Exception as error:  # file system, formats and decoders each fail in their own way
        if isinstance(error, UnidentifiedImageError) and needs_heif(path):
            remedy = "pip install pillow-heif"
            raise InputError(f"{path}: is HEIC, which needs a package; {remedy}") from error
        reason = why_unreadable(error, path)
        raise InputError(f"{path}: cannot be read as an image ({reason})") from error


# ---- what is wrong with a file ----


def has_content(image):
    """Whether an image, RGB, shows anything but one color, noise or a slight gradient.

    It does where in a channel 1 of 10,000 pixels is more than 48 levels of 255 from the median
    (stars, a line of text), or where of its means over a grid of 32 x 32 cells, that noise hardly
    moves, 10 are more than 10 levels from theirs (fog, snow). Of 1,000 photographs the flattest has
    370 such pixels of 10,000, and 100 cells that far; plain colors with noise of a standard
    deviation of 8 have none, nor have gradients of 20 levels from side to side.
    """
    levels = np.arange(256)
    number = image.width * image.height
    for counts in np.reshape(image.histogram(), (3, 256)):
        median = np.searchsorted(counts.cumsum(), number / 2)
        if counts[abs(levels - median) > FAR].sum() > FAR_SHARE * number:
            return True
    cells = image.resize((CELLS, CELLS), Image.Resampling.BOX)
    means = np.asarray(cells, np.float32).reshape(-1, 3)
    distances = abs(means - np.median(means, axis=0)).max(axis=1)
    return bool((distances > CELL_FAR).sum() >= FAR_CELLS)


def check_content(image):
    """Raise NoContent where an image, RGB, has none to compare."""
    if not has_content(image):
        raise NoContent("is nearly one color: has nothing to compare")


def why_unreadable(error, path):
    """Why a file is unreadable whose reading ended in an error, in a few words."""
    if not isinstance(error, (NoImage, Image.DecompressionBombError)):
        reason = why_file_cut(path)
        if reason:
            return reason
    if isinstance(error, UnidentifiedImageError):
        if needs_heif(path):
            return "HEIC needs pillow-heif: pip install pillow-heif"
        return why_unidentified(path)
    return in_one_line(error)


def why_file_cut(path):
    """How much is missing of an image file, in a few words; None where nothing is, or that cannot
    be known.
    """
    if not starts_as_image(path):
        return None
    try:
        return why_cut(Path(path).read_bytes())
    except Exception:  # damaged files fail in their own ways; then the first error counts
        return None


def why_unidentified(path):
    """Why Pillow does not open a file, in a few words."""
    for name in formats():
        opener, accepts = Image.OPEN[name]
        with suppress(OSError), Path(path).open("rb") as file:
            if name == "DIB" or accepts(file.read(FIRST_BYTES)) is not True:
                continue
            file.seek(0)
            try:
                opener(file, "")
            except Exception as error:  # each format fails in its own way
                return f"{name} that cannot be read ({in_one_line(error)}); convert it"
    return f"no image in a known format ({', '.join(formats())})"


def in_one_line(error):
    """The text of an error, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
