"""How much is missing of an image file that was cut, by a broken download or a full disk.

Judged by what the file itself says of its length. A GIF says nothing of it.
"""

import io
import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_BYTES = 1_000_000_000  # of a file that is looked at
MAX_MEASURED_PIXELS = 16_000_000  # of a JPEG that must be decoded in full for it


def why_cut(content):
    """What is missing of the image file with this content (bytes), in a few words.

    None where nothing is, or where that cannot be known.
    """
    if len(content) > MAX_BYTES:
        return None
    if content.startswith(b"\xff\xd8\xff"):
        return why_jpeg_cut(content)
    for signature, missing_share, what in MEASURES:
        if re.match(signature, content, re.DOTALL):
            try:
                share = missing_share(content)
            except (struct.error, IndexError, KeyError):
                return "is cut in its header: the whole image is missing"
            return f"is cut: {last(share)} of {what} are missing" if share > 0 else None
    return None


def last(share):
    """A share of 0 ... 1 in words: "the last 37%"."""
    if share < 0.01:
        return "less than the last 1%"
    return f"the last {min(round(100 * share), 99)}%"


# ---- JPEG ----

END_MARKER = b"\xff\xd9"
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # that ends the data of a scan
FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
PROGRESSIVE_MARKERS = {0xC2, 0xC6, 0xCA, 0xCE}
SCAN_MARKER = 0xDA
MARKERS_ALONE = {0x01, *range(0xD0, 0xD9)}  # that no length follows
COEFFICIENTS = 64  # of a block of 8 x 8 pixels


@dataclass
class JpegHeaders:
    """What the headers of a JPEG say, as far as the file goes.

    components: their ids. unit: pixels (width, height) of the blocks that are coded together.
    scans: for each, the ids of its components, its first and last coefficient, and how many low
    bits of them are left to later scans.
    """

    progressive: bool
    components: list
    unit: tuple
    scans: list

    @property
    def one_pass(self):
        """Whether one scan holds all of the image, from top to bottom."""
        return not self.progressive and set(self.scans[0][0]) == set(self.components)

    @property
    def reaches_full_detail(self):
        """Whether each coefficient of each component is in a scan with its last bit."""
        missing_bits = {}
        for components, first, final, bits in self.scans:
            for component in components:
                for coefficient in range(first, final + 1):
                    missing_bits[component, coefficient] = bits
        complete = [key for key, bits in missing_bits.items() if bits == 0]
        return len(complete) == COEFFICIENTS * len(self.components)


def why_jpeg_cut(content):
    """As why_cut, of a JPEG."""
    headers = read_jpeg_headers(content)
    if headers is None:
        return "is cut in its header: the whole image is missing"
    number = len(headers.scans)
    if not is_measurable(content, headers):
        return f"is cut in pass {number} of a progressive JPEG"
    share = missing_share_of_scan(content, headers)
    if headers.one_pass:
        return f"is cut: {last(share)} of the image are missing" if share > 0 else None
    if number == 1:
        return f"is cut: {last(share)} of the image, and detail of the rest, are missing"
    if not headers.reaches_full_detail:
        return f"is cut in pass {number}: detail is missing in the whole image"
    if share > 0:
        return f"is cut in pass {number}: detail is missing in {last(share)} of the image"
    return None


def lacks_only_the_end(content):
    """Whether a cut JPEG shows its image all the same: all of it, but for 1%, or one block of
    those that are coded together.
    """
    try:
        headers = read_jpeg_headers(content)
    except (ValueError, IndexError):  # damaged
        return False
    if headers is None or not (headers.one_pass or headers.reaches_full_detail):
        return False
    if not is_measurable(content, headers):
        return False
    with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
        unit_share = headers.unit[0] * headers.unit[1] / (image.width * image.height)
    return missing_share_of_scan(content, headers) <= max(0.01, unit_share)


def is_measurable(content, headers):
    """Whether what is missing of a cut JPEG can be measured in little memory.

    That decodes it several times: in full, but for images that one scan holds.
    """
    with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
        return headers.one_pass or image.width * image.height <= MAX_MEASURED_PIXELS


def with_end_marker(content):
    """The content of a cut JPEG with an end marker, so that decoders stop there.

    They show gray where data is missing.
    """
    # A cut file may be filled up with zeros, or end within the marker.
    return content.rstrip(b"\0").rstrip(b"\xff") + END_MARKER


def read_jpeg_headers(content):
    """The JpegHeaders of a JPEG; None where it has no scan."""
    progressive = False
    components = []
    unit = (8, 8)
    scans = []
    position = 2
    while position + 4 <= len(content):
        marker = content[position + 1]
        if marker == END_MARKER[1]:
            break
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in MARKERS_ALONE:
            position += 2
            continue
        (length,) = struct.unpack_from(">H", content, position + 2)
        body = content[position + 4 : position + 2 + length]
        position += 2 + length
        if position > len(content):
            break
        if marker in FRAME_MARKERS:
            progressive = marker in PROGRESSIVE_MARKERS
            components = list(body[6::3])
            sampling = body[7::3]
            unit = (8 * max(s >> 4 for s in sampling), 8 * max(s & 15 for s in sampling))
        elif marker == SCAN_MARKER:
            *ids_and_tables, first, final, bits = body[1:]
            scans.append((ids_and_tables[::2], first, final, bits & 15))
            next_marker = NEXT_MARKER.search(content, position)
            if next_marker is None:
                break
            position = next_marker.start()
    if not scans:
        return None
    return JpegHeaders(progressive, components, unit, scans)


def missing_share_of_scan(content, headers):
    """The share of the image, 0 ... 1, that the last scan of a cut JPEG does not reach.

    Random data behind its own changes what the decoder makes of it, but not what it has decoded.
    """
    with_end = with_end_marker(content)
    shrink = 8 if headers.one_pass else 1  # an eighth shows the mean of each block
    expected = decode_jpeg(with_end, shrink)
    changed = np.zeros(expected.shape[:2], bool)
    for seed in range(3):  # more than one, as some of it may mean: nothing changes
        noise = np.random.default_rng(seed).integers(0, 255, 500, np.uint8).tobytes()
        decoded = decode_jpeg(with_end.removesuffix(END_MARKER) + noise + END_MARKER, shrink)
        changed |= (decoded != expected).any(axis=2)
    if not changed.any():
        return 0.0
    unit_width, unit_height = (side // shrink for side in headers.unit)
    height, width = changed.shape
    top = int(changed.any(axis=1).argmax()) // unit_height * unit_height
    band = changed[top : top + unit_height]
    left = int(band.any(axis=0).argmax()) // unit_width * unit_width
    below = height - top - len(band)
    return (below * width + len(band) * (width - left)) / (height * width)


def decode_jpeg(content, shrink):
    """Pixels (height, width, channels) uint8 of a JPEG, at 1 / `shrink` of its size (8 or 1)."""
    with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
        if shrink > 1:
            image.draft(image.mode, (image.width // shrink, image.height // shrink))
        pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)


# ---- PNG ----

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type
# Left, top, and steps across and down of the pixels of each pass.
ONE_PASS = ((0, 0, 1, 1),)
INTERLACED = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def png_missing_share(content):
    """The share of its pixels' data, 0 ... 1, that a cut PNG lacks."""
    width, height, depth, color_type, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    pixel_bits = depth * CHANNELS[color_type]
    expected = 0
    for left, top, across, down in INTERLACED if interlaced else ONE_PASS:
        columns = max(0, -(-(width - left) // across))
        rows = max(0, -(-(height - top) // down))
        if columns:
            expected += rows * (1 + -(-columns * pixel_bits // 8))
    return max(0.0, 1 - png_data_size(content, expected) / expected)


def png_data_size(content, enough):
    """Bytes of pixels that a PNG holds, without compression; counted up to `enough`."""
    inflate = zlib.decompressobj()
    size = 0
    position = 8
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        data = content[position + 8 : position + 8 + length]
        position += 12 + length
        if size > enough:
            break
        try:
            while kind == b"IDAT" and data and size <= enough:
                size += len(inflate.decompress(data, 1_000_000))
                data = inflate.unconsumed_tail
        except zlib.error:
            break
    return size


# ---- other formats ----


def riff_missing_share(content):
    """The share of the file, 0 ... 1, that a cut WEBP lacks."""
    (size,) = struct.unpack_from("<I", content, 4)
    return max(0.0, 1 - len(content) / (8 + size))


DATA_BOXES = (b"mdat", b"jp2c")  # the last ones, as a rule


def boxes_missing_share(content):
    """The share of the file, 0 ... 1, that a cut HEIC, AVIF or JPEG 2000 lacks."""
    position = 0
    while position + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, position)
        if size == 0:  # to the end of the file, wherever that is
            return 0.0
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, position + 8)
        position += max(size, 8)
        if position > len(content) and kind not in DATA_BOXES:
            raise IndexError("the boxes behind this one are missing too")
    return max(0.0, 1 - len(content) / position)


def bmp_missing_share(content):
    """The share of its pixels, 0 ... 1, that a cut BMP lacks."""
    size, offset = struct.unpack_from("<I4xI", content, 2)
    return max(0.0, (size - max(len(content), offset)) / (size - offset)) if size > offset else 0.0


def ppm_missing_share(content):
    """The share of its pixels, 0 ... 1, that a cut PPM, PGM or PBM of binary numbers lacks."""
    header = re.match(rb"P([456])\s+(\d+)\s+(\d+)(?:\s+(\d+))?\s", content)
    kind, width, height = (int(header[i]) for i in (1, 2, 3))
    if kind == 4:
        size = height * -(-width // 8)
        header = re.match(rb"P4\s+\d+\s+\d+\s", content)
    else:
        size = height * width * (3 if kind == 6 else 1) * (2 if int(header[4]) > 255 else 1)
    return max(0.0, 1 - (len(content) - header.end()) / size)


TYPE_FORMATS = {3: "H", 4: "I"}  # of TIFF's numbers
STRIPS = (273, 279)  # tags of their offsets and sizes
TILES = (324, 325)


def tiff_missing_share(content):
    """The share of its pixels' data, 0 ... 1, that a cut TIFF lacks.

    Where its directory is missing, which may be at its end: the share of the file in front of that.
    """
    order = "<" if content.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(f"{order}I", content, 4)
    if directory + 2 > len(content):
        return 1 - len(content) / (directory + 2)
    (count,) = struct.unpack_from(f"{order}H", content, directory)
    end = directory + 2 + 12 * count
    if end > len(content):
        return 1 - len(content) / end
    values = {}
    for entry in range(directory + 2, end, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", content, entry)
        if tag not in (*STRIPS, *TILES):
            continue
        numbers = f"{order}{number}{TYPE_FORMATS[kind]}"
        size = struct.calcsize(numbers)
        position = entry + 8
        if size > 4:
            (position,) = struct.unpack_from(f"{order}I", content, position)
        if position + size > len(content):
            return 1 - len(content) / (position + size)
        values[tag] = struct.unpack_from(numbers, content, position)
    offsets, sizes = TILES if TILES[0] in values else STRIPS
    missing = 0
    for offset, size in zip(values[offsets], values[sizes], strict=True):
        missing += min(size, max(0, offset + size - len(content)))
    return missing / max(1, sum(values[sizes]))


MEASURES = (  # (how the file begins, how much is missing, of what)
    (rb"\x89PNG\r\n\x1a\n", png_missing_share, "the image"),
    (rb"RIFF....WEBP", riff_missing_share, "the file"),
    (rb"....(ftyp|jP  )", boxes_missing_share, "the file"),
    (rb"BM", bmp_missing_share, "the image"),
    (rb"P[456]\s+\d+\s+\d+\s", ppm_missing_share, "the image"),
    (rb"II\*\0|MM\0\*", tiff_missing_share, "the image"),
)
