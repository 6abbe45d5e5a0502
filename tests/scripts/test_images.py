"""Reading anybody's image files, and where the stages' own reader agrees and differs."""

import importlib.util
import io
import re
import struct
import sys
import warnings
import zlib

import cv2
import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image, ImageDraw

import v107
from common import images, page, pixels
from common.errors import InputError

EXIF_ORIENTATION = 0x0112
LIMIT = images.MAX_PIXELS
FORMATS = {
    ".apng": "PNG",
    ".avif": "AVIF",
    ".avifs": "AVIF",
    ".bmp": "BMP",
    ".dib": "DIB",
    ".gif": "GIF",
    ".heic": "HEIF",
    ".heics": "HEIF",
    ".heif": "HEIF",
    ".heifs": "HEIF",
    ".hif": "HEIF",
    ".j2c": "JPEG2000",
    ".j2k": "JPEG2000",
    ".jfif": "JPEG",
    ".jp2": "JPEG2000",
    ".jpc": "JPEG2000",
    ".jpe": "JPEG",
    ".jpeg": "JPEG",
    ".jpf": "JPEG2000",
    ".jpg": "JPEG",
    ".jpx": "JPEG2000",
    ".mpo": "MPO",
    ".pbm": "PPM",
    ".pfm": "PPM",
    ".pgm": "PPM",
    ".png": "PNG",
    ".pnm": "PPM",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
WITHOUT_LOSS = ("BMP", "DIB", "JPEG2000", "PNG", "PPM", "TIFF")
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
    with pytest.raises(InputError, match="no image in a known format"):
        images.open_image(tmp_path / "image.png")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("phone.heic", b"", True),
        ("PHONE.HIF", b"", True),
        ("renamed.jpg", b"\0\0\0\x18ftypheic\0\0\0\0", True),
        ("burst.jpg", b"\0\0\0\x18ftypmsf1\0\0\0\0", True),
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


INK = np.zeros((24, 32), bool)  # what is opaque below
INK[6:18, 10:14] = True
INK[14:18, 10:24] = True


def png(width, height, depth, color_type, rows, transparent):
    """The bytes of a PNG with a tRNS chunk; rows (height, bytes) uint8."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [
        chunk(b"IHDR", header),
        chunk(b"tRNS", transparent),
        chunk(b"IDAT", zlib.compress(data)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write_rgba(path, file_format, **options):
    """Black on a transparent black ground."""
    pixels = np.zeros((*INK.shape, 4), np.uint8)
    pixels[..., 3] = INK * 255
    Image.fromarray(pixels).save(path, file_format, **options)


def write_animation(path, file_format):
    pixels = np.zeros((*INK.shape, 4), np.uint8)
    pixels[..., 3] = INK * 255
    later = Image.new("RGBA", INK.shape[::-1], "red")
    Image.fromarray(pixels).save(path, file_format, save_all=True, append_images=[later])


def write_gray_alpha(path):
    pixels = np.stack([0 * INK, 255 * INK], axis=2).astype(np.uint8)
    Image.fromarray(pixels, "LA").save(path, "PNG")


def write_palette(path):
    """Entry 7 of the palette, a green, is transparent."""
    image = Image.fromarray(np.where(INK, 3, 7).astype(np.uint8), "P")
    image.putpalette([0, 0, 0] * 7 + [0, 200, 0])
    image.save(path, "PNG", transparency=7)


def write_gray_key(path, depth):
    """Gray of 1 to 16 bits; its greatest value is transparent."""
    greatest = 2**depth - 1
    values = np.where(INK, 0, greatest)
    if depth == 16:
        rows = values.astype(">u2").view(np.uint8)
    else:
        bits = values[..., None] >> np.arange(depth)[::-1] & 1
        rows = np.packbits(bits.reshape(len(values), -1).astype(np.uint8), axis=1)
    height, width = INK.shape
    path.write_bytes(png(width, height, depth, 0, rows, struct.pack(">H", greatest)))


def write_color_key(path, depth):
    """RGB of 8 or 16 bits; an orange is transparent."""
    color = np.array([250, 130, 20]) * (257 if depth == 16 else 1)
    values = np.where(INK[..., None], 0, color)
    rows = values.astype(">u2" if depth == 16 else np.uint8).reshape(len(values), -1)
    height, width = INK.shape
    key = struct.pack(">HHH", *color.tolist())
    path.write_bytes(png(width, height, depth, 2, np.ascontiguousarray(rows).view(np.uint8), key))


def write_tiff(path, samples, extra):
    """Transparent black with alpha as TIFF has it; extra: 1 premultiplied, 2 not."""
    alpha = INK * 255
    channels = [0 * INK] * (samples - 1) + [alpha]
    pixels = np.stack(channels, axis=2).astype(np.uint8)
    photometric = "rgb" if samples == 4 else "minisblack"
    tifffile.imwrite(path, pixels, photometric=photometric, extrasamples=[extra])


TRANSPARENT = {
    "PNG RGBA": lambda path: write_rgba(path, "PNG"),
    "PNG LA": write_gray_alpha,
    "PNG P": write_palette,
    "PNG gray key, 1 bit": lambda path: write_gray_key(path, 1),
    "PNG gray key, 2 bits": lambda path: write_gray_key(path, 2),
    "PNG gray key, 4 bits": lambda path: write_gray_key(path, 4),
    "PNG gray key, 8 bits": lambda path: write_gray_key(path, 8),
    "PNG gray key, 16 bits": lambda path: write_gray_key(path, 16),
    "PNG RGB key, 8 bits": lambda path: write_color_key(path, 8),
    "PNG RGB key, 16 bits": lambda path: write_color_key(path, 16),
    "PNG animation": lambda path: write_animation(path, "PNG"),
    "GIF": lambda path: write_rgba(path, "GIF"),
    "GIF animation": lambda path: write_animation(path, "GIF"),
    "WEBP": lambda path: write_rgba(path, "WEBP", lossless=True, exact=True),
    "WEBP animation": lambda path: write_animation(path, "WEBP"),
    "JPEG 2000": lambda path: write_rgba(path, "JPEG2000"),
    "AVIF": lambda path: write_rgba(path, "AVIF", quality=95),
    "TIFF RGBA": lambda path: write_tiff(path, 4, 2),
    "TIFF RGBA premultiplied": lambda path: write_tiff(path, 4, 1),
    "TIFF LA": lambda path: write_tiff(path, 2, 2),
    "TIFF LA premultiplied": lambda path: write_tiff(path, 2, 1),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_parts_are_white(tmp_path, kind):
    TRANSPARENT[kind](tmp_path / "image")
    expected = np.where(INK, 0, 255)[..., None].repeat(3, axis=2)
    actual = np.asarray(images.open_image(tmp_path / "image"), int)
    lossy = kind in ("AVIF", "WEBP animation")
    assert np.abs(actual - expected).mean() <= (6 if lossy else 0)


@pytest.mark.parametrize("kind", ["PNG RGBA", "PNG P", "GIF", "WEBP"])
def test_thumbnails_of_transparent_images_are_white(tmp_path, kind):
    TRANSPARENT[kind](tmp_path / "image")
    pixels = np.asarray(page.read_thumbnail(tmp_path / "image"))
    assert (pixels[0] == 255).all() and (pixels[INK] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "PA", "La"])
def test_half_transparent_is_half_white(mode):
    dark = Image.new("RGBA", (8, 8), (40, 40, 40, 128))
    if mode in ("LA", "La", "PA"):
        dark = dark.convert("LA")
    if mode == "PA":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, 40, 40, 40])
        palette.putalpha(Image.new("L", (8, 8), 128))
        dark = palette
    result = np.asarray(pixels.rgb_on_white(dark.convert(mode)), int)
    assert np.abs(result - (40 * 128 + 255 * 127) / 255).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_opaque_alpha_channel_changes_nothing(tmp_path, mode):
    noise(mode).save(tmp_path / "image.png")
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


# ---- more than 8 bits ----


def shades(width=128, height=96):
    """Gray from 0 to 255 in a smooth pattern, uint8."""
    across = np.linspace(0, 9, width)[None, :]
    down = np.linspace(0, 5, height)[:, None]
    values = np.sin(across) * np.cos(down) + down / 3
    values -= values.min()
    return (values / values.max() * 255).astype(np.uint8)


GRAY = shades().astype(np.float64)
DEEP = {  # {kind: (values, dtype)}, each the scaled GRAY
    "float 0 to 1": (GRAY / 255, "f4"),
    "float 0 to 1, dim": (GRAY / 255 * 0.01, "f4"),
    "float, overshooting 0 to 1": (GRAY / 255 * 1.04 - 0.02, "f4"),
    "float 0 to 255": (GRAY, "f4"),
    "float 0 to 4095": (GRAY * 4095 / 255, "f4"),
    "float 0 to 65535": (GRAY * 257, "f4"),
    "float -1 to 1": (GRAY / 127.5 - 1, "f4"),
    "float, huge": (GRAY * 1e20, "f4"),
    "float, far from 0": (GRAY + 1e6, "f4"),
    "uint16, 8 bits": (GRAY, "u2"),
    "uint16, 10 bits": (GRAY * 4, "u2"),
    "uint16, 12 bits": (GRAY * 16, "u2"),
    "uint16, 14 bits": (GRAY * 64, "u2"),
    "uint16": (GRAY * 257, "u2"),
    "int16": (GRAY * 257 - 32768, "i2"),
    "int16, positive": (GRAY * 128, "i2"),
    "int16, 12 bits": (GRAY * 16, "i2"),
    "int32, 8 bits": (GRAY, "i4"),
    "int32, 16 bits": (GRAY * 257, "i4"),
    "int32, 20 bits": (GRAY * 4112, "i4"),
    "int32, 31 bits": (GRAY * 8421504, "i4"),
    "int32, negative": (GRAY * 8421504 - 2**30, "i4"),
    "uint32, 32 bits": (GRAY * 16843009, "u4"),
}


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("kind", "byteorder"),
    # Big-endian uint32 is in test_what_pillow_does_not_read_is_named.
    [(kind, order) for kind in DEEP for order in "<>" if kind + order != "uint32, 32 bits>"],
)
def test_deep_tiffs_are_scaled_to_8_bits(tmp_path, kind, byteorder, compression):
    values, dtype = DEEP[kind]
    tifffile.imwrite(
        tmp_path / "deep.tif",
        values.astype(dtype),
        byteorder=byteorder,
        compression=compression,
        photometric="minisblack",
    )
    image = np.asarray(images.open_image(tmp_path / "deep.tif"), float)
    error = np.abs(image - GRAY[..., None])
    assert error.max() <= (8 if "overshooting" in kind else 1)


PILLOW_WRITES = {
    "<u2": ["tif", "png", "pgm", "jp2"],
    ">u2": ["tif", "png", "jp2"],
    "i4": ["tif", "pgm"],
    "f4": ["tif", "pfm"],
}


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [(dtype, suffix) for dtype, suffixes in PILLOW_WRITES.items() for suffix in suffixes],
)
def test_deep_images_that_pillow_writes(tmp_path, dtype, suffix):
    values = GRAY / 255 if dtype == "f4" else GRAY * 257
    Image.fromarray(values.astype(dtype)).save(tmp_path / f"deep.{suffix}")
    result = np.asarray(images.open_image(tmp_path / f"deep.{suffix}"), float)
    assert np.abs(result - GRAY[..., None]).max() <= 1


def test_gray_of_12_bits_a_sample_in_a_netpbm(tmp_path):
    values = (GRAY * 16).astype(">u2")
    (tmp_path / "deep.pgm").write_bytes(b"P5 128 96 4080\n" + values.tobytes())
    result = np.asarray(images.open_image(tmp_path / "deep.pgm"), float)
    assert np.abs(result - GRAY[..., None]).max() <= 1


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["tif", "big-endian.tif", "compressed.tif", "png"])
def test_rgb_of_fewer_bits_in_16(tmp_path, bits, suffix):
    expected = np.asarray(gradient())
    values = expected.astype(np.uint16) << (bits - 8)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "png":
        cv2.imwrite(str(path), values[..., ::-1])
    else:
        tifffile.imwrite(
            path,
            values,
            byteorder=">" if suffix.startswith("big") else "<",
            compression="zlib" if suffix.startswith("compressed") else None,
            photometric="rgb",
        )
    result = np.asarray(images.open_image(path), int)
    assert np.abs(result - expected).max() <= 1


def test_white_is_zero(tmp_path):
    for dtype, values in {"u2": (255 - GRAY) * 257, "f4": 1 - GRAY / 255}.items():
        file = tmp_path / f"{dtype}.tif"
        tifffile.imwrite(file, values.astype(dtype), photometric="miniswhite")
        assert np.abs(np.asarray(images.open_image(file), float) - GRAY[..., None]).max() <= 1


def test_white_that_the_tags_name(tmp_path):
    values = (GRAY * 3).astype(np.uint16)  # less than 10 bits have
    tags = [(281, "H", 1, 765, True)]
    tifffile.imwrite(tmp_path / "deep.tif", values, extratags=tags)
    result = np.asarray(images.open_image(tmp_path / "deep.tif"), float)
    assert np.abs(result - GRAY[..., None]).max() <= 1


@pytest.mark.parametrize("tag", [(281, "H", 1, 0, True), (341, "s", 4, "abc", True)])
def test_tags_that_name_no_white_are_ignored(tmp_path, tag):
    tifffile.imwrite(tmp_path / "deep.tif", (GRAY * 16).astype(np.uint16), extratags=[tag])
    result = np.asarray(images.open_image(tmp_path / "deep.tif"), float)
    assert np.abs(result - GRAY[..., None]).max() <= 1


@pytest.mark.parametrize("fill", [np.nan, -np.inf, -9999, -3.4e38])
@pytest.mark.parametrize("white", [1, 255, 3000])
def test_missing_data_is_black(tmp_path, fill, white):
    values = (GRAY / 255 * white).astype(np.float32)
    values[:20] = fill
    Image.fromarray(values).save(tmp_path / "deep.tif")
    result = np.asarray(images.open_image(tmp_path / "deep.tif"), float)
    assert (result[:20] == 0).all()
    scale = 255 / 4095 * white / 1 if white == 3000 else 255  # 3000: of 12 bits
    assert np.abs(result[20:] - (GRAY / 255 * scale)[20:, :, None]).max() <= 1


def test_infinity_is_white(tmp_path):
    values = (GRAY / 255).astype(np.float32)
    values[:20] = np.inf
    Image.fromarray(values).save(tmp_path / "deep.tif")
    assert (np.asarray(images.open_image(tmp_path / "deep.tif"))[:20] == 255).all()


def test_nothing_finite_is_unreadable(tmp_path):
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match="none of its pixels has a finite value"):
        images.open_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("dtype", ["u2", "i4", "f4"])
@pytest.mark.parametrize("value", [0, 1, 77, 5000])
def test_constant_deep_images_are_of_one_color(tmp_path, dtype, value):
    Image.fromarray(np.full((40, 50), value, dtype)).save(tmp_path / "deep.tif")
    image = images.open_image(tmp_path / "deep.tif")
    assert not images.has_content(image)


@pytest.mark.parametrize("dtype", ["f8", "f2", "u8", ">u4"])
def test_what_pillow_does_not_read_is_named(tmp_path, dtype):
    order = ">" if dtype.startswith(">") else "<"
    tifffile.imwrite(tmp_path / "deep.tif", GRAY.astype(dtype), byteorder=order)
    with pytest.raises(InputError, match=r"TIFF that cannot be read \(unknown pixel mode\)"):
        images.open_image(tmp_path / "deep.tif")


# ---- content ----


def plain(color, noise=0, slope=0, size=(320, 200)):
    """One color, with noise of a standard deviation and a gradient of so many levels."""
    pixels = np.full((*size[::-1], 3), color, float)
    pixels += np.linspace(-slope / 2, slope / 2, size[0])[None, :, None]
    pixels += np.random.default_rng(0).normal(0, 1, pixels.shape) * noise
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def recompressed(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


COLORS = [(0, 160, 0), (255, 0, 0), (128, 128, 128), (255, 255, 255), (0, 0, 0), (20, 30, 90)]


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("quality", [20, 50, 90, None])
@pytest.mark.parametrize(("noise", "slope"), [(0, 0), (3, 0), (8, 0), (0, 8), (3, 16)])
def test_plain_colors_have_no_content(color, quality, noise, slope):
    image = plain(color, noise, slope)
    if quality:
        image = recompressed(image, quality)
    assert not images.has_content(image)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (100, 80), (2000, 30)])
def test_plain_colors_of_any_size(size):
    assert not images.has_content(plain((10, 200, 90), size=size))


def fog():
    """A photograph with a tenth of its contrast."""
    pixels = skimage.data.astronaut().astype(float)
    return Image.fromarray((210 + (pixels - pixels.mean()) / 10).round().astype(np.uint8))


def night_sky():
    rng = np.random.default_rng(0)
    pixels = rng.normal(8, 2, (300, 400, 3))
    for _ in range(40):
        top, left = rng.integers(0, 298, 2)
        pixels[top : top + 2, left : left + 2] += rng.uniform(80, 240)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def snow():
    """White on white: a slope with shadows of a few levels, and a track."""
    rng = np.random.default_rng(0)
    shadows = Image.fromarray(rng.normal(235, 12, (6, 8)).astype(np.uint8)).resize((400, 300), 3)
    ImageDraw.Draw(shadows).line((0, 250, 400, 120), fill=205, width=3)
    return shadows.convert("RGB")


def text():
    page = Image.new("RGB", (800, 600), "white")
    ImageDraw.Draw(page).text((300, 300), "hello", fill="black")
    return page


@pytest.mark.parametrize("image", [fog, night_sky, snow, text, gradient])
def test_images_with_content(image):
    assert images.has_content(image())
    assert images.has_content(recompressed(image(), 60))


# ---- files that were cut ----


def photograph():
    return Image.fromarray(skimage.data.chelsea())


def encoded(file_format, mode="RGB", **options):
    images.formats()
    file = io.BytesIO()
    photograph().convert(mode).save(file, file_format, **options)
    return file.getvalue()


def jpeg(**options):
    return encoded("JPEG", **options)


JPEGS = {
    "plain": jpeg,
    "4:4:4": lambda: jpeg(subsampling=0, quality=95),
    "progressive": lambda: jpeg(progressive=True),
    "restart markers": lambda: jpeg(restart_marker_rows=1),
    "gray": lambda: jpeg(mode="L"),
    "CMYK": lambda: jpeg(mode="CMYK"),
    "with EXIF": lambda: jpeg(exif=exif_of(1)),
}
ENDS = {
    "no marker": lambda content: content[:-2],
    "half a marker": lambda content: content[:-1],
    "two bytes less": lambda content: content[:-4],
    "zeros": lambda content: content[:-2] + bytes(3),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_without_its_end_is_read(tmp_path, kind, end):
    whole = JPEGS[kind]()
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "cut.jpg").write_bytes(ENDS[end](whole))
    expected = np.asarray(images.open_image(tmp_path / "whole.jpg"), int)
    with images.open_checked(tmp_path / "cut.jpg") as opened:
        image, warning = images.decode(opened)
    if end != "zeros":  # with which libjpeg is content
        assert warning == "lacks its end marker; read all the same"
    difference = np.abs(np.asarray(image, int) - expected).max(axis=2)
    assert (difference > 0).mean() < (0.01 if end == "two bytes less" else 1e-9)


def test_a_whole_image_has_no_warning(tmp_path):
    for number, content in enumerate([jpeg(), jpeg() + b"of a phone", encoded("PNG")]):
        (tmp_path / str(number)).write_bytes(content)
        with images.open_checked(tmp_path / str(number)) as opened:
            assert images.decode(opened)[1] is None


def test_a_jpeg_without_its_end_at_a_smaller_scale(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:-2])
    with images.open_checked(tmp_path / "cut.jpg") as opened:
        opened.draft("RGB", (100, 60))
        image, warning = images.decode(opened)
    assert warning and image.width < 300


CUT = {  # {kind: (content, what is measured)}
    "JPEG": (jpeg, "image"),
    "JPEG 4:4:4": (lambda: jpeg(subsampling=0), "image"),
    "JPEG with restart markers": (lambda: jpeg(restart_marker_rows=1), "image"),
    "gray JPEG": (lambda: jpeg(mode="L"), "image"),
    "PNG": (lambda: encoded("PNG"), "image"),
    "palette PNG": (lambda: encoded("PNG", "P"), "image"),
    "WEBP": (lambda: encoded("WEBP"), "file"),
    "lossless WEBP": (lambda: encoded("WEBP", lossless=True), "file"),
    "TIFF": (lambda: encoded("TIFF"), "image"),
    "compressed TIFF": (lambda: encoded("TIFF", compression="tiff_lzw"), "image"),
    "BMP": (lambda: encoded("BMP"), "image"),
    "PPM": (lambda: encoded("PPM"), "image"),
    "JPEG 2000": (lambda: encoded("JPEG2000"), "file"),
    "AVIF": (lambda: encoded("AVIF"), "file"),
    "HEIC": (lambda: encoded("HEIF"), "file"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=needs_pillow_heif if k == "HEIC" else ()) for k in CUT]
)
@pytest.mark.parametrize("share", [0.25, 0.6, 0.9])
def test_how_much_of_a_cut_file_is_missing(tmp_path, kind, share):
    make, what = CUT[kind]
    whole = make()
    (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError) as caught:
        images.open_image(tmp_path / "cut")
    found = re.search(rf"is cut: the last (\d+)% of the {what} are missing", str(caught.value))
    assert found, caught.value
    assert abs(int(found[1]) - 100 * (1 - share)) <= 10  # the image is not coded evenly


@pytest.mark.parametrize("filler", [b"", bytes(9000)])
def test_the_rows_that_a_cut_jpeg_lacks(tmp_path, filler):
    """What libjpeg leaves gray; also of a file that was filled up with zeros."""
    content = jpeg()
    cut = content[: len(content) // 2]
    with Image.open(io.BytesIO(cut + b"\xff\xd9")) as image:
        rows = np.asarray(image, int)
    missing = (np.ptp(rows, axis=(1, 2)) < 5).mean()
    (tmp_path / "cut.jpg").write_bytes(cut + filler)
    with pytest.raises(InputError) as caught:
        images.open_image(tmp_path / "cut.jpg")
    found = re.search(r"the last (\d+)% of the image are missing", str(caught.value))
    assert abs(int(found[1]) - 100 * missing) <= 6  # a row of blocks is cut in the middle


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.05, "of the image, and detail of the rest, are missing"),
        (0.3, "detail is missing in the whole image"),
        (0.9, r"detail is missing in the last \d\d% of the image"),
    ],
)
def test_a_progressive_jpeg_lacks_detail(tmp_path, share, words):
    whole = jpeg(progressive=True)
    (tmp_path / "cut.jpg").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=words):
        images.open_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "AVIF"])
def test_cut_in_the_header(tmp_path, kind):
    make, _ = CUT[kind]
    (tmp_path / "cut").write_bytes(make()[:40])
    with pytest.raises(InputError, match=r"cut|cannot be read"):
        images.open_image(tmp_path / "cut")


@pytest.mark.parametrize("kind", CUT)
def test_cut_files_never_end_in_a_traceback(tmp_path, kind):
    """Cut anywhere, and with bytes changed."""
    if kind == "HEIC" and "HEIF" not in images.formats():
        pytest.skip("needs pillow-heif")
    make, _ = CUT[kind]
    whole = make()
    rng = np.random.default_rng(0)
    for _ in range(30):
        content = bytearray(whole[: int(rng.integers(1, len(whole)))])
        for position in rng.integers(0, min(len(content), 600), 3):
            content[position] = int(rng.integers(256))
        (tmp_path / "damaged").write_bytes(content)
        try:
            images.open_image(tmp_path / "damaged")
        except InputError as error:
            assert "\n" not in str(error)


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
    "DIB": (lambda path: gradient().save(path, "DIB"), UNREADABLE, gradient()),
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
    "alpha": (
        lambda path: noise("RGBA", alpha=0).save(path, "PNG"),
        noise("RGB"),
        Image.new("RGB", (48, 32), "white"),
    ),
    # Both have the same limit.
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
