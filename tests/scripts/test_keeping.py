"""scripts/common/keeping.py: what is known of each copy, and which one is worth keeping."""

import json
import os
import re
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from common.images import open_image
from common.keeping import FileDetails, choose_kept, file_details, group_record, kept_and_reason

ORIENTATION = 0x0112
XMP = '<x tiff:Orientation="8"/>'


def noise(size):
    """A PIL image of random pixels."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def move_exif_behind_pixels(path):
    """Put a PNG's eXIf chunk after its pixels, where exiftool has put it."""
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    end = start + 12 + length
    chunk = content[start:end]
    last = content.index(b"IEND") - 4
    path.write_bytes(content[:start] + content[end:last] + chunk + content[last:])


# ---- details ----


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif", "heic"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8, 5, 99])
def test_width_and_height_are_those_of_the_image_as_shown(suffix, orientation, tmp_path):
    path = tmp_path / f"image.{suffix}"
    exif = Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    noise((60, 40)).save(path, exif=exif)
    known = file_details(path)
    assert (known.width, known.height) == open_image(path).size


@pytest.mark.parametrize(
    "kind", ["exif after the pixels", "xmp of a JPEG", "xmp of a PNG", "damaged exif"]
)
def test_orientation_in_unusual_places(kind, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "image.png"
    if kind == "exif after the pixels":
        noise((60, 40)).save(path, exif=exif)
        move_exif_behind_pixels(path)
        expected = (40, 60)
    elif kind == "xmp of a JPEG":
        path = path.with_suffix(".jpg")
        noise((60, 40)).save(path, xmp=XMP.encode())
        expected = (40, 60)
    elif kind == "xmp of a PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", XMP)
        noise((60, 40)).save(path, pnginfo=text)
        expected = (40, 60)
    else:
        noise((60, 40)).save(path, exif=b"Exif\0\0no such thing")
        expected = (60, 40)
    known = file_details(path)
    assert (known.width, known.height) == expected == open_image(path).size


def test_bytes_and_time(tmp_path):
    path = tmp_path / "image.bmp"
    noise((7, 5)).save(path)
    os.utime(path, (0, 1_700_000_000.5))
    known = file_details(str(path))
    assert known == FileDetails(7, 5, path.stat().st_size, 1_700_000_000.5)
    assert known.pixels == 35


def test_details_need_no_pixels(tmp_path):
    """Only the header is read: a file that is cut behind it has details."""
    path = tmp_path / "large.png"
    header = struct.pack(">IIBBBBB", 9000, 8000, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 99) + b"IDAT")
    known = file_details(path)
    assert (known.width, known.height) == (9000, 8000)


def test_files_that_are_no_images_have_no_details(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (10001, 10000)).save(tmp_path / "bomb.png")
    names = ["empty.jpg", "text.png", "bomb.png", "gone.jpg", "a\0b", "", "x" * 5000]
    for name in names:
        assert file_details(f"{tmp_path}/{name}") is None, name


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (340_400, "340 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (2_940_000, "2.9 MB"),
        (999_949_999, "999.9 MB"),
        (999_950_000, "1.0 GB"),
        (1_500_000_000, "1.5 GB"),
    ],
)
def test_bytes_as_text(count, text):
    assert FileDetails(1, 1, count, 0).bytes_text == text


def test_time_as_text():
    text = FileDetails(1, 1, 1, 1_717_156_800.7).modified_text
    assert text == time.strftime("%Y-%m-%d %H:%M", time.localtime(1_717_156_800))
    assert re.fullmatch(r"2024-0[56]-\d\d \d\d:\d\d", text)
    for far in (-1e18, 1e18):  # file systems allow years that calendars do not
        assert FileDetails(1, 1, 1, far).modified_text == f"{far:.0f} seconds after 1970"


# ---- the one to keep ----

SMALL = FileDetails(100, 100, 9000, 50)


@pytest.mark.parametrize(
    "candidates, kept, reason",
    [
        ([SMALL, FileDetails(101, 100, 10, 90)], 1, "most pixels"),
        ([FileDetails(90, 200, 10, 90), SMALL], 0, "most pixels"),
        ([SMALL, FileDetails(50, 200, 9001, 90)], 1, "most bytes"),
        ([SMALL, FileDetails(100, 100, 9000, 49)], 1, "oldest"),
        ([SMALL, SMALL, SMALL], 0, "first of equal files"),
        ([None, SMALL, None], 1, "the only one that can be read"),
        ([None, None], 0, "none can be read"),
        (
            [SMALL, FileDetails(200, 100, 10, 90), FileDetails(200, 100, 10, 80)],
            2,
            "most pixels, then oldest",
        ),
    ],
)
def test_most_pixels_then_most_bytes_then_oldest_then_first(candidates, kept, reason):
    details = {f"{number}.jpg": known for number, known in enumerate(candidates)}
    paths = list(details)
    assert choose_kept(paths, details) == paths[kept]
    assert kept_and_reason(paths, details) == (paths[kept], reason)


def test_group_record(tmp_path):
    small = tmp_path / "a.png"
    large = tmp_path / os.fsdecode(b"caf\xe9,\n.png")
    noise((60, 40)).save(small)
    noise((61, 40)).save(large, "PNG")
    os.utime(small, (5, 5))
    gone = str(tmp_path / "gone.png")
    paths = [str(small), gone, str(large)]
    record = json.loads(json.dumps(group_record(3, paths)))
    assert record["group"] == 3 and record["files"] == paths and record["keep"] == str(large)
    assert record["details"][0] == {
        "path": str(small),
        "width": 60,
        "height": 40,
        "bytes": small.stat().st_size,
        "modified": 5,
    }
    assert record["details"][1] == {
        "path": gone,
        "width": None,
        "height": None,
        "bytes": None,
        "modified": None,
    }
    assert record["details"][2]["path"] == str(large)
