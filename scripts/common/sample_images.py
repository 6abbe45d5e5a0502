"""Images that need no download: generated ones, and those inside the wheels of scikit-image and
scikit-learn.
"""

import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pylibmagic  # noqa: F401  (libmagic for AugLy, where the system has none)
from PIL import Image, ImageDraw

from common.errors import InputError
from common.images import needs_heif, open_image

# Photographs of things: no text pages, masks, logos or test patterns, no even textures (brick,
# grass, gravel), whose tiles all look alike, and one half of the stereo pair.
EMBEDDED = {
    "skimage/data": "astronaut.png camera.png chelsea.png coffee.png coins.png "
    "hubble_deep_field.jpg ihc.png moon.png "
    "motorcycle_left.png retina.jpg rocket.jpg",
    "sklearn/datasets/images": "china.jpg flower.jpg",
}


KINDS = {
    "split": 0,
    "order": 1,
    "training": 2,
    "reference": 3,
    "query": 4,
}  # one random stream each, see `generator`


MAX_TILES = 6  # along a photograph's shorter side: one large photograph shall not fill the data set


MIN_ENTROPY = 4.5  # bits per pixel: tiles of plain sky or black border all look the same


@dataclass(frozen=True)
class Picture:
    """Where a picture comes from: a photograph (`path`), a tile of one (`box` too), or a generated
    one (neither).
    """

    name: str
    path: Path | None = None
    box: tuple[int, int, int, int] | None = None


def generator(seed, kind, index=0):
    """The random generator of picture `index` of a kind: what it draws depends on nothing else."""
    return np.random.default_rng([seed, KINDS[kind], index])


def open_photograph(path, short_side=None):
    """The photograph as RGB, upright, scaled down to at most `short_side` pixels along its shorter
    side.

    Raises InputError, FILE: what is wrong, where it is none that can be decoded.
    """
    try:
        if needs_heif(path):
            raise ValueError("install pillow-heif for HEIC")
        image = open_image(path)
    except Exception as error:  # file system, formats and decoders each fail in their own way
        raise InputError(
            f"{path}: cannot be read as a photograph ({error})".replace("\n", " ")
        ) from error
    scale = short_side / min(image.size) if short_side else 1
    if scale >= 1:
        return image
    return image.resize(
        [max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS
    )


@functools.lru_cache(maxsize=32)
def open_embedded(path, size):
    """An embedded photograph, kept for its next tile."""
    return open_photograph(path, MAX_TILES * size)


def embedded_tiles(size):
    """All tiles of `size` x `size` pixels of the embedded photographs that show something, as a
    list of Pictures.
    """
    tiles = []
    for folder, names in EMBEDDED.items():
        package = folder.split("/")[0]
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise InputError(
                f"{package}: not installed, and it holds the photographs; install it or give "
                f"--photos DIR"
            )
        for name in names.split():
            path = Path(spec.submodule_search_locations[0]).parent / folder / name
            image = open_embedded(path, size)
            for y in range(0, image.height - size + 1, size):
                for x in range(0, image.width - size + 1, size):
                    box = (x, y, x + size, y + size)
                    if image.crop(box).convert("L").entropy() >= MIN_ENTROPY:
                        tiles.append(Picture(f"{package}/{name}@{x},{y}", path, box))
    return tiles


def texture(rng, size):
    """A colored 1/f noise texture, an RGB image of `size` x `size` pixels."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    spectrum = rng.normal(size=(2, 3, *frequency.shape)) / frequency ** rng.uniform(0.8, 1.6)
    field = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], s=(size, size)).reshape(3, -1)
    field /= field.std(axis=1, keepdims=True)
    mixing = rng.normal(size=(3, 3))
    mixing *= rng.uniform(10, 60) / np.linalg.norm(mixing, axis=1, keepdims=True)
    pixels = mixing @ field + rng.uniform(40, 215, size=(3, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).T.reshape(size, size, 3))


def dead_leaves(rng, size):
    """Overlapping polygons, plain or textured, over a texture: an RGB image of `size` x `size`
    pixels.

    Radii follow the r**-3 law that makes dead leaves look alike at every scale, as natural images
    do.
    """
    canvas, bark = texture(rng, size), texture(rng, size)
    smallest, largest = size / 30, size / 2.5
    for _ in range(rng.integers(15, 120)):
        radius = (smallest**-2 + rng.uniform() * (largest**-2 - smallest**-2)) ** -0.5
        corners = int(rng.choice([3, 4, 5, 6, 24]))
        angles = rng.uniform(0, 2 * math.pi) + np.arange(corners) * 2 * math.pi / corners
        outline = radius * np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.4, 1)], axis=1)
        turn = rng.uniform(0, 2 * math.pi)
        turn = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        points = (outline @ turn + rng.uniform(0, size, size=2)).ravel().tolist()
        if rng.uniform() < 0.3:
            mask = Image.new("1", (size, size))
            ImageDraw.Draw(mask).polygon(points, fill=1)
            canvas.paste(bark, mask=mask)
        else:
            ImageDraw.Draw(canvas).polygon(points, fill=tuple(color(rng)))
    return canvas


def color(rng):
    """A random RGB color as a list of three ints."""
    return rng.integers(0, 256, size=3).tolist()
