"""Decoded pixels as viewers show them: more than 8 bits scaled to 8, transparency on white."""

import re
import sys
from contextlib import suppress

import numpy as np
from PIL import Image

DEEP_MODES = ("I", "F")  # and those that begin with I;16

# TIFF tags
PHOTOMETRIC = 262
MAX_SAMPLE_VALUE = 281
SAMPLE_FORMAT = 339
S_MAX_SAMPLE_VALUE = 341

WHITE_IS_ZERO = 0  # of PHOTOMETRIC
UNSIGNED = 1  # of SAMPLE_FORMAT
SIGNED = 2

# What may be white in a file that does not say: the greatest value of 8 to 16, 31 and 32 bits.
WHITES_OF_16_BITS = (255, 1023, 4095, 16383, 65535)
INTEGER_WHITES = (*WHITES_OF_16_BITS, 2**31 - 1, 2**32 - 1)
SIGNED_WHITES = (255, 1023, 4095, 16383, 32767, 65535, 2**31 - 1)
FLOAT_WHITES = (1, *WHITES_OF_16_BITS)
OVERSHOOT = 0.1  # of white: resizing makes floats a little less than black, more than white
DARKEST = 1 / 16  # of white, that the brightest pixel of an image has at least

BLOCK = 256  # rows that are computed at once


# ---- before decoding ----


def raw_mode(image):
    """How the pixels of an opened image are stored, in Pillow's words, such as "RGB;16B"."""
    if not image.tile:
        return ""
    arguments = image.tile[0].args
    mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return mode if isinstance(mode, str) else ""


def set_raw_mode(image, mode):
    """Have an opened image decoded by another raw mode."""
    tiles = []
    for tile in image.tile:
        arguments = mode if isinstance(tile.args, str) else (mode, *tile.args[1:])
        tiles.append(tile._replace(args=arguments))
    image.tile = tiles


def mend_byte_order(image):
    """Have big-endian TIFFs of 32 bits, or 16 with sign, decoded right where they are compressed.

    libtiff has swapped their bytes already; Pillow 13 swaps them again.
    """
    mode = raw_mode(image)
    if image.tile and image.tile[0].codec_name == "libtiff":
        native = re.sub(r"(?<=;16|;32)B(?=S|F)", "N", mode)
        if native != mode:
            set_raw_mode(image, native)


# ---- more than 8 bits ----


def is_deep(image):
    """Whether a decoded image has one channel of more than 8 bits."""
    return image.mode in DEEP_MODES or image.mode.startswith("I;16")


def gray_of_deep(image):
    """An image of one channel of more than 8 bits, scaled to 8: mode L, or LA where it has a
    transparent value.

    Black is 0. White is the least of INTEGER_, SIGNED_ or FLOAT_WHITES that no value exceeds, or
    what the tags of a TIFF say. Where no such range fits, since values are negative, larger, or all
    darker than a sixteenth of white, black is the least value and white the greatest. NaN becomes
    black, infinity white. Raises ValueError where no value is finite.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    sample_format = first_number(tags.get(SAMPLE_FORMAT, UNSIGNED))
    if image.mode == "I" and tags and sample_format == UNSIGNED:
        values = values.view(np.uint32)
    if image.mode == "F":
        whites = FLOAT_WHITES
    elif sample_format == SIGNED:
        whites = SIGNED_WHITES
    else:
        whites = INTEGER_WHITES
    black, white = value_range(values, [*declared_whites(tags), *whites])
    gray = scale_to_8_bits(values, black, white)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        gray = 255 - gray
    result = Image.fromarray(gray)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        opaque = (values != transparent).astype(np.uint8) * 255
        result.putalpha(Image.fromarray(opaque))
    return result


def declared_whites(tags):
    """The greatest values that the tags of a TIFF name, a list of floats."""
    declared = []
    for tag in (MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE):
        with suppress(ValueError, TypeError, IndexError):  # anything may stand there
            white = first_number(tags.get(tag))
            if 0 < white < np.inf:
                declared.append(white)
    return declared


def first_number(value):
    """The value of a TIFF's tag as a float; the first of several."""
    return float(np.ravel(value)[0])


def value_range(values, whites):
    """What is black and what is white in an array: two numbers, the first less than the second.

    whites: what may be white, in order. Raises ValueError where no value is finite.
    """
    low, high = extremes(values, -np.inf, np.inf)
    if low > high:
        raise ValueError("none of its pixels has a finite value")
    overshoot = OVERSHOOT if values.dtype.kind == "f" else 0
    white = least_white(low, high, whites, overshoot)
    if white is None:
        low, high = without_fill_values(values, low, high)
        white = least_white(low, high, whites, overshoot)
    if white is not None:
        return 0, white
    if low == high:
        return low, low + 1
    return low, high


def least_white(low, high, whites, overshoot):
    """The first of `whites` that suits values from low to high; None where none does."""
    for white in whites:
        is_within = -overshoot * white <= low and high <= (1 + overshoot) * white
        if is_within and high >= DARKEST * white:
            return white
    return None


def without_fill_values(values, low, high):
    """The least and the greatest value, without those that stand for missing data.

    Such are far from all others, as -9999 or 3.4e38 is: farther than these from each other.
    """
    next_low, next_high = extremes(values, low, high)
    span = next_high - next_low
    if span <= 0:  # so few different values that none is far
        return low, high
    if next_low - low > span:
        low = next_low
    if high - next_high > span:
        high = next_high
    return low, high


def extremes(values, above, below):
    """The least and the greatest of the values between two bounds, as Python numbers; inf and
    -inf where there is none.
    """
    low = np.inf
    high = -np.inf
    for top in range(0, len(values), BLOCK):
        rows = values[top : top + BLOCK].astype(np.float64)
        rows = rows[(rows > above) & (rows < below)]
        if rows.size:
            low = min(low, rows.min().item())
            high = max(high, rows.max().item())
    return low, high


def scale_to_8_bits(values, black, white):
    """An array (height, width) with black as 0 and white as 255, uint8.

    Integers are scaled so that 16 bits become their upper 8, as usual.
    """
    is_float = values.dtype.kind == "f"
    result = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), BLOCK):
        rows = values[top : top + BLOCK].astype(np.float64) - black
        rows = np.nan_to_num(rows, nan=0, posinf=white - black, neginf=0)
        if is_float:
            rows = np.round(rows * (255 / (white - black)))
        else:
            rows = np.floor(rows * 256 / (white - black + 1))
        result[top : top + BLOCK] = rows.clip(0, 255)
    return result


def is_dark_rgb(image, mode):
    """Whether a decoded image is RGB of 16 bits whose upper two bits are unused.

    mode: its raw mode. Pillow keeps the upper byte of 16 bits.
    """
    if image.mode != "RGB" or ";16" not in mode:
        return False
    brightest = max(high for _, high in image.getextrema())
    return brightest < 64


def brighten_dark_rgb(image, file, mode):
    """Scale an RGB image of 16 bits, of which few are used, to 8 by those, in place.

    Reads the lower bytes too, from `file`, by the raw mode of the other byte order.
    """
    native = "L" if sys.byteorder == "little" else "B"
    order = mode[-1].replace("N", native)
    opposite = mode[:-1] + ("B" if order == "L" else "L")
    with Image.open(file, formats=[image.format]) as lower:
        set_raw_mode(lower, opposite)
        lower.load()
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
    rows = values.reshape(len(values), -1)
    gray = scale_to_8_bits(rows, *value_range(rows, INTEGER_WHITES))
    image.paste(Image.fromarray(gray.reshape(values.shape)))


# ---- transparency ----


def scale_transparent_color(image, mode):
    """Scale the color that a PNG calls transparent as Pillow has scaled its pixels.

    mode: its raw mode. Gray of 2 and 4 bits was scaled up to 8, RGB of 16 bits down.
    """
    color = image.info.get("transparency")
    if isinstance(color, int) and mode == "L;2":
        image.info["transparency"] = color * 85
    elif isinstance(color, int) and mode == "L;4":
        image.info["transparency"] = color * 17
    elif isinstance(color, tuple) and ";16" in mode:
        image.info["transparency"] = tuple(value >> 8 for value in color)


def rgb_on_white(image):
    """An image in mode RGB, on white where it is transparent."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    color = image.convert("RGB")
    if alpha.getextrema() == (255, 255):
        return color
    white = Image.new("RGB", image.size, "white")
    white.paste(color, mask=alpha)
    return white
