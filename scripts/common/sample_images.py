"""Images that need no download: generated ones, and tiles of the photographs inside the wheels of
scikit-image and scikit-learn.
"""

import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.errors import InputError
from common.images import open_image

# Photographs of things, {folder inside site-packages: file names}. Text pages, masks, logos and
# test patterns are left out, as are even textures (brick, grass, gravel), whose tiles all look
# alike, and one half of the stereo pair.
EMBEDDED_PHOTOGRAPHS = {
    "skimage/data": (
        "astronaut.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn/datasets/images": (
        "china.jpg",
        "flower.jpg",
    ),
}
MAX_TILES = 6  # along the shorter side: one large photograph must not fill the data set
MIN_ENTROPY = 4.5  # bits per pixel: tiles of plain sky or black border all look the same

# Each kind of random draw has a stream of its own, see `generator`.
STREAMS = {"split": 0, "order": 1, "training": 2, "reference": 3, "query": 4}


@dataclass(frozen=True)
class SourceImage:
    """Where an image of the data set comes from.

    A photograph has a `path`, a tile of one has a `box` too (left, top, right, bottom, in pixels),
    a generated image has neither.
    """

    name: str
    path: Path | None = None
    box: tuple[int, int, int, int] | None = None


def generator(seed, kind, index=0):
    """The random generator of image `index` of a kind: what it draws depends on nothing else."""
    return np.random.default_rng([seed, STREAMS[kind], index])


# ---- photographs ----


def open_photograph(path, short_side=None):
    """The photograph as an RGB image, upright, its shorter side at most `short_side` pixels.

    Raises InputError where the file is unreadable.
    """
    image = open_image(path)
    if short_side is None or short_side >= min(image.size):
        return image
    scale = short_side / min(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


@functools.lru_cache(maxsize=32)
def open_embedded(path, size):
    """The embedded photograph, scaled to be cut into tiles of `size` pixels; kept for its next
    tile.
    """
    return open_photograph(path, MAX_TILES * size)


def embedded_tiles(size):
    """SourceImages of all tiles of `size` x `size` pixels of the embedded photographs that show
    something.

    Raises InputError where a package that holds photographs is not installed.
    """
    tiles = []
    for package, name, path in embedded_paths():
        image = open_embedded(path, size)
        for box in grid(image, size):
            x, y = box[:2]
            if image.crop(box).convert("L").entropy() >= MIN_ENTROPY:
                tiles.append(SourceImage(f"{package}/{name}@{x},{y}", path, box))
    return tiles


def embedded_paths():
    """Yields the package, the file name and the path of each embedded photograph.

    Raises InputError where a package is not installed.
    """
    for folder, names in EMBEDDED_PHOTOGRAPHS.items():
        package = folder.split("/")[0]
        site_packages = find_site_packages(package)
        for name in names:
            yield package, name, site_packages / folder / name


def find_site_packages(package):
    """The folder that holds an installed package. Raises InputError where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise InputError(
            f"{package}: not installed, and it holds the photographs; install "
            f"requirements-dev.txt, or give make_dataset.py --photos DIR"
        )
    return Path(spec.submodule_search_locations[0]).parent


def grid(image, size):
    """Yields the boxes of the disjoint squares of `size` pixels that fit into an image."""
    for y in range(0, image.height - size + 1, size):
        for x in range(0, image.width - size + 1, size):
            yield x, y, x + size, y + size


# ---- generated images ----


def texture(rng, size):
    """A colored 1/f noise texture, an RGB image of `size` x `size` pixels."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    noise = rng.normal(size=(2, 3, *frequency.shape))
    exponent = rng.uniform(0.8, 1.6)
    real, imaginary = noise / frequency**exponent
    channels = np.fft.irfft2(real + 1j * imaginary, s=(size, size)).reshape(3, -1)
    channels /= channels.std(axis=1, keepdims=True)

    mixing = rng.normal(size=(3, 3))
    contrast = rng.uniform(10, 60)
    mixing *= contrast / np.linalg.norm(mixing, axis=1, keepdims=True)
    brightness = rng.uniform(40, 215, size=(3, 1))
    colors = (mixing @ channels + brightness).clip(0, 255).astype(np.uint8)
    return Image.fromarray(colors.T.reshape(size, size, 3))


def dead_leaves(rng, size):
    """Overlapping polygons, plain or cut from one texture, over another: an RGB image of `size`
    pixels a side.

    Source: Baradad et al. 2021, "Learning to see by looking at noise".
    """
    canvas = texture(rng, size)
    bark = texture(rng, size)
    for _ in range(rng.integers(15, 120)):
        corners = leaf(rng, size)
        if rng.uniform() < 0.3:
            mask = Image.new("1", (size, size))
            ImageDraw.Draw(mask).polygon(corners, fill=1)
            canvas.paste(bark, mask=mask)
        else:
            ImageDraw.Draw(canvas).polygon(corners, fill=tuple(color(rng)))
    return canvas


def leaf(rng, size):
    """A random polygon: its corners as a flat list of x, y, in pixels.

    Its radius follows the r**-3 law that makes dead leaves look alike at every scale, as natural
    images do.
    """
    smallest = size / 30
    largest = size / 2.5
    radius = (smallest**-2 + rng.uniform() * (largest**-2 - smallest**-2)) ** -0.5
    corners = int(rng.choice([3, 4, 5, 6, 24]))
    angles = rng.uniform(0, 2 * math.pi) + np.arange(corners) * 2 * math.pi / corners
    flattening = rng.uniform(0.4, 1)
    outline = radius * np.stack([np.cos(angles), np.sin(angles) * flattening], axis=1)
    turn = rng.uniform(0, 2 * math.pi)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    center = rng.uniform(0, size, size=2)
    return (outline @ rotation + center).ravel().tolist()


def color(rng):
    """A random RGB color as a list of three ints."""
    return rng.integers(0, 256, size=3).tolist()
