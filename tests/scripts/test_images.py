"""Reading anybody's image files, and where the stages' own reader agrees and differs."""

import importlib.util
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

import v107
from common import images
from common.errors import InputError

EXIF_ORIENTATION = 0x0112
LIMIT = images.MAX_PIXELS
FORMATS = {
    ".avif": "AVIF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
    ".jfif": "JPEG",
    ".jp2": "JPEG2000",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".png": "PNG",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
WITHOUT_LOSS = ("BMP", "JPEG2000", "PNG", "PPM", "TIFF")
needs_pillow_heif = pytest.mark.skipif(
    not importlib.util.find_spec("pillow_heif"), reason="needs pillow-heif"
)


def gradient(width=96, height=64):
    """A smooth image, so that lossy formats change it little, and no symmetric one."""
    across = np.linspace(0, 255, width)[None, :]
    down = np.linspace(0, 255, height)[:, None]
    channels = [across + 0 * down, 0 * across + down, (across + down) / 2]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def noise(mode, alpha=255):
    """An image of random colors and the given opacity, converted to a mode."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 4), dtype=np.uint8)
    pixels[..., 3] = alpha
    image = Image.fromarray(pixels, "RGBA")
    if "A" not in mode:
        image = image.convert("RGB")  # a palette from RGBA would have transparent entries
    return image.convert(mode)


def png_header(width, height):
    """The first bytes of a PNG that claims so many pixels, and holds none."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    length = (13).to_bytes(4, "big")
    checksum = zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + length + header + checksum + bytes(4) + b"IDAT"


def tiff_header(size, tile_size):
    """The first bytes of a TIFF whose tiles are of another size than the image; sides in pixels."""
    tags = {
        256: size,  # width
        257: size,  # height
        258: 8,  # bits a sample
        259: 1,  # not compressed
        262: 1,  # gray
        322: tile_size,  # width of a tile
        323: tile_size,  # height of a tile
        324: 200,  # where the tile begins
        325: tile_size**2,  # its bytes
    }
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + bytes(100)


# ---- formats ----


def test_the_table_above_names_every_suffix():
    assert sorted(FORMATS) == sorted(images.SUFFIXES)


@pytest.mark.parametrize(
    "suffix",
    [pytest.param(s, marks=needs_pillow_heif if f == "HEIF" else ()) for s, f in FORMATS.items()],
)
def test_every_suffix_is_read(tmp_path, suffix):
    images.formats()  # registers the HEIF writer too
    file = tmp_path / f"image{suffix}"
    gradient().save(file, FORMATS[suffix])
    image = images.open_image(file)
    assert image.mode == "RGB" and image.size == (96, 64)
    error = np.abs(np.asarray(image, float) - np.asarray(gradient(), float))
    if FORMATS[suffix] in WITHOUT_LOSS:
        assert error.max() == 0
    else:
        assert error.mean() < 8


def test_content_decides_not_the_suffix(tmp_path):
    gradient().save(tmp_path / "image.jpg", "PNG")
    assert np.array_equal(images.open_image(tmp_path / "image.jpg"), gradient())


@pytest.mark.parametrize("other", ["EPS", "ICO", "PCX", "TGA"])
def test_other_formats_are_not_opened(tmp_path, other):
    noise("RGB").save(tmp_path / "image.png", other)
    with pytest.raises(InputError, match="cannot identify"):
        images.open_image(tmp_path / "image.png")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("phone.heic", b"", True),
        ("PHONE.HIF", b"", True),
        ("renamed.jpg", b"\0\0\0\x18ftypheic\0\0\0\0", True),
        ("image.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF\0", False),
        ("image.avif", b"\0\0\0\x1cftypavif\0\0\0\0", False),
        ("missing.jpg", None, False),
    ],
)
def test_heic_without_pillow_heif_is_recognized(tmp_path, monkeypatch, name, content, expected):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images.formats.cache_clear()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    try:
        assert images.needs_heif(tmp_path / name) == expected
    finally:
        images.formats.cache_clear()


@needs_pillow_heif
def test_with_pillow_heif_nothing_needs_it():
    assert not images.needs_heif("phone.heic")


# ---- size limit ----


@pytest.mark.parametrize(
    ("content", "pixels"),
    [
        (png_header(300, 200), 60_000),
        (png_header(10_000, 10_000), LIMIT),  # Pillow would warn
        (tiff_header(16, tile_size=10_000), LIMIT),
    ],
    ids=["PNG", "PNG at the limit", "TIFF's tile at the limit"],
)
def test_up_to_the_limit_is_opened_without_a_warning(tmp_path, content, pixels):
    (tmp_path / "image").write_bytes(content)
    with (
        warnings.catch_warnings(action="error"),
        images.open_checked(tmp_path / "image") as image,
    ):
        assert images.pixels_to_decode(image) == pixels


TOO_LARGE = {
    "PNG": png_header(10_001, 10_000),
    "PNG over twice the limit": png_header(30_000, 10_000),
    "TIFF's tile": tiff_header(16, tile_size=10_001),
}


@pytest.mark.parametrize("content", TOO_LARGE.values(), ids=TOO_LARGE)
def test_above_the_limit_is_not_decoded(tmp_path, content):
    (tmp_path / "image").write_bytes(content)
    with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"):
        images.open_image(tmp_path / "image")


# ---- pixels ----


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    pixels = np.asarray(images.open_image(tmp_path / f"deep.{suffix}"))
    for channel in range(3):
        assert np.array_equal(pixels[..., channel], deep >> 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(tmp_path, mode):
    noise(mode, alpha=0).save(tmp_path / "image.png")
    assert np.array_equal(images.open_image(tmp_path / "image.png"), noise(mode).convert("RGB"))


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_viewers_do(tmp_path, orientation):
    """The file holds the inverse of the turn that EXIF orders; 0 and 9 order none."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = gradient()
    if orientation in inverse:
        stored = stored.transpose(inverse[orientation])
    stored.save(tmp_path / "turned.png", exif=exif_of(orientation))
    assert np.array_equal(images.open_image(tmp_path / "turned.png"), gradient())


def exif_of(orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


def test_damaged_exif_turns_nothing(tmp_path):
    gradient().save(tmp_path / "image.png", exif=b"Exif\0\0nonsense")
    assert np.array_equal(images.open_image(tmp_path / "image.png"), gradient())


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff", "webp"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    colors = ["white", "black", "white"]
    first, *others = [Image.new("RGB", (48, 32), color) for color in colors]
    first.save(tmp_path / f"frames.{suffix}", save_all=True, append_images=others)
    with Image.open(tmp_path / f"frames.{suffix}") as file:
        assert file.n_frames == 3
    assert np.array_equal(images.open_image(tmp_path / f"frames.{suffix}"), first)


# ---- the stages' reader ----

SAME_PIXELS = [
    ("PNG", "RGB"),
    ("PNG", "L"),
    ("PNG", "P"),
    ("JPEG", "RGB"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("TIFF", "RGB"),
    ("TIFF", "L"),
    ("TIFF", "CMYK"),
    ("TIFF", "P"),
    ("BMP", "RGB"),
    ("BMP", "L"),
    ("BMP", "P"),
    ("GIF", "P"),
    ("WEBP", "RGB"),
]


@pytest.mark.parametrize(("file_format", "mode"), SAME_PIXELS)
def test_the_stages_read_the_same_pixels(tmp_path, file_format, mode):
    """Of images of 8 bits a channel without transparency and EXIF orientation."""
    file = tmp_path / "image"
    noise(mode).save(file, file_format)
    with Image.open(file) as stored:
        assert stored.mode == mode
    expected = np.asarray(images.open_image(file))
    assert np.array_equal(v107.open_image(file), expected)
    assert np.array_equal(v107.read_pixels(file), expected)


UNREADABLE = None
SMALL_VALUES = np.arange(200).reshape(10, 20)  # within 8 bits, for the modes of 32 bits


def turned(path):
    stored = gradient().transpose(Image.Transpose.ROTATE_90)
    stored.save(path, "PNG", exif=exif_of(6))


def write_heif(path):
    images.formats()
    gradient().save(path, "HEIF", quality=95)


# What differs by intent: (write the file, what the stages read, what scripts/ read).
DIFFERENCES = {
    "EXIF orientation": (
        turned,
        gradient().transpose(Image.Transpose.ROTATE_90),
        gradient(),
    ),
    "HEIC": (write_heif, UNREADABLE, gradient()),
    "AVIF": (lambda path: gradient().save(path, "AVIF", quality=95), UNREADABLE, gradient()),
    "JPEG 2000": (lambda path: gradient().save(path, "JPEG2000"), UNREADABLE, gradient()),
    "PPM": (lambda path: gradient().save(path, "PPM"), UNREADABLE, gradient()),
    "32-bit integers": (
        lambda path: Image.fromarray(SMALL_VALUES.astype(np.int32)).save(path, "TIFF"),
        UNREADABLE,  # never black or white
        Image.fromarray(SMALL_VALUES.astype(np.uint8)).convert("RGB"),
    ),
    "32-bit floats": (
        lambda path: Image.fromarray(SMALL_VALUES.astype(np.float32)).save(path, "TIFF"),
        UNREADABLE,  # never black or white
        Image.fromarray(SMALL_VALUES.astype(np.uint8)).convert("RGB"),
    ),
    # So far both drop alpha, and both have the same limit.
    "alpha": (
        lambda path: noise("RGBA", alpha=0).save(path, "PNG"),
        noise("RGB"),
        noise("RGB"),
    ),
    "size limit": (
        lambda path: path.write_bytes(png_header(10_001, 10_000)),
        UNREADABLE,
        UNREADABLE,
    ),
}
LOSSY = ("HEIC", "AVIF")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # of the stages' reader
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=needs_pillow_heif if n == "HEIC" else ()) for n in DIFFERENCES],
)
def test_where_the_stages_differ(tmp_path, name):
    write, of_stages, of_scripts = DIFFERENCES[name]
    write(tmp_path / "image")
    tolerance = 8 if name in LOSSY else 0
    assert_reads(v107.open_image, tmp_path / "image", of_stages, v107.InputError, tolerance)
    assert_reads(images.open_image, tmp_path / "image", of_scripts, ValueError, tolerance)


def assert_reads(open_image, path, expected, error, tolerance):
    """The pixels of the `expected` image within a mean tolerance, or `error` where UNREADABLE."""
    if expected is UNREADABLE:
        with pytest.raises(error):
            open_image(path)
        return
    image = open_image(path)
    assert image.mode == "RGB" and image.size == expected.size
    difference = np.asarray(image, float) - np.asarray(expected, float)
    assert np.abs(difference).mean() <= tolerance
