"""Pairs of views for contrastive learning: a gentle one, which resembles a reference, and a hard
one, which resembles an edited copy. Most operations are those of v98.
"""

import random

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import Compose, RandomApply

import v98

CONTENT_SIDE = 160  # of what both views show, and of the images, pixels
LEAST_CONTRAST = 8  # standard deviation of a channel of a content, of 255
OVERSAMPLING = 2  # v98's radii of blur and sizes of blocks are in pixels, made for larger images


def swap_channels(pixels):
    """Permute red, green and blue."""
    return np.ascontiguousarray(pixels[..., np.random.permutation(3)])  # noqa: NPY002


def random_color():
    """Three values of 0 to 255, int64; often black or white."""
    if random.random() < 0.4:
        return np.full(3, random.choice([0, 255]))
    return np.random.randint(0, 256, 3)  # noqa: NPY002


def two_colors(pixels):
    """Gray values as mixtures of two colors."""
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
    """Draw the image, shrunk to 30% to 100% of each side, somewhere on the background.

    background: uint8 (size, size, 3), which is changed and returned.
    """
    size = len(background)
    height = random.randint(round(0.3 * size), size)
    width = random.randint(round(0.3 * size), size)
    top = random.randint(0, size - height)
    left = random.randint(0, size - width)
    background[top : top + height, left : left + width] = v98.resize(pixels, [height, width])
    return background


class Pairs(Dataset):
    """Pair i: a gentle and a hard view, uint8 (2, size, size, 3), of a part of a random image.

    Half of the hard views are those of v98; the others are cropped, placed on a background,
    recolored and compressed, each by chance. A pair depends on paths, size, seed and i alone.
    paths: of the images; count: how many pairs there are.
    """

    def __init__(self, paths, size, count, seed):
        self.paths = paths
        self.size = size
        self.count = count
        self.seed = seed
        self.content_view = Compose(
            [
                v98.RandomResizedCrop(CONTENT_SIDE, scale=(0.25, 1), ratio=(0.5, 2)),
                RandomApply([v98.horizontal_flip], p=0.5),
                RandomApply([cv2.transpose], p=0.2),  # turned by 90 degrees and mirrored
                RandomApply([swap_channels], p=0.5),
                RandomApply([recolor], p=0.5),
            ]
        )
        self.gentle_view = Compose(
            [
                RandomApply([v98.RandomResizedCrop(CONTENT_SIDE, (0.64, 1), (0.8, 1.25))], p=0.5),
                self.shrink,
                RandomApply([compress], p=0.3),
            ]
        )
        self.edited_view = Compose(
            [
                RandomApply([v98.RandomResizedCrop(CONTENT_SIDE, (0.16, 1), (0.5, 2))], p=0.4),
                self.shrink,
                RandomApply([self.place_on_background], p=0.5),
                RandomApply([recolor], p=0.7),
                RandomApply([compress], p=0.4),
            ]
        )
        self.v98_view = v98.hard_view(size * OVERSAMPLING, paths)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        v98.seed_generators(self.seed, index)
        cv2.setNumThreads(0)  # a data loader worker has one core
        content = self.draw_content()
        hard_view = self.augmented_view if random.random() < 0.5 else self.edited_view
        hard = hard_view(content)
        return torch.from_numpy(np.stack([self.gentle_view(content), hard]))

    def draw_content(self):
        """What both views show; never almost plain."""
        while True:
            content = self.content_view(self.random_image())
            if content.std(axis=(0, 1)).max() > LEAST_CONTRAST:
                return content

    def random_image(self):
        """The pixels of one of the images."""
        return v98.read_pixels(random.choice(self.paths))

    def shrink(self, pixels):
        """Pixels (size, size, 3)."""
        return v98.resize(pixels, [self.size, self.size])

    def augmented_view(self, content):
        """The content by v98's hard augmentation, without its random erasing."""
        enlarged = v98.resize(content, [OVERSAMPLING * self.size] * 2)
        return self.shrink(self.v98_view(enlarged).pixels)

    def place_on_background(self, pixels):
        """On a color, on another image, or on what resembles a web page: text and an image."""
        kind = random.choices(["color", "image", "page"], [0.45, 0.25, 0.3])[0]
        if kind == "image":
            return place(pixels, self.shrink(self.random_image()))
        background = np.full((self.size, self.size, 3), random_color(), np.uint8)
        if kind == "page":
            place(self.random_image(), background)
            for _ in range(3):
                background = v98.overlay_text(background)
        return place(pixels, background)
