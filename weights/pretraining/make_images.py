"""Make the images for the pretraining and the stages of the small network.

    python weights/pretraining/make_images.py small/images

They are dead leaves and parts of the photographs inside the wheels of scikit-image and
scikit-learn, together or alone. v98 takes those of reference_images/ as negatives.

Writes OUT/training_images/ and OUT/reference_images/. The same command writes byte-identical files,
for any number of workers. Started again, it makes what is missing.
"""

import argparse
import functools
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts"))

import numpy as np
from PIL import Image

from common.cli import at_least, usable_cores
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

SIDE = 160  # of an image, pixels
PHOTOGRAPH_SIDE = 1000  # the shorter side of a photograph, pixels at most
JPEG_QUALITY = 95


@functools.cache
def embedded_photographs():
    """The photographs inside the wheels of scikit-image and scikit-learn, as RGB images."""
    return [open_photograph(path, PHOTOGRAPH_SIDE) for _, _, path in embedded_paths()]


def part_of_photograph(rng):
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


def draw_image(rng):
    """Dead leaves, a part of a photograph, or both: an RGB image of SIDE pixels a side."""
    kind = rng.choice(["leaves", "photograph", "both"])
    if kind == "leaves":
        return dead_leaves(rng, SIDE)
    if kind == "photograph":
        return part_of_photograph(rng)
    return dead_leaves(rng, SIDE, canvas=part_of_photograph(rng), bark=part_of_photograph(rng))


def write_image(path, kind):
    """Write a training or reference image, drawn by the number in its name, unless it is there."""
    if path.exists():
        return
    image = draw_image(generator(0, kind, int(path.stem)))
    with atomic(path) as temporary:
        image.save(temporary, "JPEG", quality=JPEG_QUALITY)


def parse_args(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive = at_least(int, 1)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write into")
    add("--training", type=positive, default=10000, help="training images (default: 10000)")
    add("--references", type=positive, default=1000, help="reference images (default: 1000)")
    add(
        "-j",
        "--workers",
        type=positive,
        default=usable_cores(),
        help="processes (default: all cores)",
    )
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    """Write the images; returns the exit code."""
    args = parse_args(argv)
    for kind, count in ("training", args.training), ("reference", args.references):
        folder = args.out / f"{kind}_images"
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{number:06}.jpg" for number in range(count)]
        write = functools.partial(write_image, kind=kind)
        for _ in parallel(write, paths, args.workers, folder.name):
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
