"""What every script here that opens strangers' pictures has to look at, before it decodes them and
after."""

import numpy as np
from PIL import Image

MAX_PIXELS = 100_000_000  # what claims more is a decompression bomb


def pixels_to_decode(image):
    """How many pixels decoding an opened PIL image takes. Raises ValueError where that is more than
    MAX_PIXELS.
    """
    tags = getattr(image, "tag_v2", {})  # TIFF's, whose tiles may be larger than the image
    pixels = max(image.width * image.height, tags.get(322, 0) * tags.get(323, 0))
    if pixels > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS} to decode")
    return pixels


def in_eight_bits(image):
    """The PIL image, one of 16 bits as one of 8, to which convert() would clip it."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image
