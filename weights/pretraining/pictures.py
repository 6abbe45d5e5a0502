"""Make the pictures for the pretraining and the stages of the small network.

    python weights/pretraining/pictures.py small/pictures-0

They are dead leaves and parts of the photographs inside the wheels of scikit-image and
scikit-learn, together or alone.

Writes into OUT
    pictures.npy    pictures, uint8 (n, 160, 160, 3)
    input/          the first 3,000 as JPEG for the stages: training_images/, reference_images/

The same command makes the same pictures. Started again, it makes what is missing.
"""

import argparse
import functools
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts"))

import numpy as np
from PIL import Image

from common.cli import at_least
from common.errors import one_line_errors
from common.files import atomic
from common.parallel import parallel
from common.sample_images import (
    MIN_ENTROPY,
    dead_leaves,
    embedded_paths,
    generator,
    open_photograph,
)

SIDE = 160  # of a picture, pixels
PHOTOGRAPH_SIDE = 1000  # the shorter side of a photograph, pixels at most
STAGE_IMAGES = {"training_images": 2000, "reference_images": 1000}


@functools.cache
def embedded_photographs():
    """The photographs inside the wheels of scikit-image and scikit-learn, as RGB images."""
    return [open_photograph(path, PHOTOGRAPH_SIDE) for _, _, path in embedded_paths()]


def draw_photograph(rng):
    """A part of an embedded photograph, stretched a little, that is not almost plain."""
    photographs = embedded_photographs()
    while True:
        photograph = photographs[rng.integers(len(photographs))]
        side = min(photograph.size) * rng.uniform(0.12, 1)
        width, height = np.minimum(photograph.size, side * np.exp(rng.uniform(-0.2, 0.2, 2)))
        left = rng.uniform(0, photograph.width - width)
        top = rng.uniform(0, photograph.height - height)
        box = (left, top, left + width, top + height)
        part = photograph.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)
        if part.convert("L").entropy() >= MIN_ENTROPY:
            return part


def draw_picture(number, seed):
    """Picture `number`, uint8 (SIDE, SIDE, 3): dead leaves, a part of a photograph or both."""
    rng = generator(seed, "training", number)
    kind = rng.integers(3)
    if kind == 0:
        picture = dead_leaves(rng, SIDE)
    elif kind == 1:
        picture = draw_photograph(rng)
    else:
        picture = dead_leaves(rng, SIDE, draw_photograph(rng), draw_photograph(rng))
    return np.asarray(picture)


def draw_pictures(path, count, seed, workers):
    """Write an array of pictures, unless it is there."""
    if path.exists():
        return
    draw = functools.partial(draw_picture, seed=seed)
    with atomic(path) as temporary:
        pictures = np.lib.format.open_memmap(
            temporary, "w+", np.uint8, shape=(count, SIDE, SIDE, 3)
        )
        for number, picture in enumerate(parallel(draw, range(count), workers, "pictures")):
            pictures[number] = picture
        pictures.flush()


def write_stage_images(folder, pictures):
    """Write the first pictures as JPEG files for the stages, unless the folder is there.

    It appears when it is whole.
    """
    if folder.exists():
        return
    unfinished = folder.with_name("unfinished")
    first = 0
    for name, count in STAGE_IMAGES.items():
        (unfinished / name).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures[first : first + count], first):
            Image.fromarray(picture).save(unfinished / name / f"{number:06}.jpg", quality=95)
        first += count
    unfinished.replace(folder)


def parse_args(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write into")
    add("--count", type=at_least(int, 1), default=6000, help="of pictures (default: 6000)")
    add("--seed", type=at_least(int, 0), default=0, help="(default: 0)")
    add("-j", "--workers", type=at_least(int, 1), default=1, help="(default: 1)")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Write the pictures; returns the exit code."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_pictures(args.out / "pictures.npy", args.count, args.seed, args.workers)
    pictures = np.load(args.out / "pictures.npy", mmap_mode="r")
    write_stage_images(args.out / "input", pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
