"""The images that the small network is pretrained with, and pairs of views of them: a moderate one,
which resembles a reference, and a hard one, which resembles an edited copy. Most operations are
those of v98.
"""

import functools
import random

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import Compose, RandomApply

import v98
from common.sample_images import embedded_paths, open_photograph

SIDE = 160  # of a part cut out of a photograph, and of a content (see Pairs), pixels
PHOTOGRAPH_SIDE = 1000  # the shorter side of an embedded photograph, pixels at most
MIN_CONTRAST = 8  # contents whose channels all have a smaller standard deviation are drawn again
OVERSAMPLING = 2  # v98's radii of blur and sizes of blocks are in pixels, made for larger images


# ---- images ----


@functools.cache
def embedded_photographs():
    """The photographs inside the wheels of scikit-image and scikit-learn, uint8 (h, w, 3) each."""
    return [np.array(open_photograph(path, PHOTOGRAPH_SIDE)) for _, _, path in embedded_paths()]


part_of_photograph = v98.RandomResizedCrop(SIDE, scale=(0.01, 0.5))  # shares of its area


def random_image(leaf_paths):
    """Dead leaves or a part of an embedded photograph, equally often: uint8 (h, w, 3).

    leaf_paths: images of dead leaves, as make_dataset.py writes them.
    """
    if random.random() < 0.5:
        return v98.read_pixels(random.choice(leaf_paths))
    return part_of_photograph(random.choice(embedded_photographs()))


# ---- edits ----


def random_color():
    """Three values of 0 to 255, int64; often black or white."""
    if random.random() < 0.4:
        return np.full(3, random.choice([0, 255]))
    return np.random.randint(0, 256, 3)  # noqa: NPY002


def two_colors(pixels):
    """Black and white become two random colors, grays mixtures of them."""
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None] / 255
    mixture = (1 - gray) * random_color() + gray * random_color()
    return mixture.astype(np.uint8)


def fog(pixels):
    """Mix with a gray value."""
    return v98.blend_with_constant(pixels, random.uniform(0.3, 1), random.uniform(0, 255))


def compress(pixels):
    """Encode as JPEG of a quality of 25 to 90, and decode.

    OpenCV takes red for blue in both directions, so the channels come back in order.
    """
    quality = random.randint(25, 90)
    _, code = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(code, cv2.IMREAD_COLOR)


recolor = Compose(
    [
        v98.ColorJitter(brightness=0.6, contrast=0.6, saturation=(0, 3), hue=0.5),
        RandomApply([fog], p=0.2),
        RandomApply([two_colors], p=0.15),
    ]
)


def place(pixels, background):
    """Resize the image to 30% to 100% of the background's sides, and draw it somewhere on that.

    background: uint8 (size, size, 3), which is changed and returned.
    """
    size = len(background)
    height = random.randint(round(0.3 * size), size)
    width = random.randint(round(0.3 * size), size)
    top = random.randint(0, size - height)
    left = random.randint(0, size - width)
    background[top : top + height, left : left + width] = v98.resize(pixels, [height, width])
    return background


# ---- pairs of views ----


class Pairs(Dataset):
    """Pair i: a moderate and a hard view, uint8 (2, size, size, 3), of one content.

    A content is a part of a random image. Its moderate view is v98's. Half of the hard views are
    v98's; the others are cropped, placed on a background, recolored and compressed, each by chance.
    A pair depends on leaf_paths, size, seed and i alone.
    leaf_paths: see random_image; count: how many pairs there are. Raises InputError where a package
    that holds photographs is not installed.
    """

    def __init__(self, leaf_paths, size, count, seed):
        embedded_photographs()  # read here, before the data loader's workers start
        self.leaf_paths = leaf_paths
        self.size = size
        self.count = count
        self.seed = seed
        self.content_crop = v98.RandomResizedCrop(SIDE, scale=(0.25, 1), ratio=(0.5, 2))
        self.moderate_view = v98.moderate_view(size)
        self.enlarged_hard_view = v98.hard_view(size * OVERSAMPLING, leaf_paths)
        self.edited_view = Compose(
            [
                RandomApply([v98.RandomResizedCrop(SIDE, scale=(0.16, 1), ratio=(0.5, 2))], p=0.4),
                self.resize_to_view,
                RandomApply([self.place_on_background], p=0.5),
                RandomApply([recolor], p=0.7),
                RandomApply([compress], p=0.4),
            ]
        )

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        v98.seed_generators(self.seed, index)
        cv2.setNumThreads(0)  # a data loader worker has one core
        content = self.draw_content()
        hard_view = self.v98_hard_view if random.random() < 0.5 else self.edited_view
        hard = hard_view(content)
        moderate = self.moderate_view(content).pixels
        return torch.from_numpy(np.stack([moderate, hard]))

    def draw_content(self):
        """What both views show, uint8 (SIDE, SIDE, 3): never of low contrast."""
        while True:
            content = self.content_crop(random_image(self.leaf_paths))
            if content.std(axis=(0, 1)).max() > MIN_CONTRAST:
                return content

    def v98_hard_view(self, content):
        """The content by v98's hard augmentation, without its random erasing."""
        enlarged = v98.resize(content, [OVERSAMPLING * self.size] * 2)
        return self.resize_to_view(self.enlarged_hard_view(enlarged).pixels)

    def resize_to_view(self, pixels):
        """Resize to (size, size, 3)."""
        return v98.resize(pixels, [self.size, self.size])

    def place_on_background(self, pixels):
        """On a color or on another image."""
        if random.random() < 0.25:
            return place(pixels, self.resize_to_view(random_image(self.leaf_paths)))
        return place(pixels, np.full((self.size, self.size, 3), random_color(), np.uint8))
